"""A run's settings: a dataclass that flags may change, and nothing after them.

`--config.optim.lr=0.3` sets a field with the type of its annotation. The
syntax is that of `ml_collections.config_flags`, which itself runs on with
exit 0 when the file is missing, shows a traceback for an unknown field, and
wants `--config` before every `--config.field` (measured, 1.1.0, 2026-11).
"""

import copy
import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from fmeta.errors import UsageError, suggest

C = TypeVar('C')

_WORDS = {
  int: 'an integer',
  float: 'a number',
  bool: 'true or false',
  str: 'a text',
}
_BOOLEANS = {'true': True, '1': True, 'false': False, '0': False}


@dataclasses.dataclass
class Seeds:
  """Three independent sources of chance, so that each can be swept alone.

  Initialisation and data order matter alike (Dodge et al. 2020,
  https://arxiv.org/abs/2002.06305).

  Attributes:
    init: of the parameters that are not pre-trained.
    data: of the order of batches and the draw of episodes.
    train: of what a step draws: dropout, rehearsal.
  """

  init: int = 0
  data: int = 0
  train: int = 0


def override(config: Any, assignments: Iterable[tuple[str, str | None]]):
  """Sets fields of a dataclass in place, in order.

  Args:
    config: an instance of a mutable dataclass; its fields may be int, float,
      bool, str, `Literal`, tuples of these, `| None`, or another dataclass.
    assignments: `('optim.lr', '0.3')`; `('debug', None)` is a bare flag,
      which only a bool takes.

  Raises:
    UsageError: for a field that does not exist or a text of another type.
  """
  for path, text in assignments:
    holder, name = _find(config, path)
    annotation = typing.get_type_hints(type(holder))[name]
    if text is None:
      if annotation is not bool:
        raise UsageError(
          f'--config.{path} needs a value ({_describe(annotation)}): '
          f'write --config.{path}=VALUE'
        )
      text = 'true'
    setattr(holder, name, _parse(text, annotation, path))


def _find(config: Any, path: str) -> tuple[Any, str]:
  """The dataclass that owns the field, and the field's own name."""
  holder = config
  *parents, name = path.split('.')
  for part in parents:
    if not _is_field(holder, part) or not dataclasses.is_dataclass(
      getattr(holder, part)
    ):
      raise _unknown(config, path)
    holder = getattr(holder, part)
  if not _is_field(holder, name):
    raise _unknown(config, path)
  value = getattr(holder, name)
  if dataclasses.is_dataclass(value):
    inner = ', '.join(f'{path}.{field}' for field in flatten(value))
    raise UsageError(f'config.{path} holds fields; set one of them: {inner}')
  return holder, name


def _is_field(holder: Any, name: str) -> bool:
  return any(field.name == name for field in dataclasses.fields(holder))


def _unknown(config: Any, path: str) -> UsageError:
  possible = [f'config.{name}' for name in flatten(config)]
  given = f'config.{path}'
  return UsageError(f'no field {given!r}{suggest(given, possible, limit=20)}')


def _parse(text: str, annotation: Any, path: str) -> Any:
  """Reads `text` as a value of the annotated type."""
  try:
    return _read(text, annotation)
  except ValueError as error:
    raise UsageError(
      f'config.{path} is {_describe(annotation)}, not {text!r}'
    ) from error


def _read(text: str, annotation: Any) -> Any:
  """Like `_parse`; any misfit is a ValueError."""
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    return _read_union(text, args)
  if origin is typing.Literal:
    return {str(choice): choice for choice in args}[_among(text, args)]
  if annotation is tuple or origin is tuple:
    return _read_tuple(text, args or (str, ...))
  if annotation is bool:
    return _BOOLEANS[_among(text.lower(), _BOOLEANS)]
  if annotation is float and math.isnan(float(text)):
    raise ValueError('a setting that is not a number')
  if annotation in (int, float, str):
    return annotation(text)
  raise ValueError(f'{annotation} cannot be written on a command line')


def _among(text: str, choices: Iterable[Any]) -> str:
  if text not in map(str, choices):
    raise ValueError(text)
  return text


def _read_union(text: str, options: tuple) -> Any:
  if type(None) in options and text.lower() == 'none':
    return None
  for option in options:
    if option is not type(None):
      try:
        return _read(text, option)
      except ValueError:
        continue
  raise ValueError(text)


