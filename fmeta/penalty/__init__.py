"""What the parameters remember: values for `finetune(penalty=...)`."""

from fmeta.penalty.all_of import all_of
from fmeta.penalty.feature_distillation import feature_distillation
from fmeta.penalty.kfac import ewc_kfac
from fmeta.penalty.leaves import moving_leaves
from fmeta.penalty.lwf import lwf
from fmeta.penalty.mas import mas, output_sensitivity
from fmeta.penalty.online_ewc import online_ewc
from fmeta.penalty.quadratic import (
  Importance,
  ewc,
  l2_sp,
  max_importance,
  no_penalty,
  require_penalty,
)
from fmeta.penalty.rwalk import rwalk
from fmeta.penalty.si import si

__all__ = [
  'Importance',
  'all_of',
  'ewc',
  'ewc_kfac',
  'feature_distillation',
  'l2_sp',
  'lwf',
  'mas',
  'max_importance',
  'moving_leaves',
  'no_penalty',
  'online_ewc',
  'output_sensitivity',
  'require_penalty',
  'rwalk',
  'si',
]
