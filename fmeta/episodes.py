"""N-way K-shot episodes as pure functions of (seed, index).

Element t of meta-batch i is task `i * tasks + t` of one endless list, so the
size of the meta-batch changes neither the tasks nor their order. (With a
`collate` that pads to a bucket, the padding may differ; the examples do not.)
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
from fmeta.draw import (
  EPISODE,
  draw_without_replacement,
  random_words,
)
from fmeta.errors import UsageError, suggest

Episode = dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Episodes:
  """`episodes(i)` is the i-th meta-batch.

  Attributes:
    columns: the numeric columns that rows are taken from.
    members: int [classes, most examples], each class's row numbers.
    counts: int [classes], how many of a row of `members` are real.
    ways: classes per task.
    shots: support examples per class.
    queries: query examples per class.
    seed: with the index, all that a meta-batch depends on.
    tasks: tasks per meta-batch.
    collate: sees support and query rows of all tasks as one batch, so that
      both are padded to one width.
  """

  columns: Columns
  members: np.ndarray
  counts: np.ndarray
  ways: int
  shots: int
  queries: int
  seed: int
  tasks: int = 1
  collate: Collate | None = None

  def rows(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (support [tasks, ways*shots], query [tasks, ways*queries]).

    Class by class within a shot: any prefix of whole shots is balanced.
    """
    ways, examples = self.ways, self.shots + self.queries
    used = ways * (1 + examples)
    blocks = -(-used // 4)  # A task owns whole blocks of four words.
    words = random_words(
      self.seed, EPISODE, i * self.tasks * blocks, self.tasks * blocks * 4
    ).reshape(self.tasks, -1)
    num_classes = np.full(self.tasks, len(self.counts))
    classes = draw_without_replacement(words[:, :ways], num_classes).ravel()
    picks = draw_without_replacement(
      words[:, ways:used].reshape(-1, examples), self.counts[classes]
    )
    rows = self.members[classes[:, None], picks]
    rows = rows.reshape(self.tasks, ways, examples).transpose(0, 2, 1)
    support, query = np.split(rows, [self.shots], axis=1)
    return support.reshape(self.tasks, -1), query.reshape(self.tasks, -1)

  def __call__(self, i: int) -> Episode:
    """The i-th meta-batch."""
    support, query = self.rows(i)
    batch = take(self.columns, np.concatenate([support, query], None))
    batch['label'] = np.concatenate(
      [_labels(self.ways, support), _labels(self.ways, query)]
    )
    if self.collate:
      batch = self.collate(batch)

    def part(array, rows, start):
      shape = rows.shape + array.shape[1:]
      return array[start : start + rows.size].reshape(shape)

    return {
      'support': {k: part(a, support, 0) for k, a in batch.items()},
      'query': {k: part(a, query, support.size) for k, a in batch.items()},
    }

  def by_row(self, i: int) -> Episode:
    """The i-th meta-batch as row numbers and labels, for `train.Resident`.

    Returns:
      `{'support': {'row', 'label'}, 'query': {'row', 'label'}}`, int32.

    Raises:
      UsageError: if rows are collated, which needs the rows themselves.
    """
    refuse_collated(self.collate)

    def part(rows):
      label = _labels(self.ways, rows).reshape(rows.shape)
      return {ROW: rows.astype(np.int32), 'label': label}

    support, query = self.rows(i)
    return {'support': part(support), 'query': part(query)}


def refuse_collated(collate: Collate | None) -> None:
  """Raises `UsageError` for episodes that are made of more than rows."""
  if collate:
    raise UsageError(
      'episodes with collate= cannot be given by row; pad the columns first'
    )


def _labels(ways: int, rows: np.ndarray) -> np.ndarray:
  return np.tile(np.arange(ways, dtype=np.int32), rows.size // ways)


def episodes(
  columns: Columns,
  ways: int,
  shots: int,
  queries: int,
  seed: int,
  *,
  tasks: int = 1,
  classes: Iterable[Any] | None = None,
  key: str = 'label',
  collate: Collate | None = None,
) -> Episodes:
  """Draws tasks of `ways` classes; labels are 0..ways-1 in random class order.

  Args:
    columns: N examples. String columns stay behind; any `label` is replaced.
    ways: classes per task.
    shots: support examples per class, K.
    queries: query examples per class, disjoint from the support.
    seed: names the list of tasks.
    tasks: tasks per meta-batch.
    classes: the values of `key` to draw from; default all. A class's examples
      are drawn with equal chance, and so are the classes.
    key: the column that names the class, of integers or strings.
    collate: for example `bucket_collate()` for texts.

  Returns:
    `episodes(i) -> {'support': batch, 'query': batch}`, arrays
    [tasks, ways*shots, ...] and [tasks, ways*queries, ...].

  Raises:
    UsageError: too few classes or examples, an unknown class, or sizes < 1.
  """
  check_columns(columns)
  sizes = {'ways': ways, 'shots': shots, 'queries': queries, 'tasks': tasks}
  for name, value in sizes.items():
    if not isinstance(value, int | np.integer):
      raise UsageError(f'{name} {value!r} is no integer; give at least 1')
    if value < 1:
      raise UsageError(f'{name} {value} is not positive; give at least 1')
  groups = rows_by_class(columns, key, classes)
  _check_enough(groups, ways, shots, queries)
  counts = np.array([len(rows) for rows in groups.values()])
  members = np.zeros((len(groups), counts.max()), np.int64)
  for index, rows in enumerate(groups.values()):
    members[index, : len(rows)] = rows
  return Episodes(
    numeric(columns),
    members,
    counts,
    ways,
    shots,
    queries,
    seed,
    tasks,
    collate,
  )


def rows_by_class(
  columns: Columns, key: str, classes: Iterable[Any] | None
) -> dict[Any, np.ndarray]:
  """Class -> its row numbers, classes in sorted or in the given order."""
  values, codes = np.unique(column(columns, key), return_inverse=True)
  order = np.argsort(codes, kind='stable')
  splits = np.split(order, np.cumsum(np.bincount(codes))[:-1])
  groups = dict(zip(values.tolist(), splits, strict=True))
  if classes is None:
    return groups
  # Through numpy, so that np.int64(3) and 3 are the same class.
  wanted = list(dict.fromkeys(np.asarray(list(classes)).tolist()))
  for name in wanted:
    if name not in groups:
      raise UsageError(
        f'no example has {key} {name!r}{suggest(str(name), map(str, groups))}'
      )
  return {name: groups[name] for name in wanted}


def _check_enough(
  groups: Mapping[Any, np.ndarray], ways: int, shots: int, queries: int
) -> None:
  if len(groups) < ways:
    raise UsageError(
      f'{ways} ways need {ways} classes, there are {len(groups)}; lower ways'
      ' or add classes'
    )
  smallest = min(groups, key=lambda name: len(groups[name]))
  if len(groups[smallest]) < shots + queries:
    raise UsageError(
      f'class {smallest!r} has {len(groups[smallest])} examples; {shots} shots'
      f' + {queries} queries need {shots + queries}: lower them or pass'
      ' classes=classes_with(columns, shots + queries)'
    )


def classes_with(
  columns: Columns, minimum: int, key: str = 'label'
) -> list[Any]:
  """The values of `key` that have at least `minimum` examples, sorted."""
  values, counts = np.unique(column(columns, key), return_counts=True)
  return values[counts >= minimum].tolist()


class EpisodeList(Sequence):
  """The first `num` tasks as a read-only list of meta-batches.

  Made when read, for 600 episodes of images would fill the memory. It can be
  called like the `Episodes` it is the beginning of, and so goes to
  `evaluate.evaluate_episodes(predict, params, episode_list, episode_list.num)`.
  """

  def __init__(self, source: Episodes, num: int):
    self.source, self.num = source, num

  def __len__(self) -> int:
    return self.num // self.source.tasks

  def __call__(self, i: int) -> Episode:
    """The i-th meta-batch of the list."""
    return self[i]

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return [self.source(i) for i in range(len(self))[index]]
    return self.source(range(len(self))[index])


def evaluation_episodes(
  columns: Columns,
  ways: int,
  shots: int,
  queries: int,
  seed: int,
  num: int = 600,
  **options: Any,
) -> EpisodeList:
  """The fixed list of tasks that every method is compared on.

  Args:
    columns: as in `episodes`.
    ways: as in `episodes`.
    shots: as in `episodes`.
    queries: as in `episodes`.
    seed: as in `episodes`.
    num: tasks in total (600: Finn et al. 2017 and most papers since).
    **options: `tasks`, `classes`, `key`, `collate` of `episodes`.

  Raises:
    UsageError: as `episodes`, or if `tasks` does not divide `num`.
  """
  source = episodes(columns, ways, shots, queries, seed, **options)
  if num < 1 or num % source.tasks:
    raise UsageError(
      f'{num} episodes do not divide into meta-batches of {source.tasks}; give'
      ' a positive multiple'
    )
  return EpisodeList(source, num)


def with_rotations(
  columns: Columns, key: str = 'label'
) -> dict[str, np.ndarray]:
  """Rotations by 90, 180 and 270 degrees as new classes: 4 N examples.

  Rotation r of class c is class `c + r * (max class + 1)` (Santoro et al.
  2016; Finn et al. 2017 train Omniglot so). Split the classes first, or a
  character's rotations land on both sides.

  Args:
    columns: `image` [N, H, H, C] and integer classes under `key`.
    key: the column that names the class.

  Raises:
    UsageError: if the images are not square.
  """
  image, label = column(columns, 'image'), column(columns, key)
  if image.ndim != 4 or image.shape[1] != image.shape[2]:
    raise UsageError(
      f'images of shape {image.shape} cannot be rotated; give [N, H, H, C]'
    )
  num_classes = int(label.max()) + 1
  out = {k: np.concatenate([np.asarray(a)] * 4) for k, a in columns.items()}
  turns = [np.rot90(image, turn, axes=(1, 2)) for turn in range(4)]
  out['image'] = np.concatenate(turns)
  shifts = [label + turn * num_classes for turn in range(4)]
  out[key] = np.concatenate(shifts).astype(label.dtype)
  return out
