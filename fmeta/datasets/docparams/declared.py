"""Normalises a declared numpydoc type to one of ten classes, or to none.

`'int or None, default=3'` is an int, `'{array-like, sparse matrix} of shape
(n,)'` an array. A declaration that offers alternatives of different classes
(`'str or callable'`) maps to nothing, with three exceptions where one
alternative contains the other: a number beside an array is an array, an int
beside a float is a float, and a path or a file beside a string is a string.
"""

import re
from collections.abc import Iterator

LABELS = (
  'array',
  'bool',
  'int',
  'float',
  'choice',
  'str',
  'sequence',
  'dict',
  'callable',
  'random state',
)

_LITERAL = (
  r"(?:[rb]?'[^']*'|[rb]?\"[^\"]*\"|``[^`]*``"
  r'|-?\d+(?:\.\d+)?|none|true|false|(?:np\.)?inf)'
)
_LITERALS = rf'{_LITERAL}(?:(?:\s*(?:,|/|\|)\s*(?:or )?| or ){_LITERAL})+,?'
_RANDOM = re.compile(
  r'\b(?:randomstate|random\.generator|random_state|random number generator)\b'
)
_SIGN = r'(?:(?:non-?negative|positive|strictly positive|real|odd|even) )?'
_BOUND = r'(?:,? ?(?:[<>]=? ?|in |between ).*| scalar| value| number)?'

_SHAPE = re.compile(
  r'\s*,?\s+(?:of |with )?(?:shape|length|size|len)\b\s*=?\s*'
  r'(?:\([^()]*\)|\[[^\]]*\]|[^\s,]+)(?:,? or \([^()]*\))*'
)

# The first rule that matches a whole alternative gives its class. `path` and
# `scalar` are no classes; they only take part in `_CONTAINED`.
_RULES = tuple(
  (name, re.compile(pattern))
  for name, pattern in (
    ('choice', rf'(?:str(?:ing)?,? ?(?:in )?)?[{{\[(]\s*{_LITERALS}\s*[}}\])]'),
    ('choice', _LITERALS),
    ('word', _LITERAL),
    ('bool', r'(?:python )?bool(?:ean)?s?(?: type| value| flag)?'),
    ('int', rf'{_SIGN}(?:python )?int(?:eger)?s?{_BOUND}'),
    ('float', rf'{_SIGN}(?:python )?(?:float|double|real)s?{_BOUND}'),
    ('str', r'(?:unicode )?(?:str|string)s?(?: object| \(.*\))?'),
    ('path', r'.*\b(?:path|path-?like|file|file-?like)\b.*'),
    ('dict', r'(?:dict|dictionary|mapping|dict-?like)\b.*'),
    ('callable', r'(?:callable|function)s?\b.*'),
    ('sequence', r'(?:\d-|n-|\w+-)?(?:list|tuple|sequence|iterable)s?\b.*'),
    ('sequence', r'\((?:float|int|str|array|scalar|bool)\b[^()]*,[^()]*\)'),
    ('scalar', r'(?:scalar|number|complex)s?'),
    (
      'array',
      r'(?:.*[\s(,])?(?:array-like|array_like|ndarray|arrays?|1d-array'
      r'|(?:sparse|csr|csc|dense) (?:matrix|array)|matrix)(?:[\s,(\[].*)?',
    ),
  )
)

# Union -> class, where one member contains the others.
_CONTAINED: dict[frozenset[str | None], str] = {
  frozenset({'array', 'scalar'}): 'array',
  frozenset({'array', 'float'}): 'array',
  frozenset({'array', 'int'}): 'array',
  frozenset({'array', 'float', 'int'}): 'array',
  frozenset({'int', 'float'}): 'float',
  frozenset({'scalar'}): 'float',
  frozenset({'scalar', 'float'}): 'float',
  frozenset({'str', 'path'}): 'str',
}


def label_of(declared: str) -> str | None:
  """The class of a declared type; None where it does not map clearly."""
  core = _core(declared)
  if _RANDOM.search(core):  # 'int, RandomState instance or None'
    return 'random state'
  found = frozenset(map(_class_of, _alternatives(core)))
  # One quoted word beside a type is a special value, as None is.
  found = found - {'word'} or found
  if len(found) == 1 and found <= set(LABELS):
    return next(iter(found))
  return _CONTAINED.get(found)


def _core(declared: str) -> str:
  """Lower case, without defaults, `optional`, roles, and a trailing shape."""
  text = ' '.join(declared.lower().split())
  text = re.sub(r'[,(]?\s*\bdefaults?\b.*$', '', text)
  text = re.sub(r'[,(]?\s*\boptional\b.*$', '', text)
  text = re.sub(r':[\w:]+:`[~.]*([^`]*)`', r'\1', text)
  text = re.sub(r'(?<!`)`[~.]*|`(?!`)', '', text)
  text = re.sub(r'\b(?:numpy|np)\.(?:nd)?array\b', 'ndarray', text)
  text = _SHAPE.sub('', text)
  return text.strip(' .,;')


def _alternatives(text: str) -> Iterator[str]:
  """Splits `a, b or c` outside brackets and quotes; `{int, None}` too."""
  if re.fullmatch(_LITERALS, text):
    yield text
    return
  for part in _split(text):
    inner = re.fullmatch(r'\{([^{}]*)\}', part)
    if inner and _class_of(part) != 'choice':
      yield from _alternatives(inner[1].strip())
    elif part not in ('', 'none'):
      yield part


def _split(text: str) -> Iterator[str]:
  depth, begin, row = 0, 0, 0
  while row < len(text):
    depth += (text[row] in '([{') - (text[row] in ')]}')
    separator = re.match(r',? or |,|\|', text[row:])
    if separator and depth == 0:
      yield text[begin:row].strip()
      row += separator.end()
      begin = row
    else:
      row += 1
  yield text[begin:].strip()


def _class_of(part: str) -> str | None:
  for name, pattern in _RULES:
    if pattern.fullmatch(part):
      return name
  return None
