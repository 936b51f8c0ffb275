"""LoRA adapters of BERT in the format of Hugging Face's PEFT.

A folder with `adapter_config.json` and `adapter_model.safetensors`. Written
and read here without importing peft; plain LoRA, rsLoRA and DoRA. A PiSSA
adapter becomes plain LoRA first (`adapters.pissa_to_lora`).
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from fmeta import adapters, tree
from fmeta.adapters.dora import M
from fmeta.adapters.factors import beside, leaves_of
from fmeta.adapters.lora import A, B
from fmeta.errors import UsageError, suggest
from fmeta.pretrained.bert import their_name
from fmeta.pretrained.files import read_json, read_tensors
from fmeta.types import Array, Params, Tuning

_PREFIX = 'base_model.model.'
_KERNEL = {A: '.lora_A.weight', B: '.lora_B.weight'}
_TABLE = {A: '.lora_embedding_A', B: '.lora_embedding_B'}
_MAGNITUDE = '.lora_magnitude_vector'
# Any other value of these fields would be another function.
_ASSUMED = {
  'peft_type': 'LORA',
  'bias': 'none',
  'fan_in_fan_out': False,
  'lora_bias': False,
  'layer_replication': None,
  'alora_invocation_tokens': None,
  'target_parameters': None,
}
_EMPTY = ('rank_pattern', 'alpha_pattern', 'modules_to_save')


@dataclasses.dataclass(frozen=True)
class PeftConfig:
  """What the factors alone do not say; fields of `adapter_config.json`.

  Attributes:
    rank: width of the factors, `r`.
    alpha: `lora_alpha`.
    use_rslora: the scale is alpha / sqrt(rank), not alpha / rank.
    use_dora: there are magnitudes.
  """

  rank: int
  alpha: float
  use_rslora: bool = False
  use_dora: bool = False

  def tuning(self, *also: str) -> Tuning:
    """The tuning of which these are the factors; `also` moves, too."""
    alpha = self.alpha * (self.rank**0.5 if self.use_rslora else 1)
    make = adapters.dora if self.use_dora else adapters.lora
    return make(rank=self.rank, alpha=alpha, also=also)


def _module(name: str) -> str:
  """`body/layer_0/mlp/up/kernel` -> `encoder.layer.0.intermediate.dense`."""
  try:
    return their_name(name).removesuffix('.weight')
  except KeyError as error:
    raise UsageError(
      f'{name!r} has no name in a BertModel; only factors of leaves under '
      "'body' can be exported"
    ) from error


def _layout(name: str) -> Mapping[str, str]:
  return _TABLE if name.endswith('/embedding') else _KERNEL


def save_peft(
  folder: pathlib.Path | str,
  params: Params,
  config: PeftConfig,
  *,
  base_model: str = '',
) -> None:
  """Writes factors so that `peft.PeftModel.from_pretrained` reads them.

  They fit transformers' `BertModel` with the weights of `save_bert` or of
  the published model. A head is not part of it.

  Args:
    folder: created; an existing adapter in it is not overwritten.
    params: holds the factors; for example `state.trainable`.
    config: must agree with the factors.
    base_model: `base_model_name_or_path`, where peft looks for the model.

  Raises:
    UsageError: if there are no factors, they do not fit `config`, belong to
      no BERT layer, or the folder already holds an adapter.
  """
  folder = pathlib.Path(folder)
  path = folder / 'adapter_model.safetensors'
  if path.exists():
    raise UsageError(f'{folder} already holds an adapter; give another folder')
  suffixes = (A, B, M) if config.use_dora else (A, B)
  found = leaves_of(params, suffixes)
  _check_factors(params, found, config)
  tensors = {}
  for name, leaves in found.items():
    prefix, layout = _PREFIX + _module(name), _layout(name)
    for suffix in (A, B):
      value = np.asarray(leaves[suffix], np.float32).T
      tensors[prefix + layout[suffix]] = np.ascontiguousarray(value)
    if config.use_dora:
      tensors[prefix + _MAGNITUDE] = np.asarray(leaves[M], np.float32)
  folder.mkdir(parents=True, exist_ok=True)
  save_file(tensors, path, {'format': 'pt'})
  text = json.dumps(_fields(config, sorted(found), base_model), indent=2)
  (folder / 'adapter_config.json').write_text(text + '\n', encoding='utf-8')


def _check_factors(params, found, config: PeftConfig) -> None:
  names = tree.names(params)
  if not found:
    raise UsageError(f'no lora factors among {names[:3]}; give the trainable')
  for name, leaves in found.items():
    if leaves[A].shape[-1] != config.rank:
      raise UsageError(
        f'factors of {name!r} have rank {leaves[A].shape[-1]}, but the config '
        f'says rank={config.rank}; give both the same'
      )
  if not config.use_dora and any(name.endswith(M) for name in names):
    raise UsageError('there are DoRA magnitudes; give use_dora=True')


def _fields(config: PeftConfig, names: list[str], base_model: str) -> dict:
  return {
    **_ASSUMED,
    'base_model_name_or_path': base_model,
    'inference_mode': True,
    'init_lora_weights': True,
    'lora_alpha': config.alpha,
    'lora_dropout': 0.0,
    'r': config.rank,
    'target_modules': [_module(name) for name in names],
    'task_type': 'FEATURE_EXTRACTION',
    'use_dora': config.use_dora,
    'use_rslora': config.use_rslora,
  }


def read_peft_config(folder: pathlib.Path | str) -> PeftConfig:
  """`adapter_config.json`; dropout on the factors' input is not kept.

  Raises:
    UsageError: if it describes another method or an option that is not here.
  """
  path = pathlib.Path(folder) / 'adapter_config.json'
  given = read_json(path)
  for key, expected in _ASSUMED.items():
    if given.get(key, expected) != expected:
      raise UsageError(
        f'{path} has {key}={given[key]!r}; only {expected!r} is supported'
      )
  for key in _EMPTY:
    if given.get(key):
      raise UsageError(f'{path} has {key}={given[key]!r}; it must be empty')
  born = given.get('init_lora_weights', True)
  if born not in (True, False, 'gaussian'):
    raise UsageError(
      f'{path} has init_lora_weights={born!r}: its factors may need changed '
      'base weights; convert it to plain LoRA where it was trained'
    )
  missing = [key for key in ('r', 'lora_alpha') if key not in given]
  if missing:
    raise UsageError(f'{path} lacks {missing[0]!r}')
  flags = {key: bool(given.get(key)) for key in ('use_rslora', 'use_dora')}
  return PeftConfig(int(given['r']), float(given['lora_alpha']), **flags)


def load_peft(
  folder: pathlib.Path | str, params: Params
) -> tuple[Params, PeftConfig]:
  """The parameters with an adapter's factors beside their leaves.

    params, config = load_peft(folder, params)
    learner = finetune(loss, optimizer, tuning=config.tuning('head/.*'))

  Args:
    folder: with `adapter_config.json` and `adapter_model.safetensors`.
    params: of a `BertClassifier`, from `load_bert`.

  Raises:
    UsageError: for an unsupported config, a missing, unknown or wrong-shaped
      tensor.
  """
  path = pathlib.Path(folder) / 'adapter_model.safetensors'
  config = read_peft_config(folder)
  tensors = {
    name.removeprefix(_PREFIX).removeprefix('bert.'): value
    for name, value in read_tensors(path).items()
  }
  leaves = {}
  for name in tree.names(params):
    leaf = tree.get(params, name)
    if name.startswith('body/') and name.endswith(('/kernel', '/embedding')):
      found = _take(tensors, name, leaf, config, path)
      leaves |= {name: found} if found else {}
  if tensors:
    raise UsageError(
      f'{path}: {sorted(tensors)[0]!r} belongs to no kernel of this model'
      f'{suggest(sorted(tensors)[0], map(_module, leaves))}'
    )
  return beside(params, leaves), config


def _take(
  tensors: dict[str, Any], name: str, leaf: Array, config: PeftConfig, path
) -> dict[str, Array]:
  """Removes one leaf's factors from `tensors`; {} if it has none."""
  module, layout = _module(name), _layout(name)
  shapes = {
    A: (layout[A], (config.rank, leaf.shape[0])),
    B: (layout[B], (leaf.shape[1], config.rank)),
    **({M: (_MAGNITUDE, leaf.shape[1:])} if config.use_dora else {}),
  }
  if not any(module + key in tensors for key, _ in shapes.values()):
    return {}
  found = {}
  for suffix, (key, shape) in shapes.items():
    value = tensors.pop(module + key, None)
    if value is None or value.shape != shape:
      what = 'no' if value is None else f'a {list(value.shape)}'
      raise UsageError(
        f'{path} has {what} tensor {module + key!r}; expected {list(shape)}'
      )
    # Copied: an aliased numpy buffer cannot be donated.
    found[suffix] = jnp.array(np.ascontiguousarray(value.T), jnp.float32)
  return found
