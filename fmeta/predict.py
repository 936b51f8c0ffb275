"""A finished run as a function, and as a filter.

  python -m fmeta.predict WORKDIR < lines.txt
  python -m fmeta.predict WORKDIR --top=3 < lines.txt

prints `label<TAB>probability<TAB>text` for every line; `--top=k` prints the k
most probable pairs of label and probability before the text. An empty line
stays empty, so output and input align. From Python:

  run = load_run(workdir)
  probabilities(run, ['number of samples to draw'])  # [1, labels]

`WORKDIR/model/` holds the body in Hugging Face's format (`save_bert`), the
tokenizer, `head.safetensors` and `classifier.json`: labels, max_length,
pooling.
"""

import argparse
import filecmp
import itertools
import os
import pathlib
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from fmeta import data, evaluate, models, text
from fmeta.errors import UsageError
from fmeta.models import BertClassifier
from fmeta.pretrained import load_bert, read_tensors, save_bert
from fmeta.pretrained.files import read_json
from fmeta.types import Forward, Params
from fmeta.workdir import write_json

MODEL, HEAD, CLASSIFIER = 'model', 'head.safetensors', 'classifier.json'
# Rows per forward pass and lines read at a time (untuned).
_BATCH, _CHUNK = 32, 1024
_BROKEN_PIPE = 128 + 13  # what a shell reports for SIGPIPE


class Run(NamedTuple):
  """A fine-tuned classifier of texts.

  Attributes:
    forward: gives logits [B, labels]; reads `input_ids`, `attention_mask`.
    params: merged, float32.
    tokenizer: without padding and truncation.
    labels: name of each class.
    max_length: tokens kept of a text, special ones included.
  """

  forward: Forward
  params: Params
  tokenizer: Tokenizer
  labels: tuple[str, ...]
  max_length: int


def save_run(
  workdir: str | os.PathLike,
  module: BertClassifier,
  params: Params,
  source_folder: str | os.PathLike,
  labels: Sequence[str],
  max_length: int,
) -> None:
  """Writes `workdir/model/`, all of it or nothing.

  Saving the same model again, as a resumed job may, changes nothing.

  Args:
    workdir: the run's folder; created if need be.
    module: whose config and pooling are kept.
    params: merged, with `body` and `head`.
    source_folder: has the `tokenizer.json`.
    labels: one name per output of the head.
    max_length: tokens kept of a text.

  Raises:
    UsageError: if another model is there, there is no tokenizer, or labels
      and head differ in number.
  """
  folder, source = pathlib.Path(workdir) / MODEL, pathlib.Path(source_folder)
  head = {f'head/{key}': np.asarray(x) for key, x in params['head'].items()}
  _check_head(head, module.config.hidden_size, labels, folder)
  text.load_tokenizer(source)  # Refuses a folder without one, early.
  partial = folder.with_name(MODEL + '.partial')
  shutil.rmtree(partial, ignore_errors=True)
  save_bert(partial, params, module.config, source)
  save_file(head, partial / HEAD)
  fields = {
    'labels': list(labels),
    'max_length': max_length,
    'pooling': module.pooling,
  }
  write_json(partial / CLASSIFIER, fields)
  if not folder.exists():
    partial.replace(folder)
    return
  same = _same_files(partial, folder)
  shutil.rmtree(partial)
  if not same:
    raise UsageError(
      f'{folder} already holds another model; give another workdir'
    )


def _same_files(new: pathlib.Path, old: pathlib.Path) -> bool:
  listed = [path.name for path in new.iterdir()]
  return len(filecmp.cmpfiles(new, old, listed, shallow=False)[0]) == len(
    listed
  )


def load_run(workdir: str | os.PathLike) -> Run:
  """The model that a run left behind, ready to be called.

  Raises:
    UsageError: if there is no such run, it saved no model, or a file of the
      model is missing, truncated or of another model.
  """
  workdir = pathlib.Path(workdir)
  folder = workdir / MODEL
  if not workdir.is_dir():
    raise UsageError(f'no run at {str(workdir)!r}; give the workdir of a run')
  if not folder.is_dir():
    raise UsageError(
      f'the run {str(workdir)!r} has no folder {MODEL!r}; fine-tuning runs '
      'save one when they are done'
    )
  labels, max_length, pooling = _read_classifier(folder)
  body, params, _ = load_bert(
    str(folder.resolve()), None, jax.random.key(0), pooling=pooling
  )
  head = read_tensors(folder / HEAD)
  _check_head(head, body.config.hidden_size, labels, folder)
  params['head'] = {
    name.removeprefix('head/'): jnp.array(value) for name, value in head.items()
  }
  module = BertClassifier(body.config, len(labels), pooling)
  return Run(
    models.forward(module),
    params,
    text.load_tokenizer(folder),
    tuple(labels),
    max_length,
  )


