"""Adapters: parameters added beside a frozen model.

A factor is a leaf that bears its kernel's name and a suffix, for example
`body/layer_0/attention/query/kernel.lora_a`; a rule written for the kernel's
layer therefore also holds for its factors. This is the only folder of the
core that knows flax.linen, and it imports it when first needed.
"""

from fmeta.adapters.lora import lora, lora_init, lora_merged
from fmeta.adapters.names import kernel_name
from fmeta.adapters.norms import running_statistics

__all__ = [
  'kernel_name',
  'lora',
  'lora_init',
  'lora_merged',
  'running_statistics',
]
