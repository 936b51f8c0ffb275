"""How a derivative passes through an inner loop.

`adapt` and `episode_loss` take one of these values; the steps they run are
the same, and so is every number of the forward pass.

| value | the outer gradient | kept per inner step |
|---|---|---|
| `plain` | exact | all that the step computes |
| `remat` | exact | the state that moves |
| `mixed` | exact | the state that moves; fewer copies within a step |
| `in_segments(n)` | exact | that state at n places, and within one segment |
| `first_order` | inner gradients are constants | nothing, or the gradient |
| `implicit(solve)` | of the exact minimiser | nothing |

Only `mixed` and `first_order` depend on how the learner takes its gradient:
they say what `gradients.plain` is, so a learner whose `value_and_grad` is not
built on that keeps its own way.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmeta import gradients
from fmeta.errors import UsageError
from fmeta.types import Array, Params, TrainState

# (matrix-vector product of H, v) -> H^-1 v, more or less.
Solve = Callable[[Callable[[Params], Params], Params], Params]


class Loop(NamedTuple):
  """An inner loop before it runs.

  Attributes:
    step: `(state, index) -> (state, record)`; what is frozen is closed over.
    start: the state without frozen leaves.
    num_steps: static.
    gradient: `state -> gradient` of what the steps descend.
  """

  step: Callable[[TrainState, Array], tuple[TrainState, Any]]
  start: TrainState
  num_steps: int
  gradient: Callable[[TrainState], Params]


Through = Callable[[Loop], tuple[TrainState, Any]]

_VALUES = (
  'plain, remat, mixed, first_order, in_segments(n) or implicit(solve) of '
  'fmeta.through'
)


def passed(through: Through, loop: Loop) -> tuple[TrainState, Any]:
  """`through(loop)`.

  Raises:
    UsageError: for anything else than one of the values above, such as a name
      or a factory without its arguments.
  """
  made = through(loop) if callable(through) else None
  if isinstance(made, tuple) and len(made) == 2:
    return made
  raise UsageError(
    f'through={getattr(through, "__name__", through)!r} runs no inner loop; '
    f'give {_VALUES}'
  )


def plain(loop: Loop) -> tuple[TrainState, Any]:
  """Reverse mode over a scan: the backward pass keeps every step's values."""
  return _scan(loop, _taking(gradients.reverse, loop.step))


def remat(loop: Loop) -> tuple[TrainState, Any]:
  """Keeps the state before each step and computes the step again.

  (Chen et al. 2016, https://arxiv.org/abs/1604.06174, with a segment a step.)
  """
  return _scan(loop, _checkpointed(loop, gradients.reverse))


def mixed(loop: Loop) -> tuple[TrainState, Any]:
  """As `remat`, and the inner gradient's derivative is forward over reverse.

  See `gradients.mixed_mode` (Kemaev et al. 2025, https://arxiv.org/abs/2505.00793).
  """
  return _scan(loop, _checkpointed(loop, gradients.mixed_mode))


def in_segments(num_segments: int, way: Through = mixed) -> Through:
  """Keeps the state only where each of `num_segments` parts begins.

  Going back, a part is run again and goes by `way`, so of N steps
  num_segments + N / num_segments states are held at once and not N, for the
  price of one more inner loop without derivatives. sqrt(N) segments hold the
  fewest (Griewank & Walther 2000, https://doi.org/10.1145/347837.347846, with
  one level).

  Args:
    num_segments: a divisor of the number of inner steps.
    way: how a segment is differentiated.

  Raises:
    UsageError: in the loop, if it does not divide.
  """

  def run(loop):
    length, left = divmod(loop.num_steps, max(num_segments, 1))
    if num_segments < 1 or left:
      raise UsageError(
        f'{loop.num_steps} inner steps do not divide into {num_segments} '
        'segments; choose a divisor, best near the square root'
      )

    def segment(state, first):
      step = lambda state, k: loop.step(state, first + k)
      return way(loop._replace(step=step, start=state, num_steps=length))

    last, history = jax.lax.scan(
      jax.checkpoint(segment, prevent_cse=num_segments < 2),
      loop.start,
      length * jnp.arange(num_segments),
    )
    return last, jax.tree.map(
      lambda x: x.reshape(loop.num_steps, *x.shape[2:]), history
    )

  return run


def first_order(loop: Loop) -> tuple[TrainState, Any]:
  """Inner gradients are constants (Finn et al. 2017, section 5.2).

  See `gradients.first_order`. Learned rates keep their derivative.
  """
  return _scan(
    loop, _taking(gradients.first_order(gradients.reverse), loop.step)
  )


def _scan(loop, step):
  return jax.lax.scan(step, loop.start, jnp.arange(loop.num_steps))


def _checkpointed(loop, value_and_grad):
  step = _taking(value_and_grad, loop.step)
  # Nothing can be shared across the two passes of a loop, but XLA unrolls a
  # loop of one step.
  return jax.checkpoint(step, prevent_cse=loop.num_steps < 2)


