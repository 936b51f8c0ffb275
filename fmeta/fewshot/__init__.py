"""Few-shot methods, each a value for the one step.

A closed-form head or the multi-step loss is a `LossFn`, Proto-MAML and CAVIA
choose where the inner loop starts, step rates and meta-curvature are optax
transformations, a T-Net is a `Forward`. What needs nothing of this: ANIL and
BOIL are an inner `tuning=select('head/.*')` or `select('body/.*')`, Meta-SGD
has a rate per weight among its outer parameters (`optim.sgd` with
`multipliers`; `optim.learned_rates` has one per pattern).
"""

from fmeta.fewshot.by_step import predict_by_step
from fmeta.fewshot.cosine import cosine_classifier
from fmeta.fewshot.domains import from_domains
from fmeta.fewshot.episode_losses import (
  Start,
  beside_support,
  head_forward,
  head_loss,
  predict_from,
  predict_head,
  starting_from,
)
from fmeta.fewshot.fine_tuned import predict_fine_tuned, support_loss
from fmeta.fewshot.heads import (
  Head,
  Learned,
  cosine_prototypes,
  learned_ridge,
  matching,
  prototypes,
  ridge,
  ridge_init,
)
from fmeta.fewshot.leo import leo_init, leo_loss, leo_start, predict_leo
from fmeta.fewshot.maml_plus_plus import (
  annealed_weights,
  multi_step_loss,
  step_offsets,
  step_offsets_init,
  step_rates,
  step_rates_init,
  with_step_weights,
)
from fmeta.fewshot.meta_curvature import curvature_init, meta_curvature
from fmeta.fewshot.relation import relation, relation_error, relation_init
from fmeta.fewshot.starts import (
  context_start,
  of_model,
  prototype_start,
  with_context,
)
from fmeta.fewshot.varied_episodes import (
  Limits,
  varied_episodes,
)
from fmeta.fewshot.warp import warp_init, warped

__all__ = (
  'Head',
  'Learned',
  'Limits',
  'Start',
  'annealed_weights',
  'beside_support',
  'context_start',
  'cosine_classifier',
  'cosine_prototypes',
  'curvature_init',
  'from_domains',
  'head_forward',
  'head_loss',
  'learned_ridge',
  'leo_init',
  'leo_loss',
  'leo_start',
  'matching',
  'meta_curvature',
  'multi_step_loss',
  'of_model',
  'predict_by_step',
  'predict_fine_tuned',
  'predict_from',
  'predict_head',
  'predict_leo',
  'prototype_start',
  'prototypes',
  'relation',
  'relation_error',
  'relation_init',
  'ridge',
  'ridge_init',
  'starting_from',
  'step_offsets',
  'step_offsets_init',
  'step_rates',
  'step_rates_init',
  'support_loss',
  'varied_episodes',
  'warp_init',
  'warped',
  'with_context',
  'with_step_weights',
)
