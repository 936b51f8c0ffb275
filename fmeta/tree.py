"""Names, ordered patterns and the split of a parameter tree.

A leaf's name is its path joined by `/`, for example
`body/layer_0/attention/query/kernel`. A pattern is a regular expression that
must match a whole name; in an ordered list the first match wins.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from fmeta.errors import UsageError, suggest

Patterns = Sequence[tuple[str, Any]]


def key_name(path: Sequence[Any]) -> str:
  """Joins a jax key path into `a/b/c`."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator='/')


def names(tree: Any) -> list[str]:
  """Names of the leaves, in `jax.tree.leaves` order."""
  return [
    key_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


def map_with_name(fun: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  """Like `jax.tree.map`, with the leaf's name as first argument."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: fun(key_name(path), *leaves), tree, *rest
  )


def partition(
  tree: Mapping, chosen: Callable[[str], bool], prefix: str = ''
) -> tuple[dict, dict]:
  """Splits a nested dict by leaf name into (chosen, the rest).

  Both keep the names of the full tree; empty subtrees disappear. `combine`
  is the inverse.
  """
  yes, no = {}, {}
  for key, value in tree.items():
    name = f'{prefix}{key}'
    if isinstance(value, Mapping):
      inner_yes, inner_no = partition(value, chosen, name + '/')
      if inner_yes:
        yes[key] = inner_yes
      if inner_no:
        no[key] = inner_no
    else:
      (yes if chosen(name) else no)[key] = value
  return yes, no


def combine(first: Mapping, second: Mapping) -> dict:
  """Union of two nested dicts with disjoint leaves; `second` wins a clash."""
  out = dict(first)
  for key, value in second.items():
    if isinstance(value, Mapping) and isinstance(out.get(key), Mapping):
      out[key] = combine(out[key], value)
    else:
      out[key] = value
  return out


def get(tree: Mapping, name: str) -> Any:
  """The leaf or subtree with this name; `KeyError` if there is none."""
  for key, value in tree.items():
    text = str(key)
    if name == text:
      return value
    if name.startswith(text + '/') and isinstance(value, Mapping):
      return get(value, name[len(text) + 1 :])
  raise KeyError(name)


def first_match(name: str, patterns: Iterable[tuple[str, Any]]) -> int | None:
  """Index of the first pattern that matches the whole name."""
  for index, (pattern, _) in enumerate(patterns):
    if re.fullmatch(pattern, name):
      return index
  return None


def check_patterns(patterns: Iterable[str], leaf_names: Sequence[str]) -> None:
  """Refuses a pattern that matches no parameter at all.

  Raises:
    UsageError: naming the pattern and what names look like.
  """
  for pattern in patterns:
    if not isinstance(pattern, str):
      raise UsageError(
        f'{pattern!r} is no pattern; give regular expressions of names'
      )
    try:
      compiled = re.compile(pattern)
    except re.error as error:
      raise UsageError(
        f'{pattern!r} is not a regular expression: {error}'
      ) from error
    if not any(compiled.fullmatch(name) for name in leaf_names):
      raise UsageError(
        f'no parameter matches {pattern!r}{suggest(pattern, leaf_names)}'
      )


def uncovered(name: str, what: str) -> str:
  """The error of a value list that does not cover the leaf `name`."""
  return f'no pattern gives {name!r} a {what}; end the list with (".*", ...)'


def match(
  tree: Any,
  patterns: Patterns,
  *,
  what: str = 'value',
  known: Sequence[str] | None = None,
) -> Any:
  """A tree of each leaf's first matching value.

  Args:
    tree: the parameters.
    patterns: ordered `(regex, value)` pairs; they must cover every leaf.
    what: the word for `value` in an error.
    known: names that patterns may refer to, the tree's own by default; give
      those of all parameters when the tree is a part of them.

  Raises:
    UsageError: if a pattern matches nothing or a leaf is not covered.
  """
  known = names(tree) if known is None else known
  check_patterns([pattern for pattern, _ in patterns], known)

  def value_of(name, _):
    index = first_match(name, patterns)
    if index is None:
      raise UsageError(uncovered(name, what))
    return patterns[index][1]

  return map_with_name(value_of, tree)


def size(tree: Any) -> int:
  """Number of scalars in a tree."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
  """Number of bytes in a tree."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
