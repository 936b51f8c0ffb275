"""What the data remember: fixed-size pytrees inside the train state."""

from fmeta.memory.reservoir import reservoir

__all__ = ['reservoir']
