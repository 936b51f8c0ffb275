"""The one error a user can cause.

Commands print its message as a single line on stderr and exit with status 2;
everything else is a bug and keeps its traceback.
"""

import difflib
import math
from collections.abc import Iterable
from numbers import Real
from typing import Any


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


def check_number(
  what: str, value: Any, most: float = math.inf, *, above: bool = False
) -> None:
  """Refuses a number below 0, above `most`, or not finite.

  An array passes, whatever is in it: hyper-parameters may be traced.

  Args:
    what: its name, for the message.
    value: as a user gave it.
    most: the largest number that means something.
    above: 0 itself is refused as well.

  Raises:
    UsageError: also for text.
  """
  if isinstance(value, Real):
    number = float(value)
    low = number > 0 if above else number >= 0
    if low and number <= most and math.isfinite(number):
      return
  elif not isinstance(value, str):
    return
  least = 'above 0' if above else 'of at least 0'
  ends = '' if most == math.inf else f' and at most {most:g}'
  raise UsageError(f'{what}={value!r}; give a number {least}{ends}')
