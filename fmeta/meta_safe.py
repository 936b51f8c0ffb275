"""Which optimisers can be differentiated, by measurement.

An inner loop is differentiated, and so is its optimiser. Some divide by a
norm or take a root that has no derivative at an exactly zero gradient, which
is common: LoRA's B = 0 gives A no gradient, and a zero head gives the body
none. Nothing here knows an optimiser by name.
"""

import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.learner import adapt, finetune
from fmeta.types import Aux, Params

# Small beside the root of an `eps_root` of 1e-8, below which Adam bends.
_STEP = 1e-7
# What a tracer that an optimiser closes over is measured at: a plausible rate,
# strength or momentum; whether a root is taken at zero does not depend on it.
_STAND_IN = 0.1
# Longest axis of a measured leaf: among a million entries some lie so near a
# kink (Yogi's sign) that differences are wrong, and Muon takes minutes.
_LONGEST = 8
_DEFAULT = {'body/layer_0/kernel': (3, 2), 'body/layer_0/bias': (2,)}

_REMEDY = (
  'in an inner loop use sgd, adam or adamw with eps_root=1e-8, or '
  'value_and_grad=first_order()'
)

_measuring = contextvars.ContextVar('measuring', default=False)
# Memo of a pure function: jaxpr of the probe -> its slopes. Learners of one
# optimiser are built anew in every trace of an outer loop.
_measured: dict[tuple, tuple['Slope', ...]] = {}


class Slope(NamedTuple):
  """A directional derivative through an optimiser at one point.

  Attributes:
    where: the point, in words.
    derivative: by reverse mode.
    difference: by central differences.
    wrong: whether the two disagree.
  """

  where: str
  derivative: float
  difference: float
  wrong: bool


class _Point(NamedTuple):
  where: str
  at: tuple[Params, Params]
  direction: tuple[Params, Params]
  weights: Params


class _Probe(NamedTuple):
  jaxpr: ClosedJaxpr
  out: Any
  key: tuple
  points: list[_Point]


def check_meta_safe(
  optimizer: optax.GradientTransformation,
  *,
  like: Params | None = None,
  num_steps: int = 8,
) -> None:
  """Refuses an optimiser through which a meta-gradient is wrong.

  Differentiating through a learner's step calls it by itself, see
  `fmeta.optim.guard`.

  Args:
    optimizer: its numbers may be tracers; it is measured with 0.1 for them.
    like: parameters whose names are used, as for `meta_slopes`.
    num_steps: as for `meta_slopes`.

  Raises:
    UsageError: naming the first wrong point and both numbers.
  """
  if _measuring.get():
    return
  for slope in meta_slopes(optimizer, like=like, num_steps=num_steps):
    if slope.wrong:
      raise UsageError(
        f'this optimiser has a wrong derivative {slope.where}: '
        f'{slope.derivative:.3g} where differences measure '
        f'{slope.difference:.3g}; {_REMEDY}'
      )


def meta_slopes(
  optimizer: optax.GradientTransformation,
  *,
  like: Params | None = None,
  num_steps: int = 8,
) -> tuple[Slope, ...]:
  """Derivatives through `num_steps` updates, and what differences say.

  Updates are differentiated in float64 with respect to parameters and
  gradients along one direction, and compared with central differences (h =
  1e-7): at a random point, where one leaf's gradient or all are exactly zero,
  and where a leaf is zero.

  Args:
    optimizer: as for `check_meta_safe`.
    like: parameters whose names are used, so that patterns fit; one leaf of
      each kind (last name, number of axes), the smallest, cut to at most 8
      entries along an axis.
    num_steps: updates; 8 reaches the second phase of RAdam.
  """
  shapes = _DEFAULT if like is None else _smallest(like)
  token = _measuring.set(True)
  try:
    with jax.enable_x64(True):
      try:
        probe = _trace(optimizer, _cut(shapes), num_steps)
      except (TypeError, ValueError):
        # Multipliers with an entry per parameter fit whole leaves only.
        probe = _trace(optimizer, shapes, num_steps)
      if probe.key not in _measured:
        run = _outside(probe.jaxpr, probe.out)
        _measured[probe.key] = tuple(_slope(run, x) for x in probe.points)
      return _measured[probe.key]
  finally:
    _measuring.reset(token)


