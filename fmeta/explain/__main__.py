"""A finished run explains itself.

  python -m fmeta.explain WORKDIR
  python -m fmeta.explain WORKDIR --examples=FILE --limit=500

writes `WORKDIR/explain.html` and `explain_*.png`. FILE has lines
`label<TAB>text`; by default it is `WORKDIR/examples.tsv`. The weights that the
run started from are those that `WORKDIR/explain.json` names; for a run without
that file give --start=SOURCE (see `fmeta.pretrained.find`) and the --seed that
drew its head. Bad input is one line on stderr and exit 2.
"""

import argparse
import html
import pathlib
import sys
from collections.abc import Sequence

from fmeta import explain, predict, result
from fmeta.errors import UsageError
from fmeta.explain import recipe as recipes
from fmeta.explain import text
from fmeta.explain.page import Example, Page


class _Parser(argparse.ArgumentParser):
  def error(self, message: str):
    """One line, where argparse would print its usage before it."""
    raise UsageError(f'{message}; usage: {self.prog} WORKDIR [--examples=FILE]')


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = _Parser('python -m fmeta.explain', description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument('workdir', help='of a run that saved a model')
  parser.add_argument('--examples', help='lines label<TAB>text')
  parser.add_argument('--limit', type=int, default=256, help='examples used')
  parser.add_argument('--start', help='pre-trained weights the run began with')
  parser.add_argument('--seed', type=int, default=0, help='of its fresh head')
  parser.add_argument(
    '--attributions', type=int, default=6, help='examples explained by token'
  )
  options = parser.parse_args(argv)
  for name, least in (('limit', 2), ('attributions', 0)):
    if getattr(options, name) < least:
      raise UsageError(
        f'--{name}={getattr(options, name)}; give at least {least}'
      )
  return options


def _recipe(options: argparse.Namespace) -> explain.Recipe:
  stored = recipes.load(options.workdir)
  if options.start:
    rest = stored or explain.Recipe('', 0)
    return rest._replace(source=options.start, seed=options.seed)
  if stored is None:
    raise UsageError(
      f'{options.workdir} has no {recipes.RECIPE}, so what it started from is '
      'not known; give --start=SOURCE and --seed=N'
    )
  return stored


def explain_run(options: argparse.Namespace) -> list[pathlib.Path]:
  """Measures a run and writes its page."""
  workdir = pathlib.Path(options.workdir)
  run = predict.load_run(workdir)
  recipe = _recipe(options)
  path = pathlib.Path(options.examples or workdir / text.EXAMPLES)
  texts, labels = text.read_examples(path, run.labels, options.limit)
  start = recipes.start_of(recipe, len(run.labels))
  case = text.case_of(run, start, texts, labels, recipe)
  measured = explain.measure(case)
  page = Page(
    title=f'What fine-tuning changed: {workdir.resolve().name}',
    labels=run.labels,
    examples=[Example(html.escape(example)) for example in texts],
    explained=text.explained(run, texts, measured, options.attributions),
    facts={
      'run': workdir,
      'start': f'{recipe.source}, head of seed {recipe.seed}',
      'examples': f'{path}, the first {len(texts)}',
      'commit': result.commit(),
      'versions': ', '.join(f'{k} {v}' for k, v in result.versions().items()),
    },
    recipe=recipe,
  )
  return explain.write(workdir, measured, page)


def main(argv: Sequence[str]) -> int:
  """Explains a run; returns the exit status."""
  try:
    for path in explain_run(_parse(argv)):
      print(path)
  except UsageError as error:
    print('error:', ' '.join(str(error).splitlines()), file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
