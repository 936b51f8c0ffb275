"""Continual learning: methods that are more than a penalty or a memory."""

from fmeta.continual.masking import masked, masked_forward

__all__ = ['masked', 'masked_forward']
