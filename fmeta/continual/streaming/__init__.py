"""Classifiers that a stream of features teaches without a gradient."""

from fmeta.continual.streaming.nearest_mean import (
  concatenated,
  nearest_mean_cosine,
  nearest_mean_euclid,
  simple_cil,
)
from fmeta.continual.streaming.ranpac import (
  STRENGTHS,
  choose_strength,
  random_features,
  ranpac,
  ridge,
)
from fmeta.continual.streaming.slda import slda, within_covariance
from fmeta.continual.streaming.sums import Streaming, transformed

__all__ = (
  'STRENGTHS',
  'Streaming',
  'choose_strength',
  'concatenated',
  'nearest_mean_cosine',
  'nearest_mean_euclid',
  'random_features',
  'ranpac',
  'ridge',
  'simple_cil',
  'slda',
  'transformed',
  'within_covariance',
)
