"""Mixout: dropout towards the pre-trained weights instead of zero.

Two values that belong together: `anchored` puts a copy of the starting point
beside the frozen leaves, and `mixout` draws, in each step, which of the
weights are replaced by it:

  finetune(loss, adamw(2e-5), tuning=anchored(full()),
           value_and_grad=mixout(0.7))
"""

import zlib

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.gradients import plain
from fmeta.types import Array, Params, Scalar, Tuning, ValueAndGrad

START = '.start'
# Folded into the step's key, hence a number that no microbatch has.
_STREAM = 2**32 - 2


def anchored(
  tuning: Tuning, patterns: tuple[str, ...] = (r'.*kernel',)
) -> Tuning:
  """The same tuning, with where its leaves started kept in `frozen`.

  The copy of a leaf `a/kernel` is the frozen leaf `a/kernel.start`; models,
  `merge` and exports never see it.

  Args:
    tuning: what moves.
    patterns: full-match regular expressions over its trainable leaves. By
      default the kernels, the weights that follow a dropout (Lee et al. 2020,
      section 6).

  Raises:
    UsageError: at `init`, if a pattern matches no trainable leaf.
  """

  def init(params, rng):
    trainable, frozen = tuning.init(params, rng)
    tree.check_patterns(patterns, tree.names(trainable))
    pairs = [(pattern, None) for pattern in patterns]
    chosen, _ = tree.partition(
      trainable, lambda name: tree.first_match(name, pairs) is not None
    )
    return trainable, tree.combine(frozen, _starts(chosen))

  return Tuning(
    init=init,
    merge=lambda trainable, frozen: tuning.merge(trainable, _model(frozen)),
    keep=lambda old, new, trainable, frozen: tuning.keep(
      old, new, trainable, _model(frozen)
    ),
    intercept=lambda trainable, frozen: tuning.intercept(
      trainable, _model(frozen)
    ),
  )


def _starts(leaves: Params) -> dict:
  # Copied: the leaves themselves will be donated.
  return {
    **{
      key: _starts(value)
      for key, value in leaves.items()
      if isinstance(value, dict)
    },
    **{
      f'{key}{START}': jnp.array(value, copy=True)
      for key, value in leaves.items()
      if not isinstance(value, dict)
    },
  }


def _model(frozen: Params) -> dict:
  return tree.partition(frozen, lambda name: not name.endswith(START))[0]


def mixout(p: Scalar, value_and_grad: ValueAndGrad = plain) -> ValueAndGrad:
  """Runs each step on weights that are partly the starting ones.

  With u the start, m = 0 with probability p and 1 otherwise, drawn for each
  input of a kernel and each step,

    t' = ((1 - m) u + m t - p u) / (1 - p)

  whose mean is t: all weights that leave a neuron are replaced together (Lee
  et al. 2020, https://arxiv.org/abs/1909.11299, figure 1 and section 3).
  Evaluation runs on t. The gradient is that of L(t') with respect to t; the
  authors' code leaves out its factor 1 / (1 - p).

  `accumulate(n, mixout(p))` draws anew for each microbatch,
  `mixout(p, accumulate(n))` once for all.

  Args:
    p: in [0, 1); may be traced. The paper's best are 0.7 to 0.9.
    value_and_grad: how the loss at the mixed weights is differentiated.

  Raises:
    UsageError: for a number outside [0, 1), or in a step whose tuning is not
      `anchored`.
  """
  if isinstance(p, int | float) and not 0 <= p < 1:
    raise UsageError(f'mixout p={p}; give one in [0, 1)')

  def transform(fun):
    def wrapped(trainable, frozen, model_state, batch, rng):
      if not any(name.endswith(START) for name in tree.names(frozen)):
        raise UsageError(
          'mixout finds no starting weights among the frozen leaves; give '
          'finetune tuning=anchored(...)'
        )

      def at_mixed(trainable, frozen, model_state, batch, rng):
        return fun(
          mix(trainable, frozen, p, key), frozen, model_state, batch, rng
        )

      key = jax.random.fold_in(rng, _STREAM)
      return value_and_grad(at_mixed)(
        trainable, frozen, model_state, batch, rng
      )

    return wrapped

  return transform


def mix(trainable: Params, frozen: Params, p: Scalar, rng: Array) -> Params:
  """The mixed weights t' of `mixout`; leaves without a start as they are.

  Args:
    trainable: kernels [..., in, out] share a draw along `out` and the leading
      axes; a vector has one per entry.
    frozen: of an `anchored` tuning.
    p: in [0, 1).
    rng: each leaf's own key depends on its name only.
  """
  starts = {name for name in tree.names(frozen) if name.endswith(START)}

  def one(name, t):
    if f'{name}{START}' not in starts:
      return t
    start = tree.get(frozen, f'{name}{START}')
    key = jax.random.fold_in(rng, zlib.crc32(name.encode()))
    stays = jax.random.uniform(key, _drawn_shape(t.shape)) >= p
    # In this form p = 0 gives t and a replaced entry is u, bit by bit.
    return jnp.where(stays, (t - p * start) / (1 - p), start).astype(t.dtype)

  return tree.map_with_name(one, trainable)


def _drawn_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  if len(shape) < 2:
    return shape
  return (*(1,) * (len(shape) - 2), shape[-2], 1)
