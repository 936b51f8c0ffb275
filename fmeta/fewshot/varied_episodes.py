"""Episodes of variable ways and unbalanced shots in one static shape.

The sampling of Meta-Dataset (Triantafillou et al. 2020,
https://arxiv.org/abs/1903.03096, section 3.2 and appendix 2): realistic tasks
have any number of classes, and more of what there is more of. Rows beyond a
task's own have weight zero, so every meta-batch has the same shapes and one
compiled program serves all of them.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fmeta.data import (
  ROW,
  Collate,
  Columns,
  check_columns,
  column,
  numeric,
  take,
)
from fmeta.draw import VARIED, random_words
from fmeta.episodes import Episode, refuse_collated, rows_by_class
from fmeta.errors import UsageError
from fmeta.fewshot.hierarchy import below_nodes, by_group


@dataclasses.dataclass(frozen=True)
class Limits:
  """How large tasks may be.

  Attributes:
    min_ways: fewest classes.
    max_ways: most classes; also the number of logits.
    max_queries: most queries per class.
    max_support: most support rows of a task.
    max_contribution: most that one class adds to the support's size.
  """

  min_ways: int = 5
  max_ways: int = 50
  max_queries: int = 10
  max_support: int = 500
  max_contribution: int = 100


class Sizes(NamedTuple):
  """A task's classes [W] (indices), queries per class and shots [W]."""

  classes: np.ndarray
  queries: int
  shots: np.ndarray


