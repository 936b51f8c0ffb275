"""Experiment files: finding, importing and naming them."""

import ast
import importlib
import inspect
import pathlib
import sys
from types import ModuleType

from fmeta.errors import UsageError, suggest

HERE = pathlib.Path(__file__).resolve().parent


def experiments() -> list[pathlib.Path]:
  """Files of this package that define `Config` and `run(config, context)`."""
  found = []
  for path in sorted(HERE.rglob('*.py')):
    body = ast.parse(path.read_text()).body
    names = {getattr(node, 'name', None): node for node in body}
    run = names.get('run')
    if 'Config' in names and isinstance(run, ast.FunctionDef):
      # With other arguments it is what experiments have in common.
      if [each.arg for each in run.args.args] == ['config', 'context']:
        found.append(path)
  return found


def find(given: str) -> pathlib.Path:
  """The experiment file, looked for here and in the checkout.

  Raises:
    UsageError: if there is none, with the closest name that exists.
  """
  for path in (pathlib.Path(given), HERE.parent / given):
    if path.is_file():
      return path.resolve()
  known = [str(path.relative_to(HERE.parent)) for path in experiments()]
  raise UsageError(f'no experiment file {given!r}{suggest(given, known)}')


def load(source: pathlib.Path) -> ModuleType:
  """Imports an experiment file, by its package name where it has one.

  Raises:
    UsageError: if it is not Python, lacks `Config` or `run`, or `run` takes
      something else.
  """
  if source.suffix != '.py':
    raise UsageError(f'{str(source)!r} is not a Python file (*.py)')
  if source.is_relative_to(HERE):
    parts = source.relative_to(HERE.parent).with_suffix('').parts
    module = importlib.import_module('.'.join(parts))
  else:
    name = f'experiment_{source.stem}'
    module = ModuleType(name)
    module.__file__ = str(source)
    sys.modules[name] = module  # Dataclass annotations are resolved there.
    # Not through a loader, which would leave bytecode in a workdir.
    exec(compile(source.read_bytes(), source, 'exec'), vars(module))
  for needed in ('Config', 'run'):
    if not hasattr(module, needed):
      raise UsageError(
        f'{str(source)!r} has no {needed!r}; an experiment file defines '
        f'Config and run(config, context)'
      )
  try:
    inspect.signature(module.run).bind(None, None)
  except TypeError as error:
    raise UsageError(
      f'run of {str(source)!r} does not take (config, context); --list names '
      'the experiment files'
    ) from error
  return module


def name_of(source: pathlib.Path) -> str:
  """`finetune/docparams` for a file of this package, else its stem."""
  if source.is_relative_to(HERE):
    return source.relative_to(HERE).with_suffix('').as_posix()
  return source.stem


def listing() -> str:
  """One line per experiment file: its path and what it says it is."""
  docs = {}
  for path in experiments():
    doc = ast.get_docstring(ast.parse(path.read_text())) or ''
    docs[path.relative_to(HERE.parent).as_posix()] = doc.partition('\n')[0]
  width = max(map(len, docs))
  return '\n'.join(f'{k:<{width}} {v}'.rstrip() for k, v in docs.items())
