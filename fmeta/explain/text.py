"""A finished run of a text classifier, explained."""

import html
import pathlib
from collections.abc import Sequence

import numpy as np

from fmeta import data
from fmeta.errors import UsageError, suggest
from fmeta.explain import attribution, page
from fmeta.explain.measure import Case, Measured
from fmeta.explain.recipe import Recipe
from fmeta.predict import Run
from fmeta.text import bucket_collate, encode
from fmeta.types import Params

EXAMPLES = 'examples.tsv'
_BATCH = 32  # rows of a forward pass, as `fmeta.predict`


def write_examples(
  path: pathlib.Path, texts: Sequence[str], labels: Sequence[str]
) -> None:
  """Writes lines `label<TAB>text`; white space in a text becomes a space."""
  lines = [
    f'{label}\t{" ".join(text.split())}\n'
    for text, label in zip(texts, labels, strict=True)
  ]
  path.write_text(''.join(lines), encoding='utf-8')


def read_examples(
  path: pathlib.Path, labels: Sequence[str], limit: int
) -> tuple[list[str], np.ndarray]:
  """The first `limit` texts and their classes from `label<TAB>text` lines.

  Raises:
    UsageError: if the file is missing or not UTF-8, a line has no tab or an
      unknown label, or there are fewer than two examples.
  """
  try:
    lines = path.read_text(encoding='utf-8').splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UsageError(
      f'examples {str(path)!r} cannot be read ({error}); give '
      '--examples=FILE with lines label<TAB>text'
    ) from error
  texts, classes = [], []
  for number, line in enumerate(lines, 1):
    if not line.strip() or len(texts) == limit:
      continue
    label, tab, text = line.partition('\t')
    if not tab or label not in labels:
      raise UsageError(
        f'line {number} of {path} is no label<TAB>text with a label of the run'
        f'{suggest(label, labels, limit=20)}'
      )
    texts.append(text)
    classes.append(labels.index(label))
  if len(texts) < 2:
    raise UsageError(f'{path} holds {len(texts)} examples; give at least two')
  return texts, np.asarray(classes, np.int32)


def case_of(
  run: Run,
  start: Params,
  texts: Sequence[str],
  labels: np.ndarray,
  recipe: Recipe | None = None,
) -> Case:
  """The run and its start on these examples."""
  columns = {**encode(run.tokenizer, texts, run.max_length), 'label': labels}
  batches = data.eval_batches(
    columns, min(_BATCH, len(texts)), collate=bucket_collate((run.max_length,))
  )
  return Case(run.forward, start, run.params, batches, recipe=recipe)


def explain_tokens(
  run: Run, text: str, target: int, steps: int = 50
) -> tuple[list[str], attribution.Attribution]:
  """A text's tokens, special ones left out, and what each contributes.

  The baseline has [PAD] at the place of every token but [CLS] and [SEP].

  Returns:
    Tokens, and an attribution with one value per token.
  """
  columns = encode(run.tokenizer, [text], run.max_length)
  ids = columns['input_ids'][0]
  special = set(run.tokenizer.encode('').ids)
  here = np.arange(len(ids)) < columns['length'][0]
  fixed = ~here | np.isin(ids, list(special))
  batch = bucket_collate((run.max_length,))(columns)
  found = attribution.tokens(
    run.forward,
    run.params,
    batch,
    target,
    fixed=fixed.tolist(),
    padding=run.tokenizer.token_to_id('[PAD]') or 0,
    steps=steps,
  )
  names = [run.tokenizer.id_to_token(int(i)) or '' for i in ids[~fixed]]
  return names, found._replace(values=found.values[~fixed])


def coloured(tokens: Sequence[str], values: np.ndarray) -> str:
  """Tokens as HTML, blue where the value is positive and orange where not."""
  scale = float(np.abs(values).max(initial=0)) or 1.0
  out = []
  for token, value in zip(tokens, values, strict=True):
    colour = '0,114,178' if value > 0 else '213,94,0'
    space = '' if token.startswith('##') or not out else ' '
    shown = html.escape(token.removeprefix('##'))
    out.append(
      f'{space}<span title="{value:+.3g}" style="background:rgba({colour},'
      f'{0.75 * abs(value) / scale:.2f})">{shown}</span>'
    )
  return f'<div class="tokens">{"".join(out)}</div>'


def explained(
  run: Run, texts: Sequence[str], measured: Measured, count: int
) -> list[page.Explained]:
  """Attributions of the flipped examples, then of the first ones."""
  rows = [flip.index for flip in measured.flips]
  rows += [i for i in range(len(texts)) if i not in rows]
  out = []
  for row in rows[:count]:
    target = int(measured.after[row].argmax())
    tokens, found = explain_tokens(run, texts[row], target)
    label = run.labels[int(measured.labels[row])]
    title = (
      f'{run.labels[target]} (label {label}), logit {found.total:+.2f} against '
      'a text of [PAD]'
    )
    shown = coloured(tokens, found.values)
    out.append(page.Explained(shown, title, found.error))
  return out
