"""Checkpoints through Orbax; the only module that knows it.

A checkpoint is a folder `steps/<step>` with

  state   the train state without frozen leaves, {name: array}
  best    the best trainable leaves and model state so far, {name: array}

and small JSON in its metadata: position, seed, patience, accuracy matrix.
`frozen/<fingerprint>` describes frozen leaves by their digests and holds those
that no other such folder has: what phases freeze is written once. Arrays are
stored by name, so a checkpoint can be read without the code that made it,
and restored onto any number of devices. Orbax writes into a temporary folder
and renames it, so a process killed during a save leaves the previous
checkpoint as the last one.

Uses `orbax.checkpoint.v1`, the announced API (2026-11).
"""

import hashlib
import pathlib
from collections.abc import Mapping, Set
from typing import Any

import jax
import numpy as np

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.mesh import gather_to_host

Named = dict[str, jax.Array]


def by_name(arrays: Any) -> Named:
  """A tree's leaves by name."""
  return dict(zip(tree.names(arrays), jax.tree.leaves(arrays), strict=True))


def like(target: Any, named: Mapping[str, Any]) -> Any:
  """The tree shaped like `target` with leaves from `named`."""
  return tree.map_with_name(lambda name, _: named[name], target)


def digests(arrays: Any) -> dict[str, str]:
  """sha256 of every leaf's dtype, shape and bytes, by name."""

  def digest(x):
    head = f'{x.dtype.name}{x.shape}'.encode()
    return hashlib.sha256(head + np.ascontiguousarray(x).tobytes()).hexdigest()

  whole = by_name(gather_to_host(arrays))
  return {name: digest(leaf) for name, leaf in whole.items()}


def fingerprint(of: Mapping[str, str]) -> str:
  """One sha256 over the names and digests of `digests`."""
  lines = ''.join(f'{name} {of[name]}\n' for name in sorted(of))
  return hashlib.sha256(lines.encode()).hexdigest()


def _describe(leaf: Any) -> str:
  if leaf is None:
    return 'absent'
  return f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'


def require_same(saved: Mapping, wanted: Mapping, where: object) -> None:
  """Refuses a checkpoint of another model or tuning.

  Raises:
    UsageError: naming the first leaf whose shape or dtype differs.
  """
  for name in [*wanted, *(n for n in saved if n not in wanted)]:
    there, here = _describe(saved.get(name)), _describe(wanted.get(name))
    if there != here:
      raise UsageError(
        f'{where} is of another model, tuning or optimizer: {name!r} is '
        f'{there} there and {here} here; use the settings it was made with, '
        'or another workdir'
      )


def _abstract(arrays: Any) -> Any:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    arrays,
  )


def _is_fingerprint(name: str) -> bool:
  # Beside them may lie what a killed save has left.
  return len(name) == 64 and set(name) <= set('0123456789abcdef')