@dataclasses.dataclass(frozen=True)
class VariedEpisodes:
  """`episodes(i)` is the i-th meta-batch.

  Attributes:
    columns: the numeric columns that rows are taken from.
    members: each class's row numbers.
    pools: indices into `members`; a task's classes come from one pool.
    limits: how large tasks may be; they give the shapes.
    seed: with the index, all that a meta-batch depends on.
    tasks: tasks per meta-batch.
    collate: as for `fmeta.episodes.Episodes`.
  """

  columns: Columns
  members: tuple[np.ndarray, ...]
  pools: tuple[np.ndarray, ...]
  limits: Limits
  seed: int
  tasks: int = 1
  collate: Collate | None = None

  def _words(self, task: int) -> tuple[np.ndarray, np.ndarray]:
    """Random words of a task: for its sizes, and [max_ways, examples]."""
    ways = self.limits.max_ways
    pool = max(map(len, self.pools))
    most = max(map(len, self.members))
    used = 3 + pool + ways + ways * most
    blocks = -(-used // 4)  # A task owns whole blocks of four words.
    words = random_words(self.seed, VARIED, task * blocks, used)
    first = used - ways * most
    return words[:first], words[first:].reshape(ways, most)

  def sizes(self, task: int) -> Sizes:
    """Classes, queries and shots of the `task`-th task of the list."""
    words, _ = self._words(task)
    limits = self.limits
    pool = self.pools[int(words[0] % np.uint64(len(self.pools)))]
    most = min(limits.max_ways, len(pool))
    choices = most - limits.min_ways + 1
    ways = limits.min_ways + int(words[1] % np.uint64(choices))
    classes = pool[np.argsort(words[3 : 3 + len(pool)], kind='stable')[:ways]]
    counts = np.array([len(self.members[k]) for k in classes])
    queries = min(limits.max_queries, int((counts // 2).min()))
    log_weights = np.log(2) * (2 * _uniform(words[-limits.max_ways :]) - 1)
    beta = 1 - _uniform(words[2])  # in (0, 1]: no class contributes nothing
    shots = _shots(counts, queries, limits, beta, log_weights[:ways])
    return Sizes(classes, queries, shots)

  def rows(self, task: int) -> tuple[np.ndarray, ...]:
    """(support rows, their labels, query rows, their labels) of a task."""
    sizes, (_, words) = self.sizes(task), self._words(task)
    support, query = [], []
    for k, index in enumerate(sizes.classes):
      member = self.members[index]
      order = member[np.argsort(words[k, : len(member)], kind='stable')]
      support.append(order[: sizes.shots[k]])
      query.append(order[sizes.shots[k] :][: sizes.queries])
    return *_joined(support), *_joined(query)

  def __call__(self, i: int) -> Episode:
    """The i-th meta-batch."""
    rows = self._flat(i)
    batch = {**take(self.columns, rows.pop(ROW)), **rows}
    return self._parts(self.collate(batch) if self.collate else batch)

  def by_row(self, i: int) -> Episode:
    """The i-th meta-batch as row numbers, for `train.Resident`.

    Returns:
      `{'support': {'row', 'label', 'weight'}, 'query': ...}`.

    Raises:
      UsageError: if rows are collated, which needs the rows themselves.
    """
    refuse_collated(self.collate)
    return self._parts(self._flat(i))

  def _flat(self, i: int) -> dict[str, np.ndarray]:
    tasks = range(i * self.tasks, (i + 1) * self.tasks)
    made = [self._padded(task) for task in tasks]
    rows, label, weight = map(np.concatenate, zip(*made, strict=True))
    return {ROW: rows.astype(np.int32), 'label': label, 'weight': weight}

  def _parts(self, batch: dict[str, np.ndarray]) -> Episode:
    def part(array, which):
      return array.reshape(self.tasks, -1, *array.shape[1:])[:, which]

    cut = self.limits.max_support
    return {
      'support': {k: part(a, slice(None, cut)) for k, a in batch.items()},
      'query': {k: part(a, slice(cut, None)) for k, a in batch.items()},
    }

  def _padded(self, task: int) -> tuple[np.ndarray, ...]:
    """Rows, labels and weights: the support's, then the queries'."""
    support, label, query, asked = self.rows(task)
    limits = self.limits
    first = _padded(support, label, limits.max_support)
    last = _padded(query, asked, limits.max_ways * limits.max_queries)
    both = zip(first, last, strict=True)
    rows, labels, weight = map(np.concatenate, both)
    return rows, labels, weight


def _uniform(words: np.ndarray) -> Any:
  """In [0, 1), 53 bits."""
  return (words >> np.uint64(11)) * 2.0**-53


def _shots(
  counts: np.ndarray,
  queries: int,
  limits: Limits,
  beta: float,
  log_weights: np.ndarray,
) -> np.ndarray:
  """Support rows per class (appendix 2.2 and 2.3 of the paper)."""
  left = counts - queries
  wanted = np.ceil(beta * np.minimum(limits.max_contribution, left))
  size = min(int(wanted.sum()), limits.max_support)
  shares = np.exp(log_weights) * counts
  more = np.floor(shares / shares.sum() * (size - len(counts)))
  return np.minimum(more.astype(int) + 1, left)


def _joined(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """All rows, class by class, and their labels."""
  lengths = [len(part) for part in parts]
  labels = np.repeat(np.arange(len(parts), dtype=np.int32), lengths)
  return np.concatenate(parts), labels


def _padded(rows, labels, width) -> tuple[np.ndarray, ...]:
  """Rows, labels and weights of one length; padding repeats the first row."""
  more = width - len(rows)
  weight = np.repeat(np.array([1, 0], np.float32), [len(rows), more])
  # Label 0 is a class of every task: a loss of padding is finite.
  return (
    np.pad(rows, (0, more), constant_values=rows[0]),
    np.pad(labels, (0, more)),
    weight,
  )


def varied_episodes(
  columns: Columns,
  seed: int,
  limits: Limits | None = None,
  *,
  tasks: int = 1,
  classes: Iterable[Any] | None = None,
  key: str = 'label',
  within: str | Mapping[Any, Iterable[Any]] | None = None,
  collate: Collate | None = None,
) -> VariedEpisodes:
  """Draws tasks as Meta-Dataset does.

  Ways are uniform; a class gives min(max_queries, half of the smallest
  class) queries; the support's size is sum_k ceil(b min(max_contribution,
  rest of k)) with b uniform, at most `max_support`; beyond one row each,
  classes share it in proportion to their sizes times exp(a_k), a_k uniform in
  [log 1/2, log 2).

  Args:
    columns: N examples. String columns stay behind; any `label` is replaced.
    seed: names the list of tasks.
    limits: how large tasks may be; by default the paper's.
    tasks: tasks per meta-batch.
    classes: the values of `key` to draw from; default all.
    key: the column that names the class.
    within: a column that names groups of classes, such as `alphabet`; the
      classes of a task are then of one group (appendix 2.1, Omniglot). Or the
      nodes of a hierarchy, each with all classes below it, which may be below
      others, too: a task's classes are then below one node, and nodes with
      too few of them, of `classes` if given, are not drawn (the same place,
      ImageNet).
    collate: for example `bucket_collate()` for texts.

  Returns:
    `episodes(i) -> {'support', 'query'}`, arrays [tasks, max_support, ...] and
    [tasks, max_ways * max_queries, ...] with `label` and `weight`.

  Raises:
    UsageError: too few classes or examples, or limits that no task fits.
  """
  check_columns(columns)
  limits = Limits() if limits is None else limits
  _check_limits(limits, tasks)
  groups = rows_by_class(columns, key, classes)
  for name, rows in groups.items():
    if len(rows) < 2:
      raise UsageError(
        f'class {name!r} has {len(rows)} example(s), a support row and a query '
        'need 2; pass classes=classes_with(columns, 2)'
      )
  members = tuple(groups.values())
  pools = (np.arange(len(members)),)
  if within is not None:
    if isinstance(within, Mapping):
      known = np.unique(column(columns, key)).tolist()
      pools = below_nodes(within, list(groups), known, limits.min_ways)
    else:
      pools = by_group(groups, column(columns, within), limits.min_ways)
  if max(map(len, pools)) < limits.min_ways:
    raise UsageError(
      f'{limits.min_ways} ways need {limits.min_ways} classes, there are '
      f'{max(map(len, pools))}; lower min_ways or add classes'
    )
  return VariedEpisodes(
    numeric(columns), members, pools, limits, seed, tasks, collate
  )


def _check_limits(limits: Limits, tasks: int) -> None:
  for name, value in {**dataclasses.asdict(limits), 'tasks': tasks}.items():
    if value < 1:
      raise UsageError(f'{name} {value} is not positive; give at least 1')
  if not limits.min_ways <= limits.max_ways <= limits.max_support:
    raise UsageError(
      f'min_ways {limits.min_ways}, max_ways {limits.max_ways}, max_support '
      f'{limits.max_support} do not grow; every class needs a support row'
    )
