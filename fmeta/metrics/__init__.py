"""What is measured, one equation per function; numpy on the host."""

from fmeta.metrics.classification import (
  accuracy,
  confusion,
  correctness,
  expected_calibration_error,
  macro_f1,
)
from fmeta.metrics.intervals import (
  Interval,
  bootstrap_ci,
  mean_ci95,
  paired_bootstrap,
)
from fmeta.metrics.plasticity import dormant_units, effective_rank, srank
from fmeta.metrics.streams import (
  accuracy_matrix,
  average_accuracy,
  backward_transfer,
  forgetting_chaudhry,
  forgetting_first_minus_last,
  forgetting_max_over_all,
  forward_transfer,
)

__all__ = (
  'accuracy',
  'confusion',
  'correctness',
  'expected_calibration_error',
  'macro_f1',
  'Interval',
  'bootstrap_ci',
  'mean_ci95',
  'paired_bootstrap',
  'dormant_units',
  'effective_rank',
  'srank',
  'accuracy_matrix',
  'average_accuracy',
  'backward_transfer',
  'forgetting_chaudhry',
  'forgetting_first_minus_last',
  'forgetting_max_over_all',
  'forward_transfer',
)
