"""ANML: a second network gates the features that a head reads."""

import flax.linen as nn
import jax

from fmeta.continual.meta.oml import oml_loss
from fmeta.errors import UsageError
from fmeta.types import Array, LossFn, Scalar


class Gated(nn.Module):
  """A network whose features are gated by another one, then a linear head.

    y = head(f(x) * sigmoid(g(x)))

  The gate decides, from the input, which features pass: those that are shut
  give no logit and get no gradient, so it directs both activity and learning
  (neuromodulation, Beaulieu et al. 2020, https://arxiv.org/abs/2002.09571).
  Leaves are named `body/...` (f), `gate/...` (g) and `head/...`.

  Attributes:
    body: f, gives [B, D]; called with `deterministic=`.
    gate: g, the same shape as the body's.
    num_classes: of the head.
  """

  body: nn.Module
  gate: nn.Module
  num_classes: int

  @nn.compact
  def __call__(self, x: Array, *, deterministic: bool = True) -> Array:
    """Inputs [B, ...] -> logits [B, num_classes]."""
    features = self.body(x, deterministic=deterministic)
    gate = self.gate(x, deterministic=deterministic)
    if gate.shape != features.shape:
      raise UsageError(
        f'a gate of shape {gate.shape} for features of shape {features.shape}; '
        'give both networks the same width'
      )
    return nn.Dense(self.num_classes, name='head')(
      features * jax.nn.sigmoid(gate)
    )


def anml_loss(
  loss_fn: LossFn, rate: Scalar, num_steps: int, **options
) -> LossFn:
  """`oml_loss` of a `Gated` model: body and head are fast, the gate is slow.

  The outer loop learns where the body starts and the whole gate; the stream
  changes the body and the head and never the gate (Beaulieu et al. 2020,
  https://arxiv.org/abs/2002.09571). `moving=('head/.*',)` leaves the body
  alone, too.

  Args:
    loss_fn: of a `Gated` model.
    rate: as for `oml_loss`.
    num_steps: as for `oml_loss`.
    **options: as for `oml_loss`.
  """
  moving = options.pop('moving', ('body/.*', 'head/.*'))
  return oml_loss(loss_fn, rate, num_steps, moving=moving, **options)