def _trace(optimizer, shapes, num_steps) -> '_Probe':
  points = list(_points(shapes))
  probe = jax.make_jaxpr(_moved(optimizer, num_steps), return_shape=True)
  closed, out = probe(points[0].at, points[0].weights)
  key = str(closed.jaxpr), *map(_shown, closed.consts)
  return _Probe(closed, jax.tree.structure(out), key, points)


def _shown(const) -> Any:
  if isinstance(const, Tracer):
    return 'tracer'
  return np.asarray(const).tobytes()


def _outside(closed: ClosedJaxpr, treedef) -> Callable:
  """A jaxpr as a compiled function, whatever trace we are in."""

  def settled(const):
    if isinstance(const, Tracer):
      return np.full(const.shape, _STAND_IN).astype(const.dtype)
    return const

  consts = [settled(const) for const in closed.consts]
  run = jax.jit(jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, consts)))

  def call(*args):
    # NaN is an answer here, whatever the caller debugs.
    with jax.ensure_compile_time_eval(), jax.debug_nans(False):
      leaves = run(*jax.tree.leaves(args))
    return jax.tree.unflatten(treedef, [np.asarray(leaf) for leaf in leaves])

  return call


def _moved(optimizer, num_steps) -> Callable:
  """`((params, grads), weights) -> (value, gradient of it)`."""

  def loss_fn(params, model_state, batch, rng):
    terms = jax.tree.map(lambda p, g: jnp.sum(p * g), params, batch)
    value = sum(jax.tree.leaves(terms), jnp.zeros(()))
    return value, Aux(model_state, {}, jnp.ones(()))

  learner = finetune(loss_fn, optimizer)

  def moved(point, weights):
    params, grads = point
    # Gradients differ between steps, or Adam's would cancel.
    state, _ = adapt(
      learner,
      learner.init(params, jax.random.key(0)),
      lambda i: jax.tree.map(lambda g: g * (1 + 0.3 * jnp.cos(i)), grads),
      jax.random.key(0),
      num_steps=num_steps,
    )
    change = jax.tree.map(jnp.subtract, state.trainable, params)
    return optax.tree.vdot(weights, change)

  # Reverse mode, as a meta-gradient is taken: where a norm is zero, forward
  # mode may be right and reverse mode NaN (`optax.clip_by_global_norm`).
  return jax.value_and_grad(moved)


def _slope(run: Callable, point: _Point) -> Slope:
  def at(h):
    near = jax.tree.map(lambda x, d: x + h * d, point.at, point.direction)
    return run(near, point.weights)

  value, grads = at(0.0)
  terms = jax.tree.map(lambda g, d: np.sum(g * d), grads, point.direction)
  slope = float(sum(jax.tree.leaves(terms)))
  difference = float(at(_STEP)[0] - at(-_STEP)[0]) / (2 * _STEP)
  allowed = 1e-3 * (abs(difference) + abs(float(value))) + 1e-8
  wrong = not abs(slope - difference) <= allowed
  return Slope(point.where, slope, difference, wrong)


def _smallest(like: Params) -> dict[str, tuple[int, ...]]:
  """Shapes by name: the smallest leaf of each kind."""
  shapes = dict(
    zip(tree.names(like), map(jnp.shape, jax.tree.leaves(like)), strict=True)
  )
  chosen = {}
  for name in sorted(shapes, key=lambda name: int(np.prod(shapes[name]))):
    kind = name.rpartition('/')[2], len(shapes[name])
    chosen.setdefault(kind, name)
  return {name: shapes[name] for name in chosen.values()}


def _cut(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
  return {n: tuple(min(d, _LONGEST) for d in s) for n, s in shapes.items()}


def _points(shapes: dict[str, tuple[int, ...]]) -> Iterator[_Point]:
  random = np.random.default_rng(0)

  def draw():
    return {name: random.normal(size=shape) for name, shape in shapes.items()}

  params, grads, direction, weights = draw(), draw(), (draw(), draw()), draw()
  one = max(shapes, key=lambda name: len(shapes[name]))
  zero = {one: np.zeros(shapes[one])}
  nothing = {name: np.zeros(shape) for name, shape in shapes.items()}
  for where, point in (
    ('at a random point', (params, grads)),
    ('where one gradient is exactly zero', (params, {**grads, **zero})),
    ('where all gradients are exactly zero', (params, nothing)),
    ('where a parameter is zero', ({**params, **zero}, grads)),
  ):
    yield _Point(where, point, direction, weights)
