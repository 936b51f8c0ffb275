"""Adapters: parameters added beside a frozen model.

A factor is a leaf that bears its kernel's name and a suffix, for example
`body/layer_0/attention/query/kernel.lora_a`; a rule written for the kernel's
layer therefore also holds for its factors. This is the only folder of the
core that knows flax.linen, and it imports it when first needed.
"""

from fmeta.adapters.bitfit import bitfit, norm_tuning
from fmeta.adapters.bottleneck import bottleneck, bottleneck_init
from fmeta.adapters.dora import dora, dora_init
from fmeta.adapters.entering import entering
from fmeta.adapters.entry import check_exportable
from fmeta.adapters.factors import run_merged
from fmeta.adapters.ia3 import ia3, ia3_init
from fmeta.adapters.lora import lora, lora_init, lora_merged, lora_plus, rslora
from fmeta.adapters.lora_fa import lora_fa
from fmeta.adapters.names import kernel_name
from fmeta.adapters.norms import running_statistics
from fmeta.adapters.pissa import pissa, pissa_init, pissa_to_lora
from fmeta.adapters.prefix import prefix, prefix_init
from fmeta.adapters.prompt import prompt, prompt_init
from fmeta.adapters.reinitialise import reinitialise
from fmeta.adapters.subspace import subspace, subspace_init
from fmeta.adapters.vera import vera, vera_init

__all__ = [
  'bitfit',
  'bottleneck',
  'bottleneck_init',
  'check_exportable',
  'dora',
  'dora_init',
  'entering',
  'ia3',
  'ia3_init',
  'kernel_name',
  'lora',
  'lora_fa',
  'lora_init',
  'lora_merged',
  'lora_plus',
  'norm_tuning',
  'pissa',
  'pissa_init',
  'pissa_to_lora',
  'prefix',
  'prefix_init',
  'prompt',
  'prompt_init',
  'reinitialise',
  'rslora',
  'run_merged',
  'running_statistics',
  'subspace',
  'subspace_init',
  'vera',
  'vera_init',
]