def _read_classifier(folder: pathlib.Path) -> tuple[list[str], int, str]:
  path = folder / CLASSIFIER
  fields = read_json(path)
  for name, kind in (('labels', list), ('max_length', int), ('pooling', str)):
    if not isinstance(fields.get(name), kind):
      raise UsageError(
        f'{path} has {name}={fields.get(name)!r}, not a {kind.__name__}; '
        'save the run again'
      )
  return fields['labels'], fields['max_length'], fields['pooling']


def _check_head(head, size: int, labels: Sequence[str], where: Any) -> None:
  expected = {'head/kernel': (size, len(labels)), 'head/bias': (len(labels),)}
  found = {name: value.shape for name, value in head.items()}
  if found != expected:
    raise UsageError(
      f'the head for {where} has {found}; a body of width {size} and '
      f'{len(labels)} labels need {expected}'
    )


def probabilities(run: Run, texts: Sequence[str]) -> np.ndarray:
  """Softmax of the logits of N texts, float64 [N, labels]."""
  if not texts:
    return np.zeros((0, len(run.labels)))
  columns = text.encode(run.tokenizer, texts, run.max_length)
  # Short texts meet short ones; the columns go back to the order given.
  order = np.argsort(columns['length'], kind='stable')
  columns['label'] = np.zeros(len(texts), np.int32)  # unknown, and not read
  widths = [w for w in text.BUCKETS if w < run.max_length] + [run.max_length]
  batches = data.eval_batches(
    data.take(columns, order), _BATCH, collate=text.bucket_collate(widths)
  )
  predicted = evaluate.evaluate(run.forward, run.params, {}, batches)
  out = np.empty_like(predicted.probabilities)
  out[order] = predicted.probabilities
  return out


def answers(run: Run, lines: Sequence[str], top: int = 1) -> Iterator[str]:
  """One tab-separated answer per line; '' for a line without a word."""
  rows = iter(probabilities(run, [line for line in lines if line.strip()]))
  for line in lines:
    if not line.strip():
      yield ''
      continue
    row = next(rows)
    best = np.argsort(-row, kind='stable')[:top]
    yield '\t'.join([*(f'{run.labels[k]}\t{row[k]:.4f}' for k in best), line])


def _decoded(lines: Iterable[bytes]) -> Iterator[str]:
  for number, line in enumerate(lines, 1):
    try:
      yield line.decode().rstrip('\r\n')
    except UnicodeDecodeError as error:
      raise UsageError(
        f'line {number} of the input is not UTF-8 (byte {error.start}: '
        f'{error.object[error.start]:#04x}); convert it'
      ) from error


class _Parser(argparse.ArgumentParser):
  def error(self, message: str):
    """One line, where argparse would print its usage before it."""
    raise UsageError(f'{message}; usage: {self.prog} WORKDIR [--top=K]')


def main(argv: Sequence[str], lines: BinaryIO) -> int:
  """Answers every line on stdout; returns the exit status."""
  parser = _Parser('python -m fmeta.predict', description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument('workdir', help='of a run that saved a model')
  parser.add_argument('--top', type=int, default=1, help='labels per line')
  try:
    options = parser.parse_args(argv)
    if options.top < 1:
      raise UsageError(f'--top={options.top}; give at least 1')
    run = load_run(options.workdir)
    source = _decoded(lines)
    while chunk := list(itertools.islice(source, _CHUNK)):
      for answer in answers(run, chunk, options.top):
        print(answer)
      sys.stdout.flush()
  except UsageError as error:
    print('error:', ' '.join(str(error).splitlines()), file=sys.stderr)
    return 2
  except BrokenPipeError:  # `| head` has seen enough.
    # Otherwise the interpreter's own flush at exit would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _BROKEN_PIPE
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:], sys.stdin.buffer))
