"""EASE: an adapter for each task, and one classifier over all of them."""

from fmeta.continual.ease.learner import ease, ease_forward
from fmeta.continual.ease.prototypes import (
  complement,
  completed,
  ensemble,
  means,
)

__all__ = [
  'complement',
  'completed',
  'ease',
  'ease_forward',
  'ensemble',
  'means',
]
