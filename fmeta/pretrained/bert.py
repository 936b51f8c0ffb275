"""Hugging Face's BERT names and ours, in both directions."""

import json
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from fmeta import tree
from fmeta.adapters import check_exportable
from fmeta.errors import UsageError, suggest
from fmeta.models.bert import BertClassifier
from fmeta.models.bert_layers import BertConfig
from fmeta.pretrained.files import check_sha256, read_json, read_tensors
from fmeta.pretrained.sources import find
from fmeta.types import Array, Params

# Our field -> theirs, in config.json.
_FIELDS = {
  'vocab_size': 'vocab_size',
  'hidden_size': 'hidden_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'intermediate_size': 'intermediate_size',
  'max_positions': 'max_position_embeddings',
  'type_vocab_size': 'type_vocab_size',
  'layer_norm_eps': 'layer_norm_eps',
  'dropout': 'hidden_dropout_prob',
  'attention_dropout': 'attention_probs_dropout_prob',
  'initializer_range': 'initializer_range',
}
# What the module computes; another value would be another function.
_ASSUMED = {
  'model_type': 'bert',
  'hidden_act': 'gelu',
  'position_embedding_type': 'absolute',
  'is_decoder': False,
}
# Applied in order to `body/...` without its prefix.
_NAMES = (
  (r'embeddings/(word|position)/embedding', r'embeddings.\1_embeddings.weight'),
  (r'embeddings/type/embedding', r'embeddings.token_type_embeddings.weight'),
  (r'embeddings/norm/(\w+)', r'embeddings.LayerNorm.\1'),
  (
    r'layer_(\d+)/attention/(query|key|value)/(\w+)',
    r'encoder.layer.\1.attention.self.\2.\3',
  ),
  (
    r'layer_(\d+)/attention/output/(\w+)',
    r'encoder.layer.\1.attention.output.dense.\2',
  ),
  (
    r'layer_(\d+)/attention/norm/(\w+)',
    r'encoder.layer.\1.attention.output.LayerNorm.\2',
  ),
  (r'layer_(\d+)/mlp/up/(\w+)', r'encoder.layer.\1.intermediate.dense.\2'),
  (r'layer_(\d+)/mlp/down/(\w+)', r'encoder.layer.\1.output.dense.\2'),
  (r'layer_(\d+)/mlp/norm/(\w+)', r'encoder.layer.\1.output.LayerNorm.\2'),
)
# Heads of other objectives: the body alone is taken.
_HEADS = ('pooler.', 'cls.', 'classifier.', 'qa_outputs.')
_BUFFERS = ('embeddings.position_ids', 'embeddings.token_type_ids')


def their_name(name: str) -> str:
  """`body/layer_0/mlp/up/bias` -> `encoder.layer.0.intermediate.dense.bias`."""
  inner = name.removeprefix('body/')
  for pattern, template in _NAMES:
    if re.fullmatch(pattern, inner):
      theirs = re.sub(pattern, template, inner)
      return re.sub(r'\.(kernel|scale)$', '.weight', theirs)
  raise KeyError(name)


def read_config(folder: pathlib.Path, **changes: Any) -> BertConfig:
  """`config.json` as a `BertConfig`; `changes` win, for example `dropout=0.`.

  Raises:
    UsageError: if the file describes another architecture.
  """
  given = read_json(folder / 'config.json')
  for key, expected in _ASSUMED.items():
    if given.get(key, expected) != expected:
      raise UsageError(
        f'{folder}/config.json has {key}={given[key]!r}; only {expected!r} '
        'is supported'
      )
  missing = [theirs for theirs in _FIELDS.values() if theirs not in given]
  if missing:
    raise UsageError(f'{folder}/config.json lacks {missing[0]!r}')
  fields = {ours: given[theirs] for ours, theirs in _FIELDS.items()}
  return BertConfig(**{**fields, **changes})


