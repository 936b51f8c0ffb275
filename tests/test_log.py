import io
import json
import math

import pytest

from fmeta.errors import UsageError
from fmeta.train import log


def record(step, **values):
  return {'step': step, 'stage': 'a', **values}


def fill(workdir, steps, start=0):
  metrics = log.Metrics(workdir, start, write=True)
  for step in steps:
    metrics.write(log.step_record(step, 'a', {'loss': 1 / step}))
  metrics.close()
  return metrics.records


def test_hex_loss_is_the_exact_float(tmp_path):
  fill(tmp_path, [3])
  line = json.loads((tmp_path / 'metrics.jsonl').read_text())
  assert float.fromhex(line['loss_hex']) == 1 / 3 == line['loss']


def test_reopening_drops_later_lines_and_keeps_earlier_bytes(tmp_path):
  fill(tmp_path, range(1, 8))
  path = tmp_path / 'metrics.jsonl'
  kept = path.read_text().splitlines(keepends=True)[:4]
  records = fill(tmp_path, [], start=4)
  assert path.read_text() == ''.join(kept)
  assert [r['step'] for r in records] == [1, 2, 3, 4]


def test_unfinished_last_line_is_dropped(tmp_path):
  fill(tmp_path, [1, 2])
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text()[:-5])
  assert [r['step'] for r in log.read_metrics(path)] == [1]


def test_resumed_file_equals_uninterrupted_file(tmp_path):
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  whole.mkdir(), broken.mkdir()
  fill(whole, range(1, 6))
  fill(broken, range(1, 5))
  fill(broken, range(3, 6), start=2)
  name = 'metrics.jsonl'
  assert (whole / name).read_bytes() == (broken / name).read_bytes()


def test_not_finite_numbers_are_null_on_disk_and_nan_in_memory(tmp_path):
  metrics = log.Metrics(tmp_path, 0, write=True)
  metrics.write(record(1, other=math.inf, evaluation={'f1': math.nan}))
  metrics.close()
  path = tmp_path / 'metrics.jsonl'
  assert json.loads(path.read_text())['other'] is None
  (read,) = log.read_metrics(path)
  assert math.isnan(read['other']) and math.isnan(read['evaluation']['f1'])


def test_without_workdir_records_stay_in_memory():
  metrics = log.Metrics(None, 0, write=True)
  metrics.write(record(1))
  metrics.sync()
  metrics.close()
  assert metrics.records == [record(1)]


def test_tensorboard_events_are_written(tmp_path):
  metrics = log.Metrics(tmp_path, 0, write=True)
  metrics.scalars(1, {'loss': 0.5, 'stage': 'a'})
  metrics.close()
  (events,) = tmp_path.glob('events.out.tfevents.*')
  assert b'loss' in events.read_bytes()


@pytest.mark.parametrize('name', ['metrics.jsonl', 'checkpoints'])
def test_used_workdir_is_refused(tmp_path, name):
  log.refuse_used(tmp_path)
  (tmp_path / name).mkdir()
  with pytest.raises(UsageError, match=f'{name!r}.*resume'):
    log.refuse_used(tmp_path)


class Terminal(io.StringIO):
  def isatty(self):
    return True


def live(stream, times, quiet=False):
  clock = iter(times)
  return log.Live(0, 10, stream=stream, clock=lambda: next(clock), quiet=quiet)


def test_terminal_line_is_rewritten_in_place_and_covers_the_longer_one():
  stream = Terminal()
  line = live(stream, [0.0, 1.0, 1.1, 2.0])
  line.update(record(1, loss=0.5, accuracy=0.25), 80.0)
  line.update(record(2, loss=0.4), 80.0)  # too soon
  line.update(record(3, loss=0.3), 80.0)
  line.close()
  first, second = stream.getvalue().split('\r')[1:]
  assert 'a step 1/10  loss 0.5000  accuracy 0.2500  80 examples/s' in first
  assert 'a step 3/10  loss 0.3000' in second and second.endswith('\n')
  assert len(second) - 1 >= len(first.rstrip())


def test_plain_lines_come_every_ten_seconds_and_at_the_end():
  stream = io.StringIO()
  line = live(stream, [0.0, 9.0, 11.0, 12.0, 13.0])
  for step, last in [(1, False), (2, False), (3, False), (10, True)]:
    line.update(record(step, loss=1.0), 5.0, last=last)
  line.close()
  lines = stream.getvalue().splitlines()
  assert ['step 2/10' in lines[0], 'step 10/10' in lines[1]] == [True, True]
  assert len(lines) == 2 and '\r' not in stream.getvalue()


def test_quiet_prints_nothing():
  stream = Terminal()
  line = live(stream, [0.0, 9.0], quiet=True)
  line.update(record(1), 1.0, last=True)
  line.close()
  assert stream.getvalue() == ''


def test_eta_extrapolates_the_time_per_step():
  text = live(io.StringIO(), [0.0]).text(record(4), 1.0, 8.0)
  assert text.endswith('ETA 0:12')
  assert log.duration(3723) == '1:02:03'
