"""fmeta: fine-tuning is the step, meta-learning a loss, continual a stream."""

from fmeta.adapters import (
  bitfit,
  bottleneck,
  dora,
  entering,
  ia3,
  lora,
  lora_init,
  lora_merged,
  lora_plus,
  norm_tuning,
  pissa,
  prefix,
  prompt,
  reinitialise,
  rslora,
  subspace,
  vera,
)
from fmeta.averaging import averaged, ema, swa, with_average
from fmeta.errors import UsageError
from fmeta.gradients import accumulate, first_order, plain
from fmeta.learner import adapt, finetune, rehearse
from fmeta.losses import softmax_cross_entropy, squared_error, supervised
from fmeta.memory import append, beside, reservoir
from fmeta.meta import episode_loss, in_chunks, predict_episodes, reptile_loss
from fmeta.mixing import cutmix, mixup
from fmeta.penalty import ewc, l2_sp, no_penalty
from fmeta.per_leaf import adamw_per_leaf, per_leaf
from fmeta.phases import Phase, chain_thaw, gradual_unfreezing, lp_ft, phases
from fmeta.regularise import r_drop
from fmeta.reporting import reporting
from fmeta.retune import retune
from fmeta.seeds import over_seeds
from fmeta.sharpness import sharpness_aware
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
  'Phase',
  'TrainState',
  'Tuning',
  'UsageError',
  'accumulate',
  'adamw_per_leaf',
  'adapt',
  'append',
  'auto_rates',
  'auto_surgical',
  'averaged',
  'beside',
  'bitfit',
  'bottleneck',
  'chain_thaw',
  'cutmix',
  'dora',
  'ema',
  'entering',
  'episode_loss',
  'ewc',
  'finetune',
  'first_order',
  'full',
  'gradual_unfreezing',
  'ia3',
  'in_chunks',
  'l2_sp',
  'lora',
  'lora_init',
  'lora_merged',
  'lora_plus',
  'lp_ft',
  'mixup',
  'no_penalty',
  'norm_tuning',
  'over_seeds',
  'per_leaf',
  'phases',
  'pissa',
  'plain',
  'predict_episodes',
  'prefix',
  'prompt',
  'r_drop',
  'rehearse',
  'reinitialise',
  'reptile_loss',
  'reservoir',
  'reporting',
  'retune',
  'rslora',
  'select',
  'sharpness_aware',
  'softmax_cross_entropy',
  'squared_error',
  'subspace',
  'supervised',
  'swa',
  'vera',
  'with_average',
)
