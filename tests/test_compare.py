"""Scores of single tests, and the command that pairs two runs."""

import json

import numpy as np
import pytest

from fmeta import compare, metrics, result, scores
from fmeta.errors import UsageError
from fmeta.scores import Scores

RANDOM = np.random.default_rng(0)
EASY = RANDOM.random(200)
GROUPS = np.repeat([f'file {k}' for k in range(20)], 10)


def answers(skill, seed, seeds=3):
  """Right where an example is easy enough, with noise of each seed."""
  noise = np.random.default_rng(seed).normal(0, 0.05, (seeds, len(EASY)))
  return (EASY[None] + noise < skill).astype(int)


def saved(folder, **rows):
  folder.mkdir()
  scores.save(folder, {name.replace('_', '/'): s for name, s in rows.items()})
  return folder


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Two runs that share two rows; the second is better at one of them."""
  root = tmp_path_factory.mktemp('runs')
  one = saved(
    root / 'one',
    a_maml=Scores(answers(0.6, 1), 'list', GROUPS),
    a_mean=Scores(answers(0.5, 2, 1), 'list', GROUPS),
    a_lone=Scores(answers(0.5, 2), 'other list'),
  )
  two = saved(
    root / 'two',
    a_maml=Scores(answers(0.63, 3, 2), 'list', GROUPS),
    a_mean=Scores(answers(0.5, 2, 1), 'list', GROUPS),
  )
  return str(one), str(two)


def test_scores_are_read_as_they_were_written(tmp_path):
  given = Scores(answers(0.5, 0), 'sha256 of the examples', GROUPS)
  scores.save(
    tmp_path, {'finetune/a b': given, 'x': given._replace(groups=None)}
  )
  found = scores.load(tmp_path)
  assert list(found) == ['finetune/a b', 'x']
  np.testing.assert_array_equal(found['x'].values, given.values)
  assert found['x'].tested_on == given.tested_on and found['x'].groups is None
  # Groups come back as numbers: the same intervals, bit by bit.
  assert found['finetune/a b'].mean == given.mean
  assert [path.name for path in tmp_path.iterdir()] == [scores.SCORES]


def test_a_result_writes_its_scores_beside_it(tmp_path):
  given = {'accuracy': Scores(np.ones(3), 'three')}
  outcome = {'metrics': {'accuracy': 1.0}, 'scores': given}
  written = result.write(tmp_path, 'x', outcome, 1.0)
  assert 'scores' not in written
  assert scores.load(tmp_path)['accuracy'].mean == (1, 1, 1)
  result.write(tmp_path, 'x', {'metrics': {}}, 1.0)  # None: none are written.


def test_the_difference_is_paired(runs, tmp_path, capsys):
  out = tmp_path / 'numbers.json'
  assert compare.main([*runs, f'--out={out}']) == 0
  maml, mean = json.loads(out.read_text())
  assert maml['names'] == ['a/maml'] * 2 and mean['names'] == ['a/mean'] * 2
  assert (maml['num'], maml['groups']) == (200, 20)
  # By hand: groups as they were, not as they are stored.
  first, second = answers(0.6, 1), answers(0.63, 3, 2)
  by_hand = metrics.paired_bootstrap(second, first, GROUPS)
  np.testing.assert_allclose(maml['difference'], by_hand, rtol=0, atol=1e-12)
  assert by_hand.mean == pytest.approx(second.mean() - first.mean())
  # Far narrower than two intervals side by side would have it.
  width = lambda interval: interval[2] - interval[1]
  assert width(maml['difference']) < 0.7 * width(maml['first'])
  assert mean['difference'] == [0, 0, 0]
  printed = capsys.readouterr().out
  assert '200 in 20 groups' in printed
  assert printed.count(']*') == (by_hand.low > 0)


def test_rows_of_different_names_stand_side_by_side(runs, capsys):
  one, _ = runs
  assert compare.main([one, one, '--rows=a/mean, a/maml']) == 0
  line = capsys.readouterr().out.splitlines()[4]
  assert line.startswith('a/mean | a/maml') and ']*' in line


@pytest.mark.parametrize(
  'arguments, words',
  [
    ((0,), 'usage: python -m fmeta.compare RUN RUN'),
    ((0, 'nowhere'), "no run at 'nowhere'"),
    ((0, 1, '--rows=a/mamml'), "did you mean 'a/maml'"),
    ((0, 1, '--rows=a,b,c'), 'names 3 rows; give one or two'),
    ((0, 1, '--rows=a/lone,a/mean'), 'a paired difference needs one list'),
    ((0, 1, '--out=/'), "cannot write to '/'"),
  ],
)
def test_bad_input_is_one_line(runs, capsys, arguments, words):
  argv = [runs[x] if isinstance(x, int) else x for x in arguments]
  assert compare.main(argv) == 2
  error = capsys.readouterr().err.strip()
  assert words in error and '\n' not in error


def test_lists_that_differ_are_named_by_what_differs():
  one, other = (
    Scores(np.ones(3), f'{"ab" * 32}, 5 ways, {queries} queries')
    for queries in (1, 5)
  )
  with pytest.raises(UsageError) as caught:
    scores.minus(one, other)
  message = str(caught.value)
  assert "'5 ways, 1 queries' (3 tests) and on '5 ways, 5 queries'" in message
  with pytest.raises(UsageError, match="'cd, 5 ways'"):
    scores.minus(one, other._replace(tested_on='cd, 5 ways'))


def test_nothing_is_not_less_than_nothing():
  same = compare.Compared(
    ('a', 'a'), *[metrics.Interval(-1e-17, 0, 0)] * 3, 1, 1
  )
  assert '-0.0000' not in compare.table([same])


def test_runs_without_a_shared_row_or_scores_are_refused(runs, tmp_path):
  saved(tmp_path / 'three', b=Scores(np.ones(3), 'three'))
  with pytest.raises(UsageError, match='share no row: a/maml, a/mean and b'):
    compare.pairs_of(['a/maml', 'a/mean'], ['b'], None)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UsageError, match='has no scores.npz'):
    scores.load(tmp_path / 'empty')
  (tmp_path / 'empty' / scores.SCORES).write_bytes(b'PK no')
  with pytest.raises(UsageError, match='is no readable scores.npz'):
    scores.load(tmp_path / 'empty')


def test_lists_of_another_length_are_not_paired():
  one, two = Scores(np.ones(3), 'list'), Scores(np.ones(4), 'list')
  with pytest.raises(
    UsageError, match=r"on 'list' \(3 tests\) and on 'list' \(4"
  ):
    scores.minus(one, two)
