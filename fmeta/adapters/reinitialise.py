"""Fresh top layers for a pre-trained model."""

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.adapters import siblings
from fmeta.errors import UsageError
from fmeta.types import Array, Params, Scalar

_DRAWN, _ZERO, _ONE = ('kernel', 'embedding'), ('bias',), ('scale',)


def reinitialise(
  params: Params, patterns: tuple[str, ...], rng: Array, std: Scalar = 0.02
) -> Params:
  """The parameters with matching leaves as fresh ones of BERT.

  Kernels and tables are normal with deviation `std`, cut at two of them and
  not rescaled, biases 0, scales of norms 1. Zhang et al. 2021
  (https://arxiv.org/abs/2006.05987, section 5) start few-sample fine-tuning
  this way for the pooler and the top one to six blocks, for example

    reinitialise(params, (r'body/layer_(10|11)/.*', 'head/.*'), rng)

  Args:
    params: full parameters, without adapters.
    patterns: full-match regular expressions of the leaves.
    rng: key; a leaf's own key depends on its name only.
    std: 0.02 as in BERT's `initializer_range`.

  Raises:
    UsageError: if a pattern matches nothing, or a matching leaf is no kernel,
      embedding, bias or scale.
  """
  chosen = set(siblings.owners(params, patterns))

  def fresh(name, leaf):
    if name not in chosen:
      return leaf
    kind = name.rpartition('/')[2]
    if kind in _DRAWN:
      key = siblings.key_for(rng, name)
      return std * jax.random.truncated_normal(
        key, -2, 2, leaf.shape, leaf.dtype
      )
    if kind in _ZERO:
      return jnp.zeros_like(leaf)
    if kind in _ONE:
      return jnp.ones_like(leaf)
    raise UsageError(
      f'no fresh value for {name!r}; possible are leaves called '
      f'{(*_DRAWN, *_ZERO, *_ONE)}: narrow the pattern'
    )

  return tree.map_with_name(fresh, params)
