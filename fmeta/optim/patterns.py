"""Ordered `(pattern, value)` lists as optax transformations.

Patterns are matched against trainable leaves when the optimiser is
initialised and again in every trace; `check_patterns` and the parameter table
hold them against all parameters.
"""

import re

import jax
import optax

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.types import Params, Scalar

# Decoupled decay on kernels and embeddings only, as in the BERT code
# (Devlin et al. 2018); a LoRA factor decays like its kernel, but no bias or
# scale of an adapter (`kernel.ia3_scale`) does.
DECAY = ((r'(.*[/._])?(bias|scale)', 0.0), ('.*', 1.0))
EVERYWHERE = (('.*', 1.0),)


def values_of(leaves: Params, patterns: tree.Patterns, what: str) -> Params:
  """A tree of each leaf's first matching value.

  Raises:
    UsageError: naming a leaf that no pattern covers.
  """

  def value_of(name, _):
    index = tree.first_match(name, patterns)
    if index is None:
      raise UsageError(tree.uncovered(name, what))
    return patterns[index][1]

  return tree.map_with_name(value_of, leaves)


def _covered(patterns, what):
  def init(params):
    values_of(params, patterns, what)  # refuses a leaf without a value, early
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
    scales = values_of(updates, patterns, what)
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
    scales = values_of(updates, patterns, 'decay')
    decayed = jax.tree.map(
      lambda u, p, m: u + weight_decay * m * p, updates, params, scales
    )
    return decayed, state

  return optax.GradientTransformation(_covered(patterns, 'decay'), update)


def layerwise_decay(
  prefixes: list[str], factor: Scalar
) -> tuple[tuple[str, Scalar], ...]:
  """Multipliers that shrink by `factor` per layer away from the output.

    m_k = factor^(K - 1 - k) for the k-th of K prefixes

  Args:
    prefixes: layer patterns from the input to the output, for example
      `blocks_of(params)`.
    factor: rate of a layer over that of the next; may be traced. 1/2.6 is
      ULMFiT's (Howard & Ruder 2018, https://arxiv.org/abs/1801.06146, section
      3.2).
  """
  last = len(prefixes) - 1
  return tuple((p, factor ** (last - i)) for i, p in enumerate(prefixes))


# Names of a body's parts before and after its numbered blocks.
_FIRST = ('embeddings', 'stem')
_BLOCK = re.compile(r'(layer|block|stage)_(\d+)')


def blocks_of(params: Params) -> list[str]:
  """Patterns of the blocks of a model, from the input to the output.

  One pattern per embedding or stem, numbered `layer_k`, `block_k` or
  `stage_k` under `body/` (in numeric order; blocks inside a stage belong to
  it), any other part of the body, and one per part outside it, such as
  `head/.*`. They cover every leaf:

    adamw(1e-4, multipliers=layerwise_decay(blocks_of(params), 1 / 2.6))

  Args:
    params: the full parameters, with names as fmeta's models give them.

  Raises:
    UsageError: if nothing is named `body/...`.
  """
  found = {_prefix(name.split('/')): None for name in tree.names(params)}
  if not any(parts[0] == 'body' for parts in found):
    raise UsageError(
      f'no parameter is named body/...{_shown(found)}; list the patterns '
      'from input to output yourself'
    )
  ordered = sorted(found, key=_depth)
  return [
    ''.join(f'{re.escape(p)}/' for p in parts) + '.*' for parts in ordered
  ]


def _shown(found):
  names = ', '.join(sorted('/'.join(parts) for parts in found)[:6])
  return f'; there are [{names}]'


def _prefix(parts):
  return tuple(parts[: 2 if parts[0] == 'body' else 1])


def _depth(parts):
  if parts[0] != 'body':
    return (3, 0)
  name = parts[1]
  numbered = _BLOCK.fullmatch(name)
  if numbered:
    return (1, int(numbered[2]))
  return (0 if name in _FIRST else 2, 0)