def _read_tuple(text: str, args: tuple) -> tuple:
  """`1,2`, `(1, 2)`, `[1,2]` or nothing at all."""
  text = text.strip()
  if text[:1] + text[-1:] in ('()', '[]'):
    text = text[1:-1]
  parts = [part.strip().strip('\'"') for part in text.split(',')]
  if parts[-1] == '':  # Of '', or of the comma that ends '(1,)'.
    parts.pop()
  if args[-1] is ...:
    args = (args[0],) * len(parts)
  if len(args) != len(parts):
    raise ValueError(text)
  return tuple(map(_read, parts, args))


def _describe(annotation: Any) -> str:
  """The type in the words of an error message."""
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    some = [_describe(arg) for arg in args if arg is not type(None)]
    return ' or '.join(some + ['none'] * (type(None) in args))
  if origin is typing.Literal:
    return 'one of ' + ', '.join(map(str, args))
  if annotation is tuple or origin is tuple:
    args = args or (str, ...)
    if args[-1] is ...:
      return f'a list like a,b of items each {_describe(args[0])}'
    return f'a list of {len(args)}: ' + ', '.join(map(_describe, args))
  return _WORDS.get(annotation, 'not settable from the command line')


def flatten(config: Any) -> dict[str, Any]:
  """Name -> value of every field, nested ones as `optim.lr`."""
  flat = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      for name, inner in flatten(value).items():
        flat[f'{field.name}.{name}'] = inner
    else:
      flat[field.name] = value
  return flat


def to_json(config: Any) -> dict[str, Any]:
  """The nested plain values of a config, as `config.json` holds them."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(config: C, stored: Mapping[str, Any], prefix: str = '') -> C:
  """Sets a default config's fields to the stored ones and returns it.

  Raises:
    UsageError: if `stored` has a field that the config has not; one that is
      missing from `stored` keeps its default.
  """
  for name, value in stored.items():
    if not _is_field(config, name):
      raise UsageError(
        f'the stored config has a field {prefix + name!r} that the '
        f'experiment file does not know; resume with the file it started with'
      )
    current = getattr(config, name)
    if dataclasses.is_dataclass(current):
      from_json(current, value, f'{prefix}{name}.')
    else:
      setattr(config, name, _tuples(value))
  return config


def _tuples(value: Any) -> Any:
  # JSON has only lists; a config has only tuples.
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def first_difference(stored: Mapping, given: Mapping) -> str | None:
  """The first field that differs, as one clause, or None.

  Args:
    stored: what `config.json` holds.
    given: `to_json` of the config at hand.
  """
  old, new = _leaves(stored), _leaves(given)
  for name in old | new:
    before, now = old.get(name, 'absent'), new.get(name, 'absent')
    if before != now:
      return f'config.{name} was {before!r} and is now {now!r}'
  return None


def _leaves(tree: Mapping, prefix: str = '') -> dict[str, Any]:
  flat = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      flat |= _leaves(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat


def freeze(config: C) -> C:
  """Makes a config and the configs in it refuse assignment, and returns it.

  The object stays itself (`isinstance`, methods and properties work);
  `dataclasses.replace` and `copy.deepcopy` give a mutable one again.
  """
  for field in dataclasses.fields(typing.cast(Any, config)):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      freeze(value)
  if not getattr(type(config), '_frozen', False):
    config.__class__ = _frozen(type(config))
  return config


def _again(cls: type, fields: dict) -> Any:
  return freeze(cls(**fields))


@functools.cache
def _frozen(cls: type) -> type:
  """A subclass of the same layout that can only be read."""

  def refuse(self, name, *value):
    del self, value
    raise dataclasses.FrozenInstanceError(
      f'config.{name} is fixed once the flags are read; '
      f'dataclasses.replace gives a copy that can be changed'
    )

  return type(
    cls.__name__,
    (cls,),
    {
      '__slots__': (),
      '__module__': cls.__module__,
      '__qualname__': cls.__qualname__,
      '__new__': lambda _, *args, **kwargs: cls(*args, **kwargs),
      '__setattr__': refuse,
      '__delattr__': refuse,
      # A process started anew knows the class of the file, not this one.
      '__reduce__': lambda self: (_again, (cls, dict(vars(self)))),
      '__deepcopy__': lambda self, memo: cls(**copy.deepcopy(vars(self), memo)),
      '_frozen': True,
    },
  )
