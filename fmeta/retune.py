"""What crosses a phase boundary: leaves move by name, slots go with them.

The learner of the next phase makes a state of its own, and everything in it
that was there before is put back under its name. What is left is the birth of
new leaves and the fresh optimiser state of leaves that thaw.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.types import Array, Learner, Params, TrainState

Named = dict[str, Any]


def retune(
  state: TrainState, old: Learner, new: Learner, rng: Array
) -> TrainState:
  """The state of one phase as the state that the next one starts from.

  - Parameters keep their values. Leaves that the old tuning added (LoRA's
    factors) go on if the new one adds them too; otherwise they are merged
    into their kernels. Leaves that only the new one adds are born from `rng`.
  - Optimiser slots of a leaf that goes on are the same arrays. A leaf that
    thaws starts afresh; the slots of one that freezes are dropped.
  - A number that the optimiser keeps beside slots (Adam's count) goes on with
    them; it is refused when some of its leaves go on and others thaw. A
    number on its own (the count of a schedule) goes on always.
  - What a penalty knows of a leaf that freezes waits in `dormant`.

  What goes by another name in the new optimiser's or penalty's state starts
  afresh.

  Args:
    state: of `old`.
    old: the learner of the phase that ends.
    new: that of the phase that begins, for the same model.
    rng: key for leaves that are born.

  Raises:
    UsageError: if a shared count would be wrong for a leaf that thaws, added
      leaves can neither go on nor be merged, a leaf changes its shape, or a
      memory would be lost.
  """
  base, kept = _parameters(state, old, new, rng)
  fresh = new.init(base, rng, state.model_state)
  before = set(tree.names(state.trainable))
  penalty_state, dormant = _remembered(
    {**state.dormant, **_named(state.penalty_state)}, fresh.penalty_state
  )
  return fresh.replace(
    step=state.step,
    trainable=_put_back(kept, fresh.trainable),
    frozen=_put_back(kept, fresh.frozen),
    opt_state=carried_slots(state.opt_state, before, fresh),
    penalty_state=penalty_state,
    memory=_memory(state.memory, fresh.memory),
    dormant=dormant,
  )


def _named(arrays: Any) -> Named:
  return dict(zip(tree.names(arrays), jax.tree.leaves(arrays), strict=True))


def _alike(there: Any, here: Any) -> bool:
  if there is None:
    return False
  # Not attributes: an optimiser may be given a Python number (`set_hyper`).
  return _kind(there) == _kind(here)


def _kind(leaf: Any) -> str:
  return f'{jnp.result_type(leaf)}{list(jnp.shape(leaf))}'


def _parameters(
  state: TrainState, old: Learner, new: Learner, rng: Array
) -> tuple[Params, Named]:
  """What `new.init` is given, and the values that hold whatever it makes."""
  union = tree.combine(state.frozen, state.trainable)
  full = set(tree.names(jax.eval_shape(old.params, state)))
  added = {name for name in tree.names(union) if name not in full}
  base = tree.partition(union, full.__contains__)[0]
  if added:
    made = jax.eval_shape(new.init, base, rng, state.model_state)
    names = {*tree.names(made.trainable), *tree.names(made.frozen)}
    if not added <= names:
      _require_mergeable(added, names, full)
      union = base = old.params(state)
      added = set()
  # An adapter may set its kernel when it is born: the kernel goes on as well.
  owners = {name.rpartition('.')[0] for name in added}
  kept = added | owners | set(tree.names(state.trainable))
  return base, {n: leaf for n, leaf in _named(union).items() if n in kept}


def _require_mergeable(added: set, names: set, full: set) -> None:
  stay = sorted(added & names)
  gone = sorted(added - names)
  if stay:
    raise UsageError(
      f'the next phase adds {stay[0]!r} as this one does, but not {gone[0]!r}; '
      'give both phases the same adapters, or adapters without a common leaf'
    )
  for name in gone:
    if name.rpartition('.')[0] not in full:
      raise UsageError(
        f'the next phase does not know {name!r}, which belongs to no kernel it '
        'could be merged into; give that phase the same adapters'
      )


def _put_back(kept: Mapping[str, Any], fresh: Params) -> Params:
  def value(name, leaf):
    if name not in kept:
      return leaf
    if not _alike(kept[name], leaf):
      raise UsageError(
        f'{name!r} is {_kind(kept[name])} in one phase and {_kind(leaf)} in '
        'the next; give both the same shape'
      )
    return kept[name]

  return tree.map_with_name(value, fresh)


def parameter_of(name: str, params: set[str]) -> str | None:
  """The longest trailing path of a leaf's name that names a parameter."""
  while name and name not in params:
    name = name.partition('/')[2]
  return name or None


def _goes_on(
  there: Named, here: Named, before: set[str], after: set[str]
) -> dict[str, dict[str, bool]]:
  """Folder of slots -> parameter -> whether all its slots are there.

  Adam's `1/count`, `1/mu/<parameter>` and `1/nu/<parameter>` are of folder 1.
  """
  folders = {}
  for name, leaf in here.items():
    parameter = parameter_of(name, after)
    if parameter is not None:
      folder = folders.setdefault(_folder(name, parameter), {})
      found = parameter in before and _alike(there.get(name), leaf)
      folder[parameter] = folder.get(parameter, True) and found
  return folders


def _folder(name: str, parameter: str | None = None) -> str:
  if parameter is not None:
    name = name.removesuffix(parameter).removesuffix('/')
  return name.rpartition('/')[0]


def carried_slots(old_state: Any, before: set[str], fresh: TrainState) -> Any:
  """The fresh optimiser state with what goes on put back.

  Args:
    old_state: of the optimiser so far.
    before: names of the trainable leaves that go on.
    fresh: as `learner.init` makes it.

  Raises:
    UsageError: as `retune`, for a count that some leaves share.
  """
  after = set(tree.names(fresh.trainable))
  there, here = _named(old_state), _named(fresh.opt_state)
  folders = _goes_on(there, here, before, after)

  def value(name, leaf):
    parameter = parameter_of(name, after)
    if parameter is not None:
      same = folders[_folder(name, parameter)][parameter]
    else:
      beside = folders.get(_folder(name), {})
      _require_one_age(name, beside)
      same = all(beside.values()) and _alike(there.get(name), leaf)
    return there[name] if same else leaf

  return tree.map_with_name(value, fresh.opt_state)


def _require_one_age(name: str, beside: Mapping[str, bool]) -> None:
  on = sorted(p for p, same in beside.items() if same)
  thawed = sorted(p for p, same in beside.items() if not same)
  if on and thawed:
    raise UsageError(
      f'the optimizer keeps one {name!r} for {on[0]!r}, which goes on, and '
      f'{thawed[0]!r}, which thaws and would take steps of a wrong size; give '
      'each leaf its own: fmeta.per_leaf(transformation), or '
      'fmeta.adamw_per_leaf for adamw'
    )


def _remembered(there: Named, fresh: Any) -> tuple[Any, Named]:
  """The penalty's state, and what it knows of leaves that do not move."""
  here = set(tree.names(fresh))
  left = {name: leaf for name, leaf in there.items() if name not in here}
  return _put_back(there, fresh), left


def _memory(old: Any, fresh: Any) -> Any:
  there, here = _named(old), _named(fresh)
  if not there:
    return fresh
  same = set(there) == set(here)
  if same and all(_alike(there[name], here[name]) for name in here):
    return old
  raise UsageError(
    'the next phase has no memory like the one so far, which would be lost; '
    'give the learners of all phases the same rehearse(...)'
  )