def _taking(value_and_grad, fun):
  @functools.wraps(fun)
  def run(*args):
    with gradients.taken_by(value_and_grad):
      return fun(*args)

  return run


def cg(num_steps: int, damping: float = 0.0) -> Solve:
  """`num_steps` steps of conjugate gradients from zero.

  Exact after as many steps as H has distinct eigenvalues (iMAML's choice,
  Rajeswaran et al. 2019, https://arxiv.org/abs/1909.04630, algorithm 2), if H
  is positive definite. A network's rarely is.

  Args:
    num_steps: each costs one Hessian-vector product.
    damping: added to H's diagonal; the bias that it brings is the price of a
      definite system.
  """
  _require_steps('cg', num_steps)
  if damping < 0:
    raise UsageError(f'cg(damping={damping}); choose 0 or more')

  def solve(product, v):
    def damped(u):
      return jax.tree.map(lambda h, x: h + damping * x, product(u), u)

    return jax.scipy.sparse.linalg.cg(
      damped, v, tol=0.0, atol=0.0, maxiter=num_steps
    )[0]

  return solve


def neumann(num_steps: int, rate: Array | float) -> Solve:
  """The series rate * sum_{k=0..num_steps} (I - rate H)^k v.

  It converges to H^-1 v when rate * (largest eigenvalue of H) < 2 (Lorraine
  et al. 2020, https://arxiv.org/abs/1911.02590, algorithm 3).
  """
  _require_steps('neumann', num_steps)
  if isinstance(rate, int | float) and rate <= 0:
    raise UsageError(f'neumann(rate={rate}); choose a rate above 0')

  def solve(product, v):
    def body(carry, _):
      term, total = carry
      term = jax.tree.map(lambda t, h: t - rate * h, term, product(term))
      return (term, jax.tree.map(jnp.add, total, term)), None

    (_, total), _ = jax.lax.scan(body, (v, v), length=num_steps)
    return jax.tree.map(lambda t: rate * t, total)

  return solve


def _require_steps(name, num_steps):
  if num_steps < 1:
    raise UsageError(
      f'{name}(num_steps={num_steps}); choose 1 or more, it says how well the '
      'linear system is solved'
    )


def implicit(solve: Solve) -> Through:
  """The derivative of the minimiser, whatever steps led there.

  With F(t, z) the data loss and a proximal penalty, and grad_t F = 0 at the
  adapted t, the implicit function theorem gives

    dt/dz = -H^-1 d(grad_t F)/dz,  H = d(grad_t F)/dt;

  with `penalty=l2_sp(strength)` and z = where it started that is iMAML,
  strength (H_data + strength I)^-1 (Rajeswaran et al. 2019,
  https://arxiv.org/abs/1909.04630, lemma 1). Frozen leaves, data and traced
  strengths have their derivatives, too; rates have none, as the minimiser
  does not depend on them. Right as far as the loop converges, so without
  dropout and with the same batch in each step.

  Args:
    solve: `cg(num_steps, damping)` or `neumann(num_steps, rate)`; with damping
      d it is (H + d I)^-1 that is taken.

  Raises:
    UsageError: if `solve` is none, and in the loop without a penalty that
      remembers the start.
  """
  if not callable(solve):
    raise UsageError(
      f'implicit needs a solver and got a {type(solve).__name__}; write '
      'implicit(cg(num_steps)) or implicit(neumann(num_steps, rate))'
    )

  def run(loop):
    if not loop.num_steps:
      return plain(loop)
    if not jax.tree.leaves(loop.start.penalty_state):
      raise UsageError(
        'implicit(...) of a learner without a penalty: its minimiser does not '
        'depend on the start; give the inner learner penalty=l2_sp(strength)'
      )
    last, history = _constant(lambda: plain(loop))
    # What pulls to the start comes from there, with its derivative.
    at = last.replace(penalty_state=loop.start.penalty_state)
    slope = lambda trainable: loop.gradient(at.replace(trainable=trainable))
    outside, call = gradients.hoisted(
      _taking(gradients.mixed_mode, slope), last.trainable
    )
    trainable = _minimiser(call, solve)(
      jax.lax.stop_gradient(outside),
      last.trainable,
      call(outside, last.trainable),
    )
    return last.replace(trainable=trainable), history

  return run


def _constant(fun):
  """`fun()` without any derivative: none is even traced."""
  outside, call = gradients.hoisted(fun)
  return call(jax.lax.stop_gradient(outside))


def _minimiser(call, solve):
  """`(outside, t, residual) -> t` with derivative -H^-1 d(residual)."""

  @jax.custom_vjp
  def settled(outside, trainable, residual):
    del outside, residual
    return trainable

  def forward(outside, trainable, residual):
    return trainable, (outside, trainable)

  def backward(saved, v):
    outside, trainable = saved
    _, product = jax.vjp(functools.partial(call, outside), trainable)
    solved = solve(lambda u: product(u)[0], v)
    return None, None, jax.tree.map(jnp.negative, solved)

  settled.defvjp(forward, backward)
  return settled
