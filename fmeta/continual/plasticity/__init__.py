"""What keeps a network able to learn after many tasks.

L2 Init (Kumar et al. 2023, https://arxiv.org/abs/2308.11958) adds
strength * |p - p0|^2 with p0 the random start. That is `l2_sp` from there:

  finetune(loss, optimizer, penalty=l2_sp(2 * strength))

`fmeta.metrics` measures the loss of plasticity: `dormant_units`,
`effective_rank`, `srank`.
"""

from fmeta.continual.plasticity.activity import no_activity, watched
from fmeta.continual.plasticity.backprop import (
  ContinualState,
  continual_backprop,
)
from fmeta.continual.plasticity.per_entry import (
  adam_per_entry,
  scale_by_adam_per_entry,
)
from fmeta.continual.plasticity.perturb import shrink_and_perturb

__all__ = (
  'ContinualState',
  'adam_per_entry',
  'continual_backprop',
  'no_activity',
  'scale_by_adam_per_entry',
  'shrink_and_perturb',
  'watched',
)
