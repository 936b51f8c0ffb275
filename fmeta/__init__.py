"""fmeta: fine-tuning is the step, meta-learning a loss, continual a stream."""

from fmeta import (
  adapters,
  errors,
  fisher,
  gradients,
  learner,
  losses,
  memory,
  meta,
  optim,
  penalty,
  tree,
  tuning,
  types,
)
from fmeta.adapters import lora, lora_init, lora_merged
from fmeta.errors import UsageError
from fmeta.gradients import accumulate, first_order
from fmeta.learner import adapt, append, beside, finetune, rehearse
from fmeta.losses import softmax_cross_entropy, squared_error, supervised
from fmeta.memory import reservoir
from fmeta.meta import episode_loss, in_chunks, predict_episodes, reptile_loss
from fmeta.penalty import ewc, l2_sp, no_penalty
from fmeta.tuning import full, select
from fmeta.types import (
  Aux,
  Forward,
  Learner,
  LossFn,
  Memory,
  Penalty,
  TrainState,
  Tuning,
)

__all__ = [name for name in dir() if not name.startswith('_')]
