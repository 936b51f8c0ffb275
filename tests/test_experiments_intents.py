"""The few-shot intent table at its small setting, and what its rows move."""

import json
import math

import jax
import numpy as np
import pytest

import fmeta
from experiments import run as job
from experiments.fewshot import intent_methods, intents, text_table, text_task
from fmeta import baselines, compare, scores, tree
from fmeta.datasets import banking77
from fmeta.workdir import Context

NAMES = [f'intent_{index:02d}' for index in range(18)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """18 intents of 12 texts each, and one fold of them."""
  words = 'card money bank pay cash fee loan rate limit code'.split()
  rows = [
    (f'{words[k % 10]} {name} {k}', name) for name in NAMES for k in range(12)
  ]
  columns = {
    'text': np.array([text for text, _ in rows], object),
    'intent': np.array([name for _, name in rows], object),
  }
  monkeypatch.setattr(banking77, 'load', lambda folder: {'train': columns})
  fold = tmp_path / 'data' / 'banking77' / 'episodic' / '01'
  fold.mkdir(parents=True)
  for k, split in enumerate(('train', 'valid', 'test')):
    lines = '\n'.join(NAMES[6 * k : 6 * k + 6])
    (fold / f'labels.{split}.txt').write_text(lines + '\n')
  return tmp_path / 'data'


@pytest.fixture
def bench(tmp_path, tiny_bert, folder):
  config = intents.Config(**{**intents.SMALL, 'model': str(tiny_bert)})
  context = Context(tmp_path, data_dir=str(folder))
  texts, folds = intents.load(config, context)
  return text_task.Bench(config, context, texts, folds[1])


def execute(experiment, workdir, folder, **settings):
  argv = ['run', f'--config={experiment.__file__}', f'--workdir={workdir}']
  argv.append(f'--data_dir={folder}')
  for name, value in settings.items():
    if isinstance(value, tuple):
      value = ','.join(map(str, value))
    argv.append(f'--config.{name}={value}')
  return job.main(argv)


def test_rows_share_episodes_grids_and_controls(tmp_path, tiny_bert, folder):
  small = {**intents.SMALL, 'model': tiny_bert}
  assert execute(intents, tmp_path / 'run', folder, **small) == 0
  result = json.loads((tmp_path / 'run' / 'result.json').read_text())
  numbers, ci95 = result['metrics'], result['ci95']
  assert numbers['banking77_1shot/tests'] == 20
  trials = tmp_path / 'run' / 'trials' / 'banking77_1shot' / 'fold_01'
  rows = {path.stem: json.loads(path.read_text()) for path in trials.iterdir()}
  reference = np.array(rows[text_table.REFERENCE]['correct'])
  for name in small['methods']:
    made = rows[name]
    assert len(made['tried']) == 2 and made['setting'] in made['tried']
    assert len(made['correct']) == 20 and len(made['shuffled']) == 10
    key = f'banking77_1shot/{name} minus {text_table.REFERENCE}'
    difference = np.mean(made['correct']) - reference.mean()
    assert math.isclose(numbers[key], difference, abs_tol=1e-12)
    low, high = ci95[key]
    assert low <= numbers[key] <= high
    assert numbers[f'banking77_1shot/fold_01/{name}'] == pytest.approx(
      np.mean(made['correct'])
    )
  kept = scores.load(tmp_path / 'run')
  assert set(kept) == {
    f'banking77_1shot/{name}' for name in (text_table.REFERENCE, *rows)
  }
  assert compare.main([str(tmp_path / 'run')] * 2) == 0
  page = (tmp_path / 'run' / 'report.html').read_text()
  assert 'banking77, 5-way 1-shot' in page and 'shuffled labels' in page


def test_every_row_has_a_grid_of_one_size():
  config = intents.Config()
  inner = len(config.rate_factors) * len(config.test_steps)
  assert inner == len(config.protonet_rates) * config.checkpoints == 9
  assert set(intents.METHODS) <= {'ProtoNet', *intent_methods.INNER}


def test_the_outer_loop_moves_what_the_inner_one_does_but_for_the_head(bench):
  methods = intent_methods.Methods(bench)

  def moving(name):
    family = methods.families[intent_methods.INNER[name]]
    state = methods.outer(name).init(family.start(0), jax.random.key(0))
    return tree.names(state.trainable)

  block = [f'model/body/{n}' for n in tree.names(bench.start['body'])]
  for name in ('MAML', 'Proto-MAML', 'Reptile'):
    assert moving(name) == block
  factors = moving('LoRA-MAML')
  assert len(factors) == 2 * sum(name.endswith('/kernel') for name in block)
  assert all(name.endswith(('.lora_a', '.lora_b')) for name in factors)
  assert not bench.start['head']['kernel'].any()


def test_meta_losses_without_a_row_in_the_small_setting_take_episodes(bench):
  methods = intent_methods.Methods(bench)
  losses = {
    'Proto-MAML': methods.families['block from prototypes'].loss(),
    'Reptile': fmeta.reptile_loss(methods.families['block'].inner(), 1),
  }
  for name, loss in losses.items():
    family = methods.families[intent_methods.INNER[name]]
    batch = bench.train_tasks(0, whole=name == 'Reptile')(0)
    value, aux = jax.eval_shape(
      loss, family.start(0), {}, batch, jax.random.key(0)
    )
    assert value.shape == () and aux.weight.shape == ()


def test_one_step_of_a_zero_head_and_an_untrained_protonet_are_nearest_mean(
  bench,
):
  # States of a random model are nearly one vector.
  hidden = bench.columns['hidden']
  noise = np.random.default_rng(0).normal(size=hidden.shape)
  bench.columns['hidden'] = noise.astype(np.float32)
  batch = bench.held_out('test')[0]
  nearest = baselines.nearest_mean_episodes(
    bench.embed, baselines.nearest_mean_cosine, 5
  )
  cosine = np.asarray(jax.jit(nearest)(bench.start, batch, None))
  assert cosine.std(-1).max() > 1e-3
  # One shot, W = 0: W_k becomes rate / 5 (x_k - mean of the five), so logits
  # are rate / 5 times the cosines but for what all classes share.
  family = intent_methods.families_of(bench)['norms']
  params = family.start(0)
  hyper = tree.map_with_name(
    lambda name, rate: rate if name.startswith('head/') else rate - 40.0,
    params['hyper'],
  )
  logits = family.predict({**params, 'hyper': hyper}, batch)[:, 0]
  np.testing.assert_allclose(
    logits - logits.mean(-1, keepdims=True),
    bench.config.head_rate / 5 * (cosine - cosine.mean(-1, keepdims=True)),
    atol=1e-4,
  )
  predict = intent_methods.Methods(bench).by_prototypes
  logits = jax.jit(predict)({'body': bench.start['body']}, batch, None)
  np.testing.assert_allclose(logits, 10 * cosine, atol=1e-4)


@pytest.mark.parametrize(
  ('settings', 'words'),
  [
    ({'dataset': 'bank'}, "no data set 'bank'; possible: banking77, clinc150"),
    (
      {'methods': ('maml',)},
      "no method 'maml'; possible: ProtoNet, linear probe, ",
    ),
    ({'folds': (6,)}, 'banking77: no fold 6; the folds are 1 to 5'),
    ({'folds': (2,)}, 'banking77: episodic/02 is not in '),
    ({'iterations': 100}, '100 iterations have no 3 equal parts'),
    ({'reptile_batch': 7}, 'batches of 7 texts do not hold 5 intents evenly'),
    ({'ways': 1}, 'config.ways is 1; give at least 2'),
    ({'iterations': 0}, 'config.iterations is 0; give at least 1'),
    ({'outer_lr': -1.0}, 'config.outer_lr is -1.0; give a number above 0'),
    ({'rate_factors': (1.0, 0.0)}, 'config.rate_factors is (1.0, 0.0); give'),
    ({'test_steps': (3, 1)}, 'give numbers of steps that grow'),
    ({'control_episodes': 5}, '5 control episodes of 600; give a multiple of'),
  ],
)
def test_bad_settings_are_refused_in_one_line(
  settings, words, tmp_path, folder, capsys
):
  assert execute(intents, tmp_path / 'run', folder, **settings) == 2
  message = capsys.readouterr().err
  assert words in message and message.count('\n') == 1


def test_folds_are_merged_episode_by_episode():
  runs = [
    {
      'correct': [0.5, 1.0],
      'curve': [[0, 1], [2, 3]],
      'setting': 'a',
      'seconds': 1,
    },
    {'correct': [0.0], 'curve': [[4], [5]], 'setting': 'b', 'seconds': 2},
  ]
  made = text_table.merged(runs)
  assert made['correct'] == [0.5, 1.0, 0.0]
  assert made['curve'] == [[0, 1, 4], [2, 3, 5]]
  assert (made['setting'], made['seconds']) == ('a; b', 3)
