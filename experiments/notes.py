"""What the fields of a config mean, in the words of its source."""

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from typing import Any


def of(config: Any) -> dict[str, str]:
  """Name -> the comment beside or above a field, where there is one.

  That of the class that has it last counts: a default that is only changed
  keeps the words of the class below.
  """
  found = {}
  for cls in reversed(type(config).__mro__):
    if dataclasses.is_dataclass(cls):
      found |= _comments(cls)
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      inner = of(value).items()
      found |= {f'{field.name}.{name}': words for name, words in inner}
  return found


def _comments(cls: type) -> dict[str, str]:
  """Of the fields that this class itself writes down."""
  try:
    source = textwrap.dedent(inspect.getsource(cls))
  except (OSError, TypeError):  # Typed into a console, or made by a function.
    return {}
  (body,) = ast.parse(source).body
  written = {
    node.lineno: node.target.id
    for node in getattr(body, 'body', ())
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
  }
  found, above = {}, []
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    row, column = token.start
    if token.type == tokenize.COMMENT and not token.line[:column].strip():
      above.append(token.string.lstrip('# '))
    elif token.type == tokenize.COMMENT and row in written:
      found[written[row]] = token.string.lstrip('# ')
    elif token.type == tokenize.NL and not token.line.strip():
      above = []
    elif token.type == tokenize.NAME and token.string == written.get(row):
      if above:
        found[token.string], above = ' '.join(above), []
  return found
