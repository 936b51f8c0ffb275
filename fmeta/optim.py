"""How it moves: optax chains over ordered (pattern, multiplier) lists.

Patterns are matched against trainable leaves when the optimiser is
initialised and again in every trace; `check_patterns` and the parameter table
hold them against all parameters.
"""

import jax
import jax.numpy as jnp
import optax

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.types import Scalar, TrainState

Rate = Scalar | optax.Schedule

# Decoupled decay on kernels and embeddings only, as in the BERT code
# (Devlin et al. 2018); a LoRA factor decays like its kernel, but no bias or
# scale of an adapter (`kernel.ia3_scale`) does.
DECAY = ((r'(.*[/._])?(bias|scale)', 0.0), ('.*', 1.0))
EVERYWHERE = (('.*', 1.0),)


def _values(updates, patterns, what):
  def value_of(name, _):
    index = tree.first_match(name, patterns)
    if index is None:
      raise UsageError(tree.uncovered(name, what))
    return patterns[index][1]

  return tree.map_with_name(value_of, updates)


def _covered(patterns, what):
  def init(params):
    _values(params, patterns, what)  # refuses a leaf without a value, early
    return optax.EmptyState()

  return init


def scale_by_patterns(
  patterns: tree.Patterns, *, what: str = 'rate'
) -> optax.GradientTransformation:
  """Multiplies each leaf's update by its first matching multiplier.

  Put it last in a chain for layer-wise rates: after Adam, whose updates do
  not depend on the gradient's scale.

  Args:
    patterns: ordered `(regex, multiplier)`; they must cover every trainable
      leaf. Multipliers may be traced arrays.
    what: the word used in errors.
  """

  def update(updates, state, params=None):
    del params
    scales = _values(updates, patterns, what)
    return jax.tree.map(lambda u, m: u * m, updates, scales), state

  return optax.GradientTransformation(_covered(patterns, what), update)


def decay_by_patterns(
  weight_decay: Scalar, patterns: tree.Patterns = DECAY
) -> optax.GradientTransformation:
  """Adds `weight_decay * multiplier * p` to each leaf's update.

  Args:
    weight_decay: may be traced.
    patterns: ordered `(regex, multiplier)`; by default none on biases and
      norm scales.
  """

  def update(updates, state, params=None):
    scales = _values(updates, patterns, 'decay')
    decayed = jax.tree.map(
      lambda u, p, m: u + weight_decay * m * p, updates, params, scales
    )
    return decayed, state

  return optax.GradientTransformation(_covered(patterns, 'decay'), update)


def _clipping(clip_norm):
  return [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]


def sgd(
  rate: Rate,
  *,
  momentum: Scalar | None = None,
  multipliers: tree.Patterns = EVERYWHERE,
  clip_norm: Scalar | None = None,
) -> optax.GradientTransformation:
  """Stochastic gradient descent; u = -rate * m * trace(g).

  Args:
    rate: float, traced array or optax schedule.
    momentum: decay of the velocity; none by default.
    multipliers: layer-wise rates.
    clip_norm: largest global norm of the trainable gradient; none by default.
  """
  return optax.chain(
    *_clipping(clip_norm),
    *([] if momentum is None else [optax.trace(momentum)]),
    scale_by_patterns(multipliers),
    optax.scale_by_learning_rate(rate),
  )


def adamw(
  rate: Rate,
  *,
  weight_decay: Scalar = 0.01,
  decay: tree.Patterns = DECAY,
  multipliers: tree.Patterns = EVERYWHERE,
  clip_norm: Scalar | None = 1.0,
  b1: Scalar = 0.9,
  b2: Scalar = 0.999,
  eps: Scalar = 1e-8,
  eps_root: Scalar = 0.0,
) -> optax.GradientTransformation:
  """Bias-corrected Adam with decoupled decay and layer-wise rates.

  (Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101, algorithm 2.)
  Decay 0.01 and clipping at 1 are BERT's (Devlin et al. 2018, appendix A.2
  and released code).

  Args:
    rate: float, traced array or optax schedule.
    weight_decay: times the rate and the leaf's multiplier.
    decay: which leaves decay, ordered `(pattern, multiplier)`.
    multipliers: layer-wise rates, ordered `(pattern, multiplier)`.
    clip_norm: largest global norm of the trainable gradient, or None.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added outside the square root.
    eps_root: added inside it; use 1e-8 in an inner loop, where an exactly
      zero gradient otherwise makes the meta-gradient NaN.
  """
  return optax.chain(
    *_clipping(clip_norm),
    optax.scale_by_adam(b1, b2, eps, eps_root),
    decay_by_patterns(weight_decay, decay),
    scale_by_patterns(multipliers),
    optax.scale_by_learning_rate(rate),
  )


def adam(rate: Rate, *, eps_root: Scalar = 0.0) -> optax.GradientTransformation:
  """Adam without decay or clipping, as meta-learners use it."""
  return adamw(rate, weight_decay=0.0, clip_norm=None, eps_root=eps_root)


def layerwise_decay(
  prefixes: list[str], factor: float
) -> tuple[tuple[str, float], ...]:
  """Multipliers that shrink by `factor` per layer away from the output.

  Args:
    prefixes: layer patterns from the input to the output, for example
      `['body/embeddings/.*', 'body/layer_0/.*', ..., 'head/.*']`.
    factor: rate of a layer over that of the next; 1/2.6 is ULMFiT's (Howard &
      Ruder 2018, https://arxiv.org/abs/1801.06146, section 3.2).
  """
  last = len(prefixes) - 1
  return tuple((p, factor ** (last - i)) for i, p in enumerate(prefixes))


def warmup_linear(
  peak: Scalar, num_steps: Scalar, warmup: float = 0.1
) -> optax.Schedule:
  """Linear warm-up over a share of the steps, then linear decay to zero.

  With w = floor(warmup * num_steps) the rate of step i (from 0) is

    peak * (i + 1) / (w + 1)              if i < w
    peak * (num_steps - i) / (num_steps - w)   otherwise,

  so no step of the run has rate zero and the peak is reached once.

  Args:
    peak: highest rate; may be traced.
    num_steps: length of the whole schedule; may be traced.
    warmup: share of `num_steps`; 0.1 as in the BERT code.
  """
  # Not int(): `num_steps` may be traced. In float32 0.1 * 30 is below 3.
  rise = jnp.floor(warmup * num_steps + 1e-3)
  fall = jnp.maximum(1, num_steps - rise)

  def rate(step):
    rising = (step + 1) / (rise + 1)
    falling = jnp.maximum(num_steps - step, 0) / fall
    return peak * jnp.where(step < rise, rising, falling)

  return rate


def set_hyper(state: TrainState, **values: Scalar) -> TrainState:
  """Sets hyper-parameters that live in the optimiser's state.

  With `optax.inject_hyperparams(factory)(rate=..., ...)` as the optimiser one
  compiled step serves every rate:

    def factory(rate, num_steps):
      return adamw(warmup_linear(rate, num_steps))

  Args:
    state: of a learner with such an optimiser.
    **values: by the names of the factory's arguments.

  Raises:
    KeyError: if the optimiser's state has no such value.
  """
  return state.replace(opt_state=optax.tree.set(state.opt_state, **values))
