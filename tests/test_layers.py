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
  {'tuning', 'adapters', 'optim', 'gradients', 'penalty', 'memory', 'fisher'},
  {'learner'},
  {'losses', 'meta'},
]
CORE = set().union(*ROWS)


def modules():
  for path in sorted(ROOT.rglob('*.py')):
    parts = path.relative_to(ROOT).with_suffix('').parts
    name = '.'.join(p for p in parts if p != '__init__')
    if name:
      yield name, ast.parse(path.read_text())


def imported(syntax, top_only=False):
  nodes = syntax.body if top_only else ast.walk(syntax)
  found = set()
  for node in nodes:
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found.add(node.module)
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
  return found


def of_fmeta(syntax, **options):
  known = {name for name, _ in modules()}
  return {
    name.removeprefix('fmeta.')
    for name in imported(syntax, **options)
    if name.removeprefix('fmeta.') in known and name.startswith('fmeta.')
  }


def test_the_core_imports_only_what_comes_before_it():
  row_of = {name: k for k, row in enumerate(ROWS) for name in row}
  wrong = [
    (name, other)
    for name, syntax in modules()
    if name in CORE
    # A lazy import inside a function runs long after loading.
    for other in of_fmeta(syntax, top_only=True)
    if other not in CORE or row_of[other] > row_of[name]
  ]
  assert not wrong


def test_no_two_modules_import_each_other_at_load():
  graph = {name: of_fmeta(s, top_only=True) for name, s in modules()}

  def reaches(start):
    seen, todo = set(), set(graph[start])
    while todo:
      name = todo.pop()
      seen.add(name)
      todo |= graph[name] - seen
    return seen

  assert not [name for name in graph if name in reaches(name) - {name}]
  # A module is in a cycle if something it imports imports it again.
  cycles = [
    (name, other)
    for name in graph
    for other in graph[name]
    if other != name and name in reaches(other)
  ]
  assert not cycles


def test_only_adapters_know_flax_linen_and_only_lazily():
  for name, syntax in modules():
    if name in CORE:
      linen = {i for i in imported(syntax) if i.startswith('flax.linen')}
      assert not linen or name == 'adapters', name
      top = imported(syntax, top_only=True)
      assert not {i for i in top if i.startswith('flax.linen')}, name


def test_the_core_reads_no_flags_and_no_files():
  banned = ('absl', 'os', 'pathlib', 'io', 'logging', 'ml_collections')
  for name, syntax in modules():
    if name in CORE:
      tops = {i.partition('.')[0] for i in imported(syntax)}
      assert not tops & set(banned), name


def calls(syntax, attribute):
  return [
    node
    for node in ast.walk(syntax)
    if isinstance(node, ast.Call)
    and isinstance(node.func, ast.Attribute)
    and node.func.attr == attribute
  ]


def test_one_place_updates_parameters():
  applied = [name for name, s in modules() for _ in calls(s, 'apply_updates')]
  assert applied == ['learner']
  # Other `.update` are those of dicts and hashes, which take one argument.
  updated = [
    (name, ast.unparse(call.func))
    for name, s in modules()
    for call in calls(s, 'update')
    if len(call.args) + len(call.keywords) > 1
  ]
  assert updated == [('learner', 'optimizer.update')]
