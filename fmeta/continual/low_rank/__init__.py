"""Low-rank factors for each task, of which one pair is there at a time.

What a task has learned is added to the frozen kernels at its end (`fold`), so
neither the model nor the compiled step grows with the number of tasks.
"""

from fmeta.continual.low_rank.fold import fold
from fmeta.continual.low_rank.inf_lora import inf_lora
from fmeta.continual.low_rank.o_lora import o_lora

__all__ = ['fold', 'inf_lora', 'o_lora']