class Checkpoints:
  """The checkpoints of one run.

  Args:
    folder: made if needed.
    keep: how many of the latest are kept.
  """

  def __init__(self, folder: pathlib.Path, keep: int = 2):
    from orbax.checkpoint import v1 as ocp

    # Untyped: its annotations want internal path types.
    self._ocp: Any = ocp
    self.folder = pathlib.Path(folder).absolute()
    policies = self._ocp.training.preservation_policies
    self._steps = self._ocp.training.Checkpointer(
      self.folder / 'steps',
      preservation_policy=policies.LatestN(keep),
      cleanup_tmp_directories=True,
    )

  def latest(self) -> int | None:
    """The last committed step."""
    latest = self._steps.latest
    return None if latest is None else latest.step

  def path(self, step: int) -> pathlib.Path:
    """Where a step's checkpoint is."""
    return self.folder / 'steps' / str(step)

  def save(self, step: int, state: Any, host: dict, best: Any = None) -> None:
    """Starts a save; it returns when the arrays may be donated."""
    items = {'state': by_name(state)}
    if best is not None:
      items['best'] = by_name(best)
    self._steps.save_checkpointables_async(
      step, items, force=True, custom_metadata=host
    )

  def host(self, step: int) -> dict:
    """The JSON of a checkpoint."""
    metadata = self._steps.checkpointables_metadata(step)
    return dict(metadata.custom_metadata or {})

  def restore(self, step: int, state: Any, best: Any) -> tuple[Any, Any]:
    """Loads onto the shardings of `state` and `best`.

    Returns:
      The state, and the best leaves or None if none were saved.

    Raises:
      UsageError: if a leaf is missing, superfluous or of another shape.
    """
    metadata = self._steps.checkpointables_metadata(step).metadata
    wanted = {'state': by_name(state)}
    if 'best' in metadata:
      wanted['best'] = by_name(best)
    for item, leaves in wanted.items():
      require_same(metadata[item], leaves, f'checkpoint {self.path(step)}')
    found = self._steps.load_checkpointables(step, _abstract(wanted))
    loaded = like(state, found['state'])
    return loaded, like(best, found['best']) if 'best' in found else None

  def save_frozen(self, frozen: Any, of: Mapping[str, str]) -> None:
    """Writes frozen leaves unless they are there; `of` are their digests."""
    folder = self.folder / 'frozen' / fingerprint(of)
    if not of or folder.exists():
      return
    held = self._held()
    leaves = by_name(frozen)
    new = {name: leaves[name] for name in of if (name, of[name]) not in held}
    # Orbax refuses an item without a leaf.
    items = {'leaves': new} if new else {'none': {'leaves': 0}}
    self._ocp.save_checkpointables(folder, items, custom_metadata=dict(of))

  def _held(self) -> dict[tuple[str, str], pathlib.Path]:
    """(name, digest) -> folder of every frozen leaf that is stored."""
    held = {}
    for folder in sorted((self.folder / 'frozen').glob('*')):
      if not _is_fingerprint(folder.name):
        continue
      metadata = self._ocp.checkpointables_metadata(folder)
      of = metadata.custom_metadata or {}
      for name in metadata.metadata.get('leaves', {}):
        held[name, of[name]] = folder
    return held

  def load_frozen(self, saved: str, target: Any, fixed: Set[str]) -> Any:
    """Loads frozen leaves of fingerprint `saved` onto those of `target`.

    Args:
      saved: from the host part of a checkpoint.
      target: gives structure and shardings.
      fixed: names that keep the values of `target`.
    """
    found = by_name(target)
    wanted = set(found) - set(fixed)
    if not wanted:
      return target
    folder = self.folder / 'frozen' / saved
    there = self._ocp.checkpointables_metadata(folder).custom_metadata or {}
    held, sources = self._held(), {}
    for name in sorted(wanted):
      source = held.get((name, there.get(name, '')))
      if source is None:
        raise UsageError(
          f'checkpoint {self.folder} does not hold the frozen {name!r}; use '
          'the settings it was made with, or another workdir'
        )
      sources.setdefault(source, {})[name] = found[name]
    for source, leaves in sources.items():
      found |= self._load_leaves(source, leaves)
    return like(target, found)

  def _load_leaves(self, folder: pathlib.Path, leaves: Named) -> Named:
    context = self._ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
      loaded = self._ocp.load_checkpointables(
        folder, {'leaves': _abstract(leaves)}
      )
    return loaded['leaves']

  def require_frozen(self, saved: str, of: Mapping[str, str]) -> None:
    """Refuses other frozen values than those of fingerprint `saved`.

    Raises:
      UsageError: naming the first leaf that differs.
    """
    if fingerprint(of) == saved:
      return
    folder = self.folder / 'frozen' / saved
    there = {}
    if folder.exists():
      metadata = self._ocp.checkpointables_metadata(folder)
      there = dict(metadata.custom_metadata or {})
    names = [*of, *(name for name in there if name not in of)]
    first = next((n for n in names if of.get(n) != there.get(n)), '')
    raise UsageError(
      f'checkpoint {self.folder} has other frozen parameters: {first!r} '
      'differs; start from the same pre-trained model, or use another workdir'
    )

  def wait(self) -> None:
    """Waits until the last save is committed."""
    self._steps.wait()

  def close(self) -> None:
    """Waits and closes."""
    self._steps.close()
