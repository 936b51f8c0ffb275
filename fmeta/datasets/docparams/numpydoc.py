"""Reads `name : type` entries out of numpydoc sections, without importing.

Everything here works on source text, so the result depends on the bytes of a
wheel only, not on what can be imported or compiled on this machine.
"""

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

# What a caller gives and what an estimator keeps; Returns and Yields describe
# results and are left out.
SECTIONS = ('Parameters', 'Other Parameters', 'Attributes')

# Spaces only: with `\s`, which matches newlines too, this turns quadratic.
_TITLED = re.compile(
  rf'^[ \t]*(?:{"|".join(SECTIONS)})[ \t]*\n[ \t]*(?:---|===)', re.MULTILINE
)
_UNDERLINE = re.compile(r'\s*(?:-{3,}|={3,})\s*')
_ENTRY = re.compile(r'(?P<names>[*\w, `.]+?)\s*:\s+(?P<type>\S.*)')
_OPENING, _CLOSING = '([{', ')]}'


class Entry(NamedTuple):
  """One documented parameter: its name, declared type and description."""

  name: str
  type: str
  text: str


def source_entries(source: str) -> Iterator[Entry]:
  """Entries of every string literal that holds a numpydoc section.

  Literals rather than docstrings, because numpy and scipy attach many of
  theirs with `add_newdoc(name, text)` and pandas keeps shared ones in
  variables.
  """
  if not re.search('---|===', source):  # parsing is what costs
    return
  with warnings.catch_warnings():
    # Invalid escapes in somebody else's literals are not ours to report.
    warnings.simplefilter('ignore')
    tree = ast.parse(source)
  for node in ast.walk(tree):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      if _TITLED.search(node.value):
        yield from entries(node.value)


def entries(docstring: str) -> Iterator[Entry]:
  """Entries of the parameter sections of one docstring, in order."""
  lines = inspect.cleandoc(docstring).expandtabs().splitlines()
  for start, stop in _sections(lines):
    yield from _section_entries(lines[start:stop])


def _sections(lines: list[str]) -> Iterator[tuple[int, int]]:
  """(first, last + 1) body lines of each section in `SECTIONS`."""
  titles = [
    row
    for row in range(len(lines) - 1)
    if lines[row].strip() and _UNDERLINE.fullmatch(lines[row + 1])
  ]
  for title, after in pairwise([*titles, len(lines)]):
    if lines[title].strip() in SECTIONS:
      yield title + 2, after


def _section_entries(lines: list[str]) -> Iterator[Entry]:
  """Splits a section's body at its least indented lines."""
  body = [line for line in lines if line.strip()]
  if not body:
    return
  margin = _indent(body[0])
  heads = [row for row, line in enumerate(body) if _indent(line) <= margin]
  for head, after in pairwise([*heads, len(body)]):
    if _indent(body[head]) < margin:  # prose that follows the section
      return
    entry = _entry([line.strip() for line in body[head:after]])
    if entry is not None:
      yield entry


def _entry(lines: list[str]) -> Entry | None:
  match = _ENTRY.fullmatch(lines[0])
  if match is None:
    return None
  declared, row = match['type'], 1
  # A type that goes on in the next line would leak into the description.
  while row < len(lines) and _goes_on(declared):
    declared, row = f'{declared.rstrip(chr(92))} {lines[row]}', row + 1
  name = match['names'].split(',')[0].strip(' *`')
  return Entry(name, ' '.join(declared.split()), _flat(lines[row:]))


def _goes_on(declared: str) -> bool:
  depth = sum(declared.count(sign) for sign in _OPENING)
  depth -= sum(declared.count(sign) for sign in _CLOSING)
  return depth > 0 or bool(
    re.search(r'(,|\||=|\\|\b(or|of|and|shape|default:?))\s*$', declared)
  )


def _flat(lines: list[str]) -> str:
  return ' '.join(' '.join(lines).split())


def _indent(line: str) -> int:
  return len(line) - len(line.lstrip())
