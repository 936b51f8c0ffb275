"""The one error a user can cause.

Commands print its message as a single line on stderr and exit with status 2;
everything else is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
  """Bad input: says what was given, what is possible, and what to do."""


def suggest(given: str, possible: Iterable[str], limit: int = 6) -> str:
  """Returns `; did you mean 'x'?` or a short list of what is possible."""
  possible = list(possible)
  close = difflib.get_close_matches(given, possible, n=1)
  if close:
    return f'; did you mean {close[0]!r}?'
  shown = ', '.join(map(repr, possible[:limit]))
  more = ', ...' if len(possible) > limit else ''
  return f'; possible: [{shown}{more}]'
