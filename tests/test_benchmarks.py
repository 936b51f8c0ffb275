"""The harness of the benchmarks; what they measure is no test's business."""

import os

import numpy as np
import pytest

from experiments.benchmarks import finetune
from experiments.benchmarks.paired import Contender, compare, ratio_of
from fmeta.errors import UsageError


def counting(size):
  def run(steps):
    for _ in range(steps):
      sum(range(size))

  return run


def holding(size):
  def run(steps):
    held = b'1' * size  # written, so resident
    assert len(held) == size

  return run


def failing(size):
  raise ValueError(f'size {size} is bad')


def dying(size):
  return lambda steps: os._exit(size)


def test_the_ratio_is_the_median_of_pairs_and_not_of_means():
  # One pair was disturbed: 10 and 1000 seconds instead of 1 and 2.
  times = np.array([[1.0, 2.0]] * 10 + [[10.0, 1000.0]])
  ratio = ratio_of(times)
  assert ratio.median == ratio.low == ratio.high == 2.0
  assert ratio.seconds == (1.0, 2.0) and ratio.pairs == 11


def test_the_interval_holds_the_median_and_widens_with_noise():
  random = np.random.default_rng(1)
  calm, wild = (
    ratio_of(np.exp(random.normal(0, s, (30, 2)))) for s in (0.01, 0.5)
  )
  for ratio in (calm, wild):
    assert ratio.low <= ratio.median <= ratio.high
  assert wild.high - wild.low > 10 * (calm.high - calm.low)


def test_contenders_take_turns_and_end():
  first, second = (
    Contender(f'{size}', counting, size=size) for size in (10, 20)
  )
  ratio = compare(first, second, pairs=3, steps=2)
  assert ratio.pairs == 3 and min(ratio.seconds) > 0
  with pytest.raises(UsageError, match='at least 2'):
    compare(first, second, pairs=1, steps=1)
  for contender in (first, second):
    contender.close()
    assert contender._process.exitcode == 0


def test_a_contender_reports_its_own_memory_and_its_first_step():
  most = 300 * 2**20
  contender = Contender('large', holding, size=most)
  assert contender.first_seconds is None
  contender.seconds(1)
  first = contender.first_seconds
  contender.seconds(2)
  contender.close()
  assert contender.first_seconds == first > 0
  assert most < contender.peak_bytes < 5 * most


def test_a_contender_that_cannot_start_says_why():
  with pytest.raises(UsageError, match='broken could not start.*size 3 is bad'):
    Contender('broken', failing, size=3)


def test_a_contender_that_dies_gives_its_exit_status():
  contender = Contender('fragile', dying, size=7)
  with pytest.raises(UsageError, match='fragile died with exit status 7'):
    contender.seconds(1)


@pytest.mark.oracle
# peft reads a name that transformers is about to rename.
@pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing')
def test_both_sides_of_the_fine_tuning_benchmark_run():
  config = finetune.Config(batch_size=2, max_length=8, batches=1)
  batches = finetune.batches_of(finetune.texts(config), config, 'fixed')
  for row in finetune.ROWS:
    for make in (finetune.make_fmeta, finetune.make_torch):
      make(row, config, batches)(1)


def test_all_ways_to_make_batches_hold_the_same_texts():
  config = finetune.Config(batch_size=4, max_length=40, batches=3)
  columns = finetune.texts(config)
  seen, widths = {}, {}
  for how in ('fixed', 'longest', 'grouped', 'bucketed'):
    made = finetune.batches_of(columns, config, how)
    widths[how] = sum(batch['input_ids'].shape[1] for batch in made)
    seen[how] = sorted(
      (tuple(ids[mask == 1]), label)
      for batch in made
      for ids, mask, label in zip(
        batch['input_ids'],
        batch['attention_mask'],
        batch['label'],
        strict=True,
      )
    )
  assert widths['fixed'] == 3 * 40
  assert widths['grouped'] <= widths['longest'] <= widths['fixed']
  assert all(rows == seen['fixed'] for rows in seen.values())


def test_packed_steps_see_the_texts_of_the_padded_ones():
  config = finetune.Config(batch_size=4, max_length=40, batches=3)
  columns = finetune.texts(config)
  padded = finetune.batches_of(columns, config, 'longest')
  packed = finetune.batches_of(columns, config, 'packed')
  for ours, theirs in zip(packed, padded, strict=True):
    lengths = theirs['attention_mask'].sum(1)
    np.testing.assert_array_equal(ours['length'], lengths)
    np.testing.assert_array_equal(ours['label'], theirs['label'])
    for index, length in enumerate(lengths):
      own = ours['input_ids'][ours['text_ids'] == index]
      np.testing.assert_array_equal(own, theirs['input_ids'][index, :length])
  share = finetune.filled(packed)
  assert share > finetune.filled(padded)
