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
from fmeta.continual.prompts import (
  coda_prompt_forward,
  coda_prompt_penalty,
  coda_prompt_tuning,
  counting_tasks,
  dual_prompt_forward,
  dual_prompt_loss,
  dual_prompt_tuning,
  given_query,
  l2p_forward,
  l2p_loss,
  l2p_tuning,
  no_tasks,
  of_this_task,
)
from fmeta.continual.qp import nonnegative_qp
from fmeta.continual.replay import der, der_plus_plus, er_ace, today

__all__ = [
  'a_gem',
  'add_exemplars',
  'bias_corrected',
  'coda_prompt_forward',
  'coda_prompt_penalty',
  'coda_prompt_tuning',
  'collect',
  'counting_tasks',
  'der',
  'der_plus_plus',
  'dual_prompt_forward',
  'dual_prompt_loss',
  'dual_prompt_tuning',
  'ease',
  'ease_forward',
  'er_ace',
  'fit_bias',
  'fold',
  'gdumb',
  'gem',
  'given_query',
  'gpm',
  'held_columns',
  'icarl_columns',
  'icarl_loss',
  'inf_lora',
  'l2p_forward',
  'l2p_loss',
  'l2p_tuning',
  'masked',
  'masked_forward',
  'nearest_exemplars',
  'no_tasks',
  'nonnegative_qp',
  'o_lora',
  'of_this_task',
  'ogd',
  'task_by_task',
  'today',
  'with_bias',
]
