"""The page that compares methods on one stream of tasks."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmeta import metrics
from fmeta.errors import UsageError, suggest
from fmeta.report import sheet, stream_tables
from fmeta.report.costs import Point, against_cost
from fmeta.report.matrices import heatmaps
from fmeta.report.page import fact
from fmeta.report.progress import averages, over_time
from fmeta.report.runs import Method
from fmeta.report.style import Picture


class Section(NamedTuple):
  """A heading, tables or text as HTML, and a picture with its file's name."""

  title: str
  body: str
  picture: Picture | None = None
  file: str = ''


def write_streams(
  path: str | pathlib.Path,
  methods: Mapping[str, Method],
  tasks: Sequence[str],
  *,
  reference: str | None = None,
  facts: Mapping[str, Any] | None = None,
) -> list[pathlib.Path]:
  """Writes the page, best methods first, and its pictures as PNG beside it.

  Args:
    path: the HTML file.
    methods: name -> what was measured, from `runs.read_runs`.
    tasks: names in the order of the stream.
    reference: the method that differences are taken from; by default the one
      with the lowest average accuracy of those that learn task after task.
    facts: what the numbers depend on.

  Raises:
    UsageError: an unknown reference, or no method with a matrix.
  """
  path = pathlib.Path(path)
  order = sorted(methods, key=lambda name: -_average(methods[name]))
  methods = {name: methods[name] for name in order}
  reference = _reference(methods, reference)
  sections = _sections(methods, tasks, reference)
  written = [path]
  for section in sections:
    if section.picture is not None:
      picture = path.with_name(f'{path.stem}_{section.file}.png')
      picture.write_bytes(section.picture.png)
      written.append(picture)
  body = ''.join(map(_section, sections)) + _facts(facts or {})
  title = f'{len(methods)} methods on a stream of {len(tasks)} tasks'
  path.write_text(sheet.document(title, body), encoding='utf-8')
  return written


def _average(method: Method) -> float:
  return float(np.mean(list(method.finals.values())))


def _reference(methods: Mapping[str, Method], given: str | None) -> str:
  learned = [name for name, method in methods.items() if method.matrices]
  if not learned:
    raise UsageError(
      'no method learns task after task; give a run with a matrix [T, T]'
    )
  if given is None:
    return learned[-1]
  if given not in learned:
    raise UsageError(f'no method {given!r}{suggest(given, learned, limit=12)}')
  return given


def _sections(methods, tasks, reference: str) -> list[Section]:
  learned = {k: m for k, m in methods.items() if m.matrices}
  runs = {k: list(m.matrices.values()) for k, m in learned.items()}
  means = {k: np.mean(v, axis=0) for k, v in runs.items()}
  achieved = stream_tables.achieved(methods, tasks, reference)
  return [
    Section('What the methods achieve', achieved, averages(runs), 'averages'),
    _cost_section(methods),
    Section('Each task over time', '', _over_time(learned, tasks), 'tasks'),
    Section(
      'Accuracy after each task, mean over seeds (%)',
      '',
      heatmaps(means, tasks),
      'matrices',
    ),
  ]


def _cost_section(methods: Mapping[str, Method]) -> Section:
  points, label = _points(methods)
  picture = against_cost(points, cost=label) if points else None
  return Section('What they cost', stream_tables.cost(methods), picture, 'cost')


def _points(methods: Mapping[str, Method]) -> tuple[list[Point], str]:
  """Forgetting against FLOPs where all have them, else against seconds."""
  learned = {k: m for k, m in methods.items() if m.matrices}
  by_flops = all(method.cost.flops for method in learned.values())
  points = []
  for name, method in learned.items():
    spent = method.cost.flops if by_flops else method.cost.seconds
    lost = [
      metrics.forgetting_chaudhry(matrix)
      for matrix in method.matrices.values()
      if len(matrix) > 1
    ]
    if spent and lost:
      ends = metrics.mean_t(lost).ci95 if len(lost) > 1 else None
      points.append(Point(name, spent, float(np.mean(lost)), ends))
  return points, 'FLOPs of training' if by_flops else 'seconds of training'


def _over_time(learned: Mapping[str, Method], tasks: Sequence[str]) -> Picture:
  """Of frequent evaluations if all have them at the same steps."""
  curves = [c for m in learned.values() for c in m.curves.values()]
  runs = sum(len(method.matrices) for method in learned.values())
  if len(curves) == runs and all(
    np.array_equal(c.steps, curves[0].steps)
    and np.array_equal(c.ends, curves[0].ends)
    for c in curves
  ):
    return over_time(
      {k: [c.accuracy for c in m.curves.values()] for k, m in learned.items()},
      tasks,
      steps=curves[0].steps.tolist(),
      ends=curves[0].ends.tolist(),
    )
  return over_time(
    {k: list(m.matrices.values()) for k, m in learned.items()}, tasks
  )


def _section(section: Section) -> str:
  picture = '' if section.picture is None else sheet.image(section.picture)
  return (
    f'<section>\n<h2>{sheet.safe(section.title)}</h2>\n{picture}'
    f'{section.body}</section>\n'
  )


def _facts(facts: Mapping[str, Any]) -> str:
  if not facts:
    return ''
  listed = ''.join(
    f'<dt>{sheet.safe(name)}</dt><dd>{sheet.safe(fact(value))}</dd>\n'
    for name, value in facts.items()
  )
  return (
    '<section>\n<h2>What the numbers depend on</h2>\n'
    f'<dl class="facts">\n{listed}</dl>\n</section>\n'
  )
