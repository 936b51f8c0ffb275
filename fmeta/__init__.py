"""fmeta: fine-tuning is the step, meta-learning a loss, continual a stream."""

from fmeta.adapters import lora, lora_init, lora_merged
from fmeta.errors import UsageError
from fmeta.gradients import accumulate, first_order, plain
from fmeta.learner import adapt, append, beside, finetune, rehearse
from fmeta.losses import softmax_cross_entropy, squared_error, supervised
from fmeta.memory import reservoir
from fmeta.meta import episode_loss, in_chunks, predict_episodes, reptile_loss
from fmeta.penalty import ewc, l2_sp, no_penalty
from fmeta.surgical import auto_rates, auto_surgical
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

__all__ = (
  'Aux',
  'Forward',
  'Learner',
  'LossFn',
  'Memory',
  'Penalty',
  'TrainState',
  'Tuning',
  'UsageError',
  'accumulate',
  'adapt',
  'append',
  'auto_rates',
  'auto_surgical',
  'beside',
  'episode_loss',
  'ewc',
  'finetune',
  'first_order',
  'full',
  'in_chunks',
  'l2_sp',
  'lora',
  'lora_init',
  'lora_merged',
  'no_penalty',
  'plain',
  'predict_episodes',
  'rehearse',
  'reptile_loss',
  'reservoir',
  'select',
  'softmax_cross_entropy',
  'squared_error',
  'supervised',
)
