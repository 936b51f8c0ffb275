"""The precision that a model computes in; its parameters stay float32.

An accelerator multiplies float32 matrices in a narrower format unless told
otherwise (on NVIDIA GPUs jax's default is TF32, on TPUs bfloat16), so a
number is only what it says if the format is named.
"""

import jax
import jax.numpy as jnp

from fmeta.errors import UsageError, suggest
from fmeta.types import Forward

PRECISIONS = 'float32', 'tf32', 'bfloat16'
_PRODUCTS = {'float32': 'highest', 'tf32': 'tensorfloat32'}


def computing_in(forward: Forward, precision: str) -> Forward:
  """The model with the precision of its products named.

  | | products of | everything else |
  |---|---|---|
  | 'float32' | float32 | float32 |
  | 'tf32' | factors rounded to 11 bits, where the device has it | float32 |
  | 'bfloat16' | bfloat16 factors | bfloat16, but for statistics of norms |

  Derivatives of a product, of any order, have its precision. With 'bfloat16'
  parameters and the batch are rounded on the way in and outputs come back in
  float32, so gradients, optimiser and loss are float32 whatever is chosen.

  Args:
    forward: a model.
    precision: one of `PRECISIONS`.

  Raises:
    UsageError: if there is no such precision.
  """
  if precision not in PRECISIONS:
    raise UsageError(
      f'no precision {precision!r}{suggest(precision, PRECISIONS)}'
    )

  def cast(tree, dtype):
    return jax.tree.map(
      lambda x: (
        x.astype(dtype)
        if jnp.issubdtype(jnp.result_type(x), jnp.floating)
        else x
      ),
      tree,
    )

  def run(params, model_state, batch, rng):
    if precision != 'bfloat16':
      with jax.default_matmul_precision(_PRODUCTS[precision]):
        return forward(params, model_state, batch, rng)
    params, batch = cast((params, batch), jnp.bfloat16)
    outputs, model_state = forward(params, model_state, batch, rng)
    return cast(outputs, jnp.float32), model_state

  return run
