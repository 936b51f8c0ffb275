"""Continual learning: methods that are more than a penalty or a memory."""

from fmeta.continual.masking import masked, masked_forward
from fmeta.continual.replay import der, der_plus_plus, er_ace, today

__all__ = [
  'der',
  'der_plus_plus',
  'er_ace',
  'masked',
  'masked_forward',
  'today',
]
