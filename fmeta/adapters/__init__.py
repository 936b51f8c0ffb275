"""Adapters: parameters added beside a frozen model.

A factor is a leaf that bears its kernel's name and a suffix, for example
`body/layer_0/attention/query/kernel.lora_a`; a rule written for the kernel's
layer therefore also holds for its factors. This is the only folder of the
core that knows flax.linen, and it imports it when first needed.
"""

from fmeta.adapters.dora import dora, dora_init
from fmeta.adapters.factors import run_merged
from fmeta.adapters.lora import (
  lora,
  lora_init,
  lora_merged,
  lora_plus,
  rslora,
)
from fmeta.adapters.names import kernel_name
from fmeta.adapters.norms import running_statistics
from fmeta.adapters.pissa import pissa, pissa_init, pissa_to_lora
from fmeta.adapters.vera import vera, vera_init

__all__ = [
  'dora',
  'dora_init',
  'kernel_name',
  'lora',
  'lora_init',
  'lora_merged',
  'lora_plus',
  'pissa',
  'pissa_init',
  'pissa_to_lora',
  'rslora',
  'run_merged',
  'running_statistics',
  'vera',
  'vera_init',
]
