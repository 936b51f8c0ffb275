"""Imports run one way, and one place in the package updates parameters."""

import ast
import pathlib

import fmeta

ROOT = pathlib.Path(fmeta.__file__).parent

# A module imports from rows above its own, or from its own row where the
# graph of all modules stays free of cycles.
ROWS = [
  {'errors'},
  {'types'},
  {'tree'},
  {'blocks'},
  {'tuning', 'adapters', 'optim', 'gradients', 'penalty', 'memory', 'fisher'}
  | {'averaging', 'mixout', 'sharpness', 'through'},
  {'per_leaf', 'phases', 'retune', 'surgical'},
  {'learner'},
  {'losses', 'meta', 'meta_safe', 'mixing', 'regularise', 'reporting'},
]
CORE = set().union(*ROWS)


def area(name):
  """The file or folder of `fmeta/` that a module is or lies in."""
  return name.partition('.')[0]


def _read():
  for path in sorted(ROOT.rglob('*.py')):
    parts = path.relative_to(ROOT).with_suffix('').parts
    name = '.'.join(p for p in parts if p != '__init__')
    if name:
      yield name, ast.parse(path.read_text())


MODULES = dict(_read())


def imported(syntax, top_only=False):
  nodes = syntax.body if top_only else ast.walk(syntax)
  found = set()
  for node in nodes:
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        inner = f'{node.module}.{alias.name}'
        # `from package import module` is an import of the module.
        is_module = inner.removeprefix('fmeta.') in MODULES
        found.add(inner if is_module else node.module)
  return found


def of_fmeta(syntax, **options):
  names = {
    name.removeprefix('fmeta.')
    for name in imported(syntax, **options)
    if name.startswith('fmeta.')
  }
  return names & set(MODULES)


def test_the_core_imports_only_what_comes_before_it():
  row_of = {name: k for k, row in enumerate(ROWS) for name in row}
  wrong = [
    (name, other)
    for name, syntax in MODULES.items()
    if area(name) in CORE
    # A lazy import inside a function runs long after loading.
    for other in of_fmeta(syntax, top_only=True)
    if area(other) not in CORE or row_of[area(other)] > row_of[area(name)]
  ]
  assert not wrong


def test_no_two_modules_import_each_other_at_load():
  graph = {k: of_fmeta(s, top_only=True) - {k} for k, s in MODULES.items()}

  def reached(start):
    seen, todo = set(), set(graph[start])
    while todo:
      name = todo.pop()
      seen.add(name)
      todo |= graph[name] - seen
    return seen

  assert not [name for name in graph if name in reached(name)]
  assert 'types' in reached('meta')


def test_importing_data_loads_neither_matplotlib_nor_scikit_learn():
  seen, todo = set(), {'data'}
  while todo:
    name = todo.pop()
    seen.add(name)
    todo |= of_fmeta(MODULES[name], top_only=True) - seen
  loaded = {
    other.partition('.')[0]
    for name in seen
    for other in imported(MODULES[name], top_only=True)
  }
  assert 'data.splits' in seen and 'numpy' in loaded
  assert not loaded & {'matplotlib', 'sklearn'}


def test_only_adapters_know_flax_linen_and_only_lazily():
  for name, syntax in MODULES.items():
    if area(name) in CORE:
      linen = {i for i in imported(syntax) if i.startswith('flax.linen')}
      assert not linen or area(name) == 'adapters', name
      top = imported(syntax, top_only=True)
      assert not {i for i in top if i.startswith('flax.linen')}, name


def test_the_core_reads_no_flags_and_no_files():
  banned = ('absl', 'os', 'pathlib', 'io', 'logging', 'ml_collections')
  for name, syntax in MODULES.items():
    if area(name) in CORE:
      tops = {i.partition('.')[0] for i in imported(syntax)}
      assert not tops & set(banned), name


def _is_call(node, attribute):
  return (
    isinstance(node, ast.Call)
    and isinstance(node.func, ast.Attribute)
    and node.func.attr == attribute
  )


def test_one_place_updates_parameters():
  applied = [
    name
    for name, syntax in MODULES.items()
    for node in ast.walk(syntax)
    if _is_call(node, 'apply_updates')
  ]
  assert applied == ['learner']
  # An optax update gives (updates, state); that of a dict gives nothing.
  updated = [
    (name, ast.unparse(node.value.func))
    for name, syntax in MODULES.items()
    for node in ast.walk(syntax)
    if isinstance(node, ast.Assign | ast.Return)
    and _is_call(node.value, 'update')
  ]
  # A transformation around another one hands the gradient on to it.
  wrapped = [
    ('continual.plasticity.backprop', 'inner_optimizer.update'),
    ('continual.prompts.tasks', 'inner.update'),
    ('per_leaf', 'inner.update'),
  ]
  assert sorted(updated) == sorted([('learner', 'optimizer.update'), *wrapped])
