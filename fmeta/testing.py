"""The conformance suite of learners, as a function.

Whatever is put into `finetune` (a tuning, a penalty, an optimiser, another
way to differentiate) has to work in all three regimes: jitted alone, scanned
inside an outer gradient, repeated over a stream. `check_learner` holds a
learner to that; every method of fmeta is a row that calls it, and so can
yours be:

  learner = finetune(loss, adamw(1e-3), tuning=my_tuning())
  check_learner(learner, params, batch, meta_loss=loss)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmeta import tree
from fmeta.learner import adapt
from fmeta.types import Array, Batch, Learner, LossFn, Params, TrainState


def check_learner(
  learner: Learner,
  params: Params,
  batch: Batch,
  *,
  model_state: Any = None,
  num_steps: int = 3,
  vmap_tolerance: float = 1e-6,
  meta_loss: LossFn | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> None:
  """Asserts the properties that everything in fmeta relies on.

  A loop of jitted steps equals `adapt` bitwise; `vmap` over two copies equals
  each alone; all steps share one trace; frozen leaves stay bitwise the same;
  a state written to numpy and back continues bitwise; donating all but the
  frozen leaves changes nothing and no buffer is donated twice. With
  `meta_loss` the gradient through the adaptation equals central differences
  in float64, and with `mesh` one step on several devices equals one.

  Args:
    learner: what is tested; `step` must be pure.
    params: full parameters.
    batch: arrays with one leading batch axis.
    model_state: as for `learner.init`.
    num_steps: steps of each run, at least 2.
    vmap_tolerance: largest difference relative to a leaf's largest entry.
      A vmapped matmul may be another kernel, hence not bitwise.
    meta_loss: query loss at the adapted weights; the learner must accept
      float64 parameters.
    mesh: a mesh with an axis `data` that divides the batch.

  Raises:
    AssertionError: naming the property and the leaf that broke it.
  """
  rng = jax.random.key(20)
  batch = jax.tree.map(jnp.asarray, dict(batch))
  start = learner.init(params, jax.random.key(21), model_state)
  step, traces = _donating(learner)
  states = _run(step, start, batch, rng, num_steps)
  assert len(traces) == 1, (
    f'one trace: {num_steps} steps took {len(traces)}; does a dtype, weak '
    'type or shape of the state change in a step?'
  )
  last = states[-1]
  assert int(last.step) == num_steps, 'step: the counter did not advance'
  assert_same(start.frozen, last.frozen, 'frozen leaves')
  scanned, _ = jax.jit(
    lambda state, rng: adapt(
      learner, state, lambda _: batch, rng, num_steps=num_steps
    )
  )(start, rng)
  assert_same(last, scanned, 'scan = loop')
  restored = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, states[1]))
  resumed = _run(step, restored, batch, rng, num_steps - 1)[-1]
  assert_same(last, resumed, 'save, restore, continue')
  check_donation(step, start, batch, rng, states[2])
  check_vmap(learner, start, states[1], batch, rng, vmap_tolerance)
  if mesh is not None:
    check_mesh(step, start, batch, rng, states[1], mesh)
  if meta_loss is not None:
    check_meta_gradient(learner, params, batch, meta_loss, num_steps=num_steps)


def _donating(learner):
  """The jitted step, donating all but the frozen leaves, and its traces."""
  traces = []

  def step(movable, frozen, batch, rng):
    traces.append(movable)
    return learner.step(movable.replace(frozen=frozen), batch, rng)[0]

  return jax.jit(step, donate_argnums=0), traces


def _run(step, state, batch, rng, num_steps) -> list[TrainState]:
  states = [state]
  for _ in range(num_steps):
    movable = jax.tree.map(jnp.copy, state.replace(frozen={}))
    state = step(movable, state.frozen, batch, rng)
    states.append(state)
  return states


def assert_same(expected: Any, found: Any, what: str) -> None:
  """Asserts equal structure and bitwise equal leaves (NaN equals NaN)."""
  assert_close(expected, found, what, 0.0)


def assert_close(expected: Any, found: Any, what: str, rtol: float) -> None:
  """Asserts |x - y| <= rtol max|x| in every leaf.

  Args:
    expected: any pytree of arrays.
    found: the same.
    what: the property, first word of the error.
    rtol: relative to the leaf's largest entry; 0 means bitwise.
  """
  structures = jax.tree.structure(expected), jax.tree.structure(found)
  assert structures[0] == structures[1], f'{what}: {structures}'
  pairs = zip(
    tree.names(expected),
    jax.tree.leaves(expected),
    jax.tree.leaves(found),
    strict=True,
  )
  for name, x, y in pairs:
    x, y = np.asarray(x), np.asarray(y)
    assert x.dtype == y.dtype, f'{what}: {name!r} {x.dtype} became {y.dtype}'
    if rtol == 0:
      same = x.shape == y.shape and x.tobytes() == y.tobytes()
      assert same, f'{what}: {name!r} is not bitwise equal; {_gap(x, y)}'
    elif x.size:
      scale = np.max(np.abs(x))
      assert np.allclose(y, x, rtol=0, atol=rtol * scale, equal_nan=True), (
        f'{what}: {name!r} differs by more than {rtol}; {_gap(x, y)}'
      )


def _gap(x, y) -> str:
  if x.shape != y.shape:
    return f'shapes {x.shape} and {y.shape}'
  gap = np.abs(x.astype(float) - y.astype(float)).max(initial=0)
  return f'largest |x| {np.abs(x).max(initial=0):.3g}, difference {gap:.3g}'


def check_donation(
  step: Callable,
  start: TrainState,
  batch: Batch,
  rng: Array,
  expected: TrainState,
) -> None:
  """Two steps that reuse the state's own buffers equal `expected`."""
  # A run donates what `init` returned.
  _no_shared_buffers(start, 'donation of a fresh state')
  # The parameters themselves stay the caller's.
  state = jax.tree.map(jnp.copy, start)
  for _ in range(2):
    _no_shared_buffers(state, 'donation')
    state = step(state.replace(frozen={}), state.frozen, batch, rng)
  assert_same(expected, state, 'donation')


