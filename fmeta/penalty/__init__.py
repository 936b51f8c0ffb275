"""What the parameters remember: values for `finetune(penalty=...)`."""

from fmeta.penalty.quadratic import (
  Importance,
  ewc,
  l2_sp,
  max_importance,
  moving_leaves,
  no_penalty,
)

__all__ = [
  'Importance',
  'ewc',
  'l2_sp',
  'max_importance',
  'moving_leaves',
  'no_penalty',
]
