"""What is measured, one equation per function; numpy on the host."""

from fmeta.metrics.classification import (
  accuracy,
  confusion,
  correctness,
  expected_calibration_error,
  macro_f1,
)
from fmeta.metrics.cost import Cost, cost_of, mean_cost
from fmeta.metrics.curves import (
  Curves,
  accuracy_at_ends,
  minimum_accuracy,
  stability_gap,
  task_curves,
  windowed_forgetting,
  windowed_plasticity,
  worst_case_accuracy,
)
from fmeta.metrics.intervals import (
  Interval,
  bootstrap_ci,
  mean_ci95,
  mean_t,
  paired_bootstrap,
  paired_t,
)
from fmeta.metrics.pairs import paired_difference
from fmeta.metrics.plasticity import dormant_units, effective_rank, srank
from fmeta.metrics.streams import (
  accuracy_matrix,
  anytime_accuracy,
  average_accuracy,
  average_over_time,
  backward_transfer,
  forgetting_chaudhry,
  forgetting_first_minus_last,
  forgetting_max_over_all,
  forward_transfer,
  intransigence,
  learning_accuracy,
)

__all__ = (
  'accuracy',
  'confusion',
  'correctness',
  'expected_calibration_error',
  'macro_f1',
  'Cost',
  'cost_of',
  'mean_cost',
  'Curves',
  'accuracy_at_ends',
  'minimum_accuracy',
  'stability_gap',
  'task_curves',
  'windowed_forgetting',
  'windowed_plasticity',
  'worst_case_accuracy',
  'Interval',
  'bootstrap_ci',
  'mean_ci95',
  'mean_t',
  'paired_bootstrap',
  'paired_t',
  'paired_difference',
  'dormant_units',
  'effective_rank',
  'srank',
  'accuracy_matrix',
  'anytime_accuracy',
  'average_accuracy',
  'average_over_time',
  'backward_transfer',
  'forgetting_chaudhry',
  'forgetting_first_minus_last',
  'forgetting_max_over_all',
  'forward_transfer',
  'intransigence',
  'learning_accuracy',
)