def _no_shared_buffers(state, what):
  owner = {}
  for name, leaf in zip(tree.names(state), jax.tree.leaves(state), strict=True):
    if leaf.size:
      pointer = leaf.unsafe_buffer_pointer()
      other = owner.setdefault(pointer, name)
      assert other == name, (
        f'{what}: {name!r} and {other!r} are one buffer, which cannot be '
        'donated twice; copy one (jnp.array(x, copy=True))'
      )


def check_vmap(
  learner: Learner,
  start: TrainState,
  expected: TrainState,
  batch: Batch,
  rng: Array,
  tolerance: float,
) -> None:
  """A step vmapped over two copies equals the step alone, for each."""
  axes = TrainState(0, 0, None, 0, 0, 0, 0)  # pyright: ignore
  twice = jax.tree.map(lambda x: jnp.stack([x, x]), start.replace(frozen={}))
  step = jax.vmap(learner.step, (axes, None, None), (axes, 0))
  both, _ = jax.jit(step)(twice.replace(frozen=start.frozen), batch, rng)
  for k in range(2):
    mine = jax.tree.map(lambda x, k=k: x[k], both.replace(frozen={}))
    assert_close(
      expected.replace(frozen={}), mine, f'vmap, copy {k}', tolerance
    )


def check_mesh(
  step: Callable,
  start: TrainState,
  batch: Batch,
  rng: Array,
  expected: TrainState,
  mesh: jax.sharding.Mesh,
  rtol: float = 1e-5,
) -> None:
  """One step with the batch split over `data` equals one device's."""
  spec = jax.sharding.PartitionSpec
  everywhere = jax.sharding.NamedSharding(mesh, spec())
  by_row = jax.sharding.NamedSharding(mesh, spec('data'))
  start = jax.device_put(jax.tree.map(jnp.copy, start), everywhere)
  found = step(
    start.replace(frozen={}),
    start.frozen,
    jax.device_put(batch, by_row),
    jax.device_put(rng, everywhere),
  )
  assert_close(expected, found, f'{mesh.size} devices = 1', rtol)


def check_meta_gradient(
  learner: Learner,
  params: Params,
  batch: Batch,
  loss_fn: LossFn,
  *,
  query: Batch | None = None,
  num_steps: int = 2,
  rtol: float = 1e-6,
) -> Params:
  """The gradient through the adaptation equals central differences.

  With f(p) = loss(adapt(p)) it compares <grad f, d> to
  the central difference of four points, h = 1e-6, in float64, for three random
  unit directions d in all leaves and one in every single leaf. The tolerance
  is relative to |grad f|.

  Args:
    learner: the inner learner.
    params: outer parameters.
    batch: support set.
    loss_fn: query loss.
    query: query set; the support set by default.
    num_steps: inner steps.
    rtol: largest difference over |grad f|.

  Returns:
    The gradient, float64.
  """
  with jax.enable_x64(True):
    params, support = jax.tree.map(_double, (params, dict(batch)))
    asked = support if query is None else jax.tree.map(_double, dict(query))

    def objective(params):
      state = learner.init(params, jax.random.key(21))
      state, _ = adapt(
        learner,
        state,
        lambda _: support,
        jax.random.key(20),
        num_steps=num_steps,
      )
      with learner.using(state) as adapted:
        return loss_fn(adapted, state.model_state, asked, None)[0]

    return check_gradient(objective, params, rtol=rtol)


def _double(x):
  x = jnp.asarray(x)
  return x.astype('float64') if jnp.issubdtype(x.dtype, jnp.floating) else x


def check_gradient(
  objective: Callable[[Params], Array],
  params: Params,
  *,
  step: float = 1e-6,
  rtol: float = 1e-6,
) -> Params:
  """`check_meta_gradient` for any scalar function; call it in float64."""
  value = jax.jit(objective)
  grads = jax.jit(jax.grad(objective))(params)
  norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
  assert np.isfinite(norm), f'meta-gradient: its norm is {norm}'
  for name, direction in _directions(params):

    def at(offset, direction=direction):
      moved = jax.tree.map(lambda p, d: p + offset * d, params, direction)
      return float(value(moved))

    near = at(step) - at(-step)
    far = at(2 * step) - at(-2 * step)
    # Fourth order: Adam's root at a zero gradient bends within sqrt(eps_root)
    # = 1e-4, where the two-point formula is 2e-5 off at h = 1e-6.
    measured = (8 * near - far) / (12 * step)
    pairs = jax.tree.map(lambda g, d: float((g * d).sum()), grads, direction)
    slope = sum(jax.tree.leaves(pairs))
    assert abs(measured - slope) <= rtol * norm, (
      f'meta-gradient along {name}: {slope} but central differences give '
      f'{measured}; |gradient| = {norm:.3g}'
    )
  return grads


def _directions(params):
  random = np.random.default_rng(0)
  leaf_names = tree.names(params)
  chosen = [(f'direction {k}', set(leaf_names)) for k in range(3)]
  for what, moving in [*chosen, *((repr(n), {n}) for n in leaf_names)]:
    raw = tree.map_with_name(
      lambda name, p, moving=moving: (
        (name in moving) * random.normal(size=p.shape)
      ),
      params,
    )
    norm = np.sqrt(sum((d**2).sum() for d in jax.tree.leaves(raw)))
    yield what, jax.tree.map(lambda d, norm=norm: d / norm, raw)
