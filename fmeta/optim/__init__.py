"""How it moves: optax chains over ordered (pattern, multiplier) lists.

The optimisers, their sources and whether they can be differentiated are the
table in `README.md` beside this file.
"""

from fmeta.optim.adaptive import (
  adabelief,
  adafactor,
  adagrad,
  adan,
  nadam,
  radam,
  rmsprop,
  sophia,
  yogi,
)
from fmeta.optim.basic import adam, adamw, nesterov, set_hyper, sgd
from fmeta.optim.clipping import clip_by_norm, clip_by_unit
from fmeta.optim.learned import learned_rates, moving, plain_rates
from fmeta.optim.normalised import (
  MATRICES,
  TRUST,
  lamb,
  lars,
  lion,
  muon,
  novograd,
)
from fmeta.optim.parameter_free import (
  at_average,
  dog,
  prodigy,
  schedule_free,
  schedule_free_adamw,
)
from fmeta.optim.patterns import (
  DECAY,
  EVERYWHERE,
  blocks_of,
  decay_by_patterns,
  layerwise_decay,
  scale_by_patterns,
)
from fmeta.optim.rates import Rate, with_multipliers, with_rates
from fmeta.optim.schedules import (
  inverse_sqrt,
  one_cycle,
  slanted_triangular,
  warmup_constant,
  warmup_cosine,
  warmup_linear,
  warmup_polynomial,
)

__all__ = (
  'DECAY',
  'EVERYWHERE',
  'MATRICES',
  'TRUST',
  'Rate',
  'adabelief',
  'adafactor',
  'adagrad',
  'adam',
  'adamw',
  'adan',
  'at_average',
  'blocks_of',
  'clip_by_norm',
  'clip_by_unit',
  'decay_by_patterns',
  'dog',
  'inverse_sqrt',
  'lamb',
  'lars',
  'layerwise_decay',
  'learned_rates',
  'lion',
  'moving',
  'muon',
  'nadam',
  'nesterov',
  'novograd',
  'one_cycle',
  'plain_rates',
  'prodigy',
  'radam',
  'rmsprop',
  'scale_by_patterns',
  'schedule_free',
  'schedule_free_adamw',
  'set_hyper',
  'sgd',
  'slanted_triangular',
  'sophia',
  'warmup_constant',
  'warmup_cosine',
  'warmup_linear',
  'warmup_polynomial',
  'with_multipliers',
  'with_rates',
  'yogi',
)
