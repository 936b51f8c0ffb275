"""Continual learning: methods that are more than a penalty or a memory."""

from fmeta.continual.bic import bias_corrected, fit_bias, with_bias
from fmeta.continual.ease import ease, ease_forward
from fmeta.continual.gdumb import collect, gdumb, held_columns
from fmeta.continual.gem import a_gem, gem, task_by_task
from fmeta.continual.gpm import gpm
from fmeta.continual.icarl import (
  add_exemplars,
  icarl_columns,
  icarl_loss,
  nearest_exemplars,
)
from fmeta.continual.low_rank import fold, inf_lora, o_lora
from fmeta.continual.masking import masked, masked_forward
from fmeta.continual.ogd import ogd
from fmeta.continual.qp import nonnegative_qp
from fmeta.continual.replay import der, der_plus_plus, er_ace, today

__all__ = [
  'a_gem',
  'add_exemplars',
  'bias_corrected',
  'collect',
  'der',
  'der_plus_plus',
  'ease',
  'ease_forward',
  'er_ace',
  'fit_bias',
  'fold',
  'gdumb',
  'gem',
  'gpm',
  'held_columns',
  'icarl_columns',
  'icarl_loss',
  'inf_lora',
  'masked',
  'masked_forward',
  'nearest_exemplars',
  'nonnegative_qp',
  'o_lora',
  'ogd',
  'task_by_task',
  'today',
  'with_bias',
]
