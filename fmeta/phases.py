"""What moves over time: phases, as data for the host.

A phase is a number of steps and a tuning; `fmeta.retune` takes the state from
one phase to the next, and `train.Phased` makes stages of them.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fmeta.errors import UsageError
from fmeta.tuning import full, select
from fmeta.types import Tuning

Lengths = int | Sequence[int]


class Phase(NamedTuple):
  """So many steps with one tuning.

  Attributes:
    num_steps: at least 1.
    tuning: what moves.
  """

  num_steps: int
  tuning: Tuning


def phases(pairs: Iterable[tuple[int, Tuning]]) -> tuple[Phase, ...]:
  """Phases from `(num_steps, tuning)` pairs, in order.

  Raises:
    UsageError: if there are none, or a length is below 1.
  """
  made = tuple(Phase(*pair) for pair in pairs)
  if not made:
    raise UsageError('phases was given no pair; give (num_steps, tuning)')
  for index, phase in enumerate(made):
    if phase.num_steps < 1:
      raise UsageError(
        f'phase {index} has num_steps={phase.num_steps}; give at least 1'
      )
  return made


def gradual_unfreezing(
  blocks: Sequence[str], num_steps: Lengths
) -> tuple[Phase, ...]:
  """The last block first, then one more block per phase.

  Phase k of K moves blocks K - k + 1, ..., K (Howard & Ruder 2018,
  https://arxiv.org/abs/1801.06146, section 3.3: one more layer per epoch).

  Args:
    blocks: full-match patterns from the input to the output, the head last.
    num_steps: of each phase, an epoch in the paper; or one number per block.

  Raises:
    UsageError: if there are no blocks, or the lengths do not fit them.
  """
  _check_blocks(blocks)
  lengths = _lengths(num_steps, len(blocks), 'one per block')
  return phases(
    (length, select(*blocks[len(blocks) - 1 - k :]))
    for k, length in enumerate(lengths)
  )


def chain_thaw(blocks: Sequence[str], num_steps: Lengths) -> tuple[Phase, ...]:
  """The head, then each other block alone from the first on, then all.

  (Felbo et al. 2017, https://arxiv.org/abs/1708.00524, section 3.3, where a
  phase lasts until the validation loss stops falling: give `fit` a patience.)

  Args:
    blocks: full-match patterns from the input to the output, the head last.
    num_steps: of each phase, or one number per phase, one more than blocks.

  Raises:
    UsageError: if there are no blocks, or the lengths do not fit them.
  """
  _check_blocks(blocks)
  *others, head = blocks
  tunings = [select(head), *map(select, others), select(*blocks)]
  lengths = _lengths(num_steps, len(tunings), 'one per block and one for all')
  return phases(zip(lengths, tunings, strict=True))


def lp_ft(*head: str, probe_steps: int, full_steps: int) -> tuple[Phase, ...]:
  """A linear probe, then full fine-tuning from the probe's head.

  (Kumar et al. 2022, https://arxiv.org/abs/2202.10054, section 4.)

  Args:
    *head: full-match patterns of the head.
    probe_steps: steps in which only the head moves.
    full_steps: steps in which everything moves.

  Raises:
    UsageError: if there is no pattern, or a length is below 1.
  """
  if not head:
    raise UsageError("lp_ft was given no head; give its pattern, 'head/.*'")
  return phases([(probe_steps, select(*head)), (full_steps, full())])


def _check_blocks(blocks: Sequence[str]) -> None:
  if isinstance(blocks, str) or not blocks:
    raise UsageError(
      f'blocks={blocks!r}; give a list of patterns from the input to the '
      "output, for example ['body/layer_0/.*', 'body/layer_1/.*', 'head/.*']"
    )


def _lengths(num_steps: Lengths, count: int, what: str) -> Sequence[int]:
  if isinstance(num_steps, int):
    return [num_steps] * count
  if len(num_steps) != count:
    raise UsageError(
      f'num_steps has {len(num_steps)} numbers for {count} phases; give '
      f'{what}, or a single number'
    )
  return num_steps
