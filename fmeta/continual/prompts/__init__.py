"""Prompts for a stream of tasks, on a frozen transformer.

L2P, DualPrompt and CODA-Prompt: leaves beside the model's own, which a
`Tuning` adds, and a `Forward` that chooses among them per example.

  tuning = l2p_tuning(size=10, length=5, also=('head/.*',))
  loss = l2p_loss(forward, query, criterion, chosen=5, strength=0.5)
  learner = finetune(loss, adam(1e-3), tuning=tuning)
  evaluate(l2p_forward(forward, query, 5), learner.params(state), ...)

L2P is task-free. The other two know the task while training, see
`counting_tasks`, and take an optimiser `of_this_task`.
"""

from fmeta.continual.prompts.coda_prompt import (
  CODA_PROMPT,
  coda_prompt_forward,
  coda_prompt_penalty,
  coda_prompt_tuning,
)
from fmeta.continual.prompts.dual_prompt import (
  DUAL_PROMPT,
  dual_prompt_forward,
  dual_prompt_loss,
  dual_prompt_tuning,
)
from fmeta.continual.prompts.l2p import l2p_forward, l2p_loss, l2p_tuning
from fmeta.continual.prompts.query import given_query
from fmeta.continual.prompts.tasks import (
  counting_tasks,
  no_tasks,
  of_this_task,
)

__all__ = [
  'CODA_PROMPT',
  'DUAL_PROMPT',
  'coda_prompt_forward',
  'coda_prompt_penalty',
  'coda_prompt_tuning',
  'counting_tasks',
  'dual_prompt_forward',
  'dual_prompt_loss',
  'dual_prompt_tuning',
  'given_query',
  'l2p_forward',
  'l2p_loss',
  'l2p_tuning',
  'no_tasks',
  'of_this_task',
]