def _clean(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Drops the optional `bert.` prefix, old norm names, heads and buffers."""
  out = {}
  for name, value in tensors.items():
    short = name.removeprefix('bert.')
    short = re.sub(r'LayerNorm\.gamma$', 'LayerNorm.weight', short)
    short = re.sub(r'LayerNorm\.beta$', 'LayerNorm.bias', short)
    if not short.startswith(_HEADS) and short not in _BUFFERS:
      out[short] = value
  return out


def _take(tensors, name: str, shape: tuple[int, ...], where: str) -> Array:
  theirs = their_name(name)
  if theirs not in tensors:
    raise UsageError(
      f'{where} has no tensor {theirs!r} (our {name}){suggest(theirs, tensors)}'
    )
  value = tensors[theirs]
  if name.endswith('/kernel'):
    shape = shape[::-1]
  if value.shape != shape:
    raise UsageError(
      f'{where}: {theirs!r} has shape {list(value.shape)}, config.json says '
      f'{list(shape)}; the two files are of different models'
    )
  value = value.T if name.endswith('/kernel') else value
  # Copied: an aliased numpy buffer cannot be donated.
  return jnp.array(np.ascontiguousarray(value), jnp.float32)


def from_tensors(
  config: BertConfig, tensors: Mapping[str, np.ndarray], where: str
) -> Params:
  """`{'body': ...}` from tensors under Hugging Face's names, in float32.

  Raises:
    UsageError: for a missing, unknown or wrong-shaped tensor.
  """
  tensors = _clean(tensors)
  shapes = _shapes(config)
  wanted = [their_name(name) for name in tree.names(shapes)]
  unknown = sorted(set(tensors) - set(wanted))
  if unknown:
    raise UsageError(
      f'{where}: {unknown[0]!r} is no tensor of a BERT with '
      f'{config.num_layers} layers{suggest(unknown[0], wanted)}'
    )
  return tree.map_with_name(
    lambda name, leaf: _take(tensors, name, leaf.shape, where), shapes
  )


def _shapes(config: BertConfig) -> Params:
  ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  variables = jax.eval_shape(
    BertClassifier(config).init, jax.random.key(0), ids, ids
  )
  return variables['params']


def load_bert(
  source: str,
  num_classes: int | None,
  rng: Array,
  *,
  pooling: str = 'mean',
  download: bool = False,
  sha256: str | None = None,
  **changes: Any,
) -> tuple[BertClassifier, Params, pathlib.Path]:
  """A published BERT with a fresh head.

  Args:
    source: a folder, `wheel:<module>` or `hub:<org>/<name>`; see `find`.
    num_classes: of the head; None: embeddings only.
    rng: draws the head, normal with the config's `initializer_range`.
    pooling: see `BertClassifier`; all-MiniLM-L6-v2 was trained with 'mean'.
    download: let the hub fetch what its cache lacks.
    sha256: of `model.safetensors`, checked when given.
    **changes: fields of the config to override, for example `dropout=0.0`.

  Returns:
    The module, its parameters in float32, the folder with `tokenizer.json`.

  Raises:
    UsageError: for a missing or foreign model, tensors that do not fit,
      truncated files, pickles.
  """
  folder = find(source, download=download)
  config = read_config(folder, **changes)
  path = _weights(folder)
  if sha256:
    check_sha256(path, sha256)
  params = from_tensors(config, read_tensors(path), str(path))
  if num_classes:
    shape = (config.hidden_size, num_classes)
    params['head'] = {
      'kernel': config.initializer_range * jax.random.normal(rng, shape),
      'bias': jnp.zeros(num_classes),
    }
  return BertClassifier(config, num_classes, pooling), params, folder


def _weights(folder: pathlib.Path) -> pathlib.Path:
  path = folder / 'model.safetensors'
  pickles = [p.name for p in sorted(folder.glob('pytorch_model*.bin'))]
  if not path.is_file() and pickles:
    raise UsageError(
      f'{folder} holds only the pickle {pickles[0]}, and reading one runs '
      'whatever code it holds; convert it to model.safetensors'
    )
  return path


def save_bert(
  folder: pathlib.Path | str,
  params: Params,
  config: BertConfig,
  tokenizer_folder: pathlib.Path | str | None = None,
) -> None:
  """Writes the body so that `load_bert` and transformers' BertModel read it.

  The head is left out: transformers' classifiers put a tanh pooler before
  theirs, so the same numbers would mean another function.

  Args:
    folder: created; an existing model in it is not overwritten.
    params: with `body`, for example `learner.params(state)`.
    config: written as `config.json`.
    tokenizer_folder: its `tokenizer*.json` files are copied.

  Raises:
    UsageError: if the folder already holds a model, or the parameters hold
      an adapter that the format has no place for.
  """
  check_exportable(params, "Hugging Face's BERT")
  folder = pathlib.Path(folder)
  if (folder / 'model.safetensors').exists():
    raise UsageError(f'{folder} already holds a model; give another folder')
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {}
  for name, leaf in zip(
    tree.names(params['body']), jax.tree.leaves(params['body']), strict=True
  ):
    value = np.asarray(leaf)
    value = value.T if name.endswith('/kernel') else value
    tensors[their_name(name)] = np.ascontiguousarray(value)
  save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
  fields = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
  text = json.dumps(
    {'architectures': ['BertModel'], **_ASSUMED, **fields}, indent=2
  )
  (folder / 'config.json').write_text(text + '\n', encoding='utf-8')
  if tokenizer_folder:
    for path in pathlib.Path(tokenizer_folder).glob('tokenizer*.json'):
      shutil.copy(path, folder)
