"""Closed forms of what the page shows, and the page itself."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import toys

from fmeta import data, explain, fisher, models, surgical, tree
from fmeta.errors import UsageError
from fmeta.explain import (
  activations,
  attribution,
  figures,
  images,
  recipe,
  text,
)
from fmeta.explain.flips import Flip

RANDOM = np.random.default_rng(0)


def orthogonal(size):
  return np.linalg.qr(RANDOM.normal(size=(size, size)))[0]


def test_effective_rank_is_the_exponential_of_an_entropy():
  left, right = orthogonal(5), orthogonal(4)
  values = np.array([3.0, 1.0, 0.5, 0.0])
  matrix = left[:, :4] * values @ right
  expected = np.exp(scipy.stats.entropy(values / values.sum()))
  np.testing.assert_allclose(explain.effective_rank(matrix), expected)
  np.testing.assert_allclose(explain.effective_rank(7 * np.eye(6)), 6)
  one = np.outer(np.arange(1.0, 4), np.ones(5))
  np.testing.assert_allclose(explain.effective_rank(one), 1, rtol=1e-6)
  assert explain.effective_rank(np.zeros((3, 2))) == 0
  with pytest.raises(UsageError, match=r'shape \(3,\)'):
    explain.effective_rank(np.ones(3))


BLOCKS = {'early': 'early/.*', 'late': 'late/.*'}
BEFORE = {
  'early': {'bias': jnp.zeros(2), 'kernel': jnp.full((2, 2), 2.0)},
  'late': {'bias': jnp.zeros(2)},
}
AFTER = {
  'early': {'bias': jnp.array([3.0, 0]), 'kernel': 2 + 4 * jnp.eye(2)},
  'late': {'bias': jnp.array([0.0, 1])},
}


def test_relative_change_and_rank_are_per_block():
  change = explain.relative_change(BEFORE, AFTER, BLOCKS)
  # |(3, 0)|^2 + |4 I|^2 = 9 + 32, over four weights of 2.
  np.testing.assert_allclose(change['early'], np.sqrt(41) / 4, rtol=1e-6)
  assert change['late'] == float('inf')
  ranks = explain.change_ranks(BEFORE, AFTER, BLOCKS)
  np.testing.assert_allclose(ranks['early'], (2, 2), rtol=1e-6)
  assert ranks['late'] is None
  still = explain.relative_change(BEFORE, BEFORE, BLOCKS)
  assert still == {'early': 0.0, 'late': 0.0}
  with pytest.raises(UsageError, match="'late/bias' has shape"):
    explain.relative_change(BEFORE, {'early': AFTER['early']}, BLOCKS)


def test_linear_cka_is_its_feature_form_and_ignores_rotations():
  x, y = RANDOM.normal(size=(30, 5)), RANDOM.normal(size=(30, 8))
  a, b = x - x.mean(0), y - y.mean(0)
  norms = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
  expected = np.linalg.norm(b.T @ a) ** 2 / norms
  np.testing.assert_allclose(explain.linear_cka(x, y), expected, rtol=1e-10)
  turned = 3 * x @ orthogonal(5) + RANDOM.normal(size=5)
  np.testing.assert_allclose(explain.linear_cka(x, turned), 1, rtol=1e-10)
  with pytest.raises(UsageError, match='same representation'):
    explain.linear_cka(x, np.ones((30, 2)))
  with pytest.raises(UsageError, match=r'CKA of \(30, 5\)'):
    explain.linear_cka(x, y[:4])


def product(x, scale):
  return scale * x[0] * x[1] + x[2] ** 2


def test_integrated_gradients_of_a_polynomial_are_exact(x64):
  x, baseline = jnp.array([2.0, 3.0, 4.0]), jnp.array([0.0, 0.0, 1.0])
  found = explain.integrated_gradients(product, x, baseline, 5.0, steps=2)
  # The product's share is halved between its factors: int_0^1 t dt = 1/2.
  np.testing.assert_allclose(found.values, [15, 15, 15], rtol=1e-12)
  assert found.total == 45
  assert found.error < 1e-12


def test_completeness_error_shrinks_with_the_steps(x64):
  def fun(x):
    return jnp.tanh(3 * x).sum() * x[0]

  x = jnp.array([1.0, -2.0])
  errors = [
    explain.integrated_gradients(fun, x, 0 * x, steps=n).error for n in (3, 40)
  ]
  assert errors[1] < 1e-7 < 1e-3 < errors[0]
  with pytest.raises(UsageError, match='steps=0'):
    explain.integrated_gradients(fun, x, x, steps=0)
  with pytest.raises(UsageError, match='give equal ones'):
    explain.integrated_gradients(fun, x, jnp.zeros(3))


def test_an_attribution_of_nothing_has_no_finite_error():
  assert explain.integrated_gradients(product, jnp.ones(3), jnp.ones(3), 1.0)
  assert attribution.Attribution(np.zeros(2), 0.0, 0.0).error == 0
  assert attribution.Attribution(np.ones(2), 0.0, 2.0).error == float('inf')


def linear_image(params, model_state, batch, rng):
  flat = batch['image'].reshape(len(batch['image']), -1)
  return flat @ params['head']['kernel'] * model_state['scale'], model_state


def test_pixels_of_a_linear_model_are_weight_times_pixel():
  image = RANDOM.uniform(size=(4, 4, 3)).astype(np.float32)
  kernel = RANDOM.normal(size=(48, 5)).astype(np.float32)
  found = explain.pixels(
    linear_image,
    {'head': {'kernel': kernel}},
    {'scale': jnp.asarray(2.0)},
    image,
    3,
    steps=2,
  )
  expected = 2 * image * kernel[:, 3].reshape(4, 4, 3)
  np.testing.assert_allclose(found.values, expected, rtol=1e-5, atol=1e-6)
  assert found.error < 1e-4
  # Blue where the pixel speaks for the class.
  colours = figures.heat(found.values)
  blue = colours[..., 2] > colours[..., 0]
  np.testing.assert_array_equal(blue, expected.sum(-1) > 0)


def test_image_pages_show_each_image_beside_its_heat_map():
  pictures = RANDOM.uniform(size=(3, 4, 4, 3)).astype(np.float32)
  kernel = RANDOM.normal(size=(48, 5)).astype(np.float32)
  params, state = {'head': {'kernel': kernel}}, {'scale': jnp.asarray(2.0)}
  case = explain.Case(linear_image, params, params, [], state, state)
  shares = np.eye(5)[[0, 1, 2]]
  found = explain.Measured([], np.arange(3), shares, shares, [], 0)
  shown = images.explained(case, pictures, found, list('abcde'), 2, steps=2)
  assert len(shown) == 2 and len(images.examples(pictures)) == 3
  logit = 2 * (pictures[1].ravel() @ kernel[:, 1])
  assert f'b (label b), logit {logit:+.2f} against black' == shown[1].title
  assert shown[1].shown.count('<img') == 2 and shown[1].error < 1e-4


CONFIG = models.BertConfig(20, 8, 1, 2, 16, 12)


@pytest.fixture(scope='module')
def bert():
  module = models.BertClassifier(CONFIG, 3)
  ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), ids, ids)['params']
  params = jax.tree.map(
    lambda x: jnp.asarray(RANDOM.normal(0, 0.5, x.shape), jnp.float32), shapes
  )
  return models.forward(module), params


def test_tokens_add_up_to_the_logit_minus_that_of_padding(bert):
  forward, params = bert
  ids = np.array([[2, 7, 9, 11, 3, 0]], np.int32)
  batch = {'input_ids': ids, 'attention_mask': np.int32([[1, 1, 1, 1, 1, 0]])}
  fixed = [True, False, False, False, True, True]
  found = explain.tokens(forward, params, batch, 2, fixed=fixed, steps=40)
  assert found.values.shape == (6,)
  assert not found.values[fixed].any() and found.values[1:4].all()
  padded = {**batch, 'input_ids': np.int32([[2, 0, 0, 0, 3, 0]])}
  run = jax.jit(lambda b: forward(params, {}, b, None)[0][0, 2])
  difference = float(run(batch)) - float(run(padded))
  np.testing.assert_allclose(found.total, difference, rtol=1e-4, atol=1e-5)
  # Forty nodes leave this much of the integral, see `found.error`.
  np.testing.assert_allclose(found.values.sum(), difference, rtol=1e-4)
  assert found.error < 1e-2
  with pytest.raises(UsageError, match='2 marks for 6 tokens'):
    explain.tokens(forward, params, batch, 2, fixed=[True, False])


def test_flips_are_fixed_broken_or_still_wrong():
  before = np.array([[0.9, 0.1, 0], [0.6, 0.4, 0], [0.5, 0.3, 0.2], [1, 0, 0]])
  after = np.array([[0.8, 0.2, 0], [0.3, 0.7, 0], [0, 0.1, 0.9], [0, 1, 0]])
  found = explain.flips(before, after, np.array([0, 1, 1, 0]))
  assert found == [
    Flip(3, 0, (0, 1.0), (1, 1.0)),
    Flip(2, 1, (0, 0.5), (2, 0.9)),
    Flip(1, 1, (0, 0.6), (1, 0.7)),
  ]
  assert [f.kind for f in found] == ['broken', 'still wrong', 'fixed']
  with pytest.raises(UsageError, match='for labels'):
    explain.flips(before, after, np.zeros(3, int))


LOSS, START, BATCH, FORWARD = toys.problem()
NAMES = ['body/layer_0', 'body/layer_1', 'head']


@pytest.fixture(scope='module')
def measured():
  """A net whose layer 1 and head have moved, on twelve examples."""
  columns = jax.tree.map(np.asarray, toys.batch_of(12))
  batches = data.eval_batches(columns, 8)
  end = tree.map_with_name(
    lambda n, x: x if 'layer_0' in n else x + 3 * RANDOM.normal(size=x.shape),
    START,
  )
  end = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), end)
  told = recipe.Recipe(
    'x', 0, (0.1, 0.3, 0.2), (('.*/layer_0/.*', 0.0), ('.*', 2.0))
  )
  case = explain.Case(FORWARD, START, end, batches, recipe=told)
  return case, explain.measure(case, fisher_examples=5)


def test_rows_are_the_numbers_of_the_functions(measured):
  case, found = measured
  rows = {row.name: row for row in found.rows}
  assert list(rows) == NAMES
  sizes = [tree.size(tree.get(START, name)) for name in NAMES]
  assert [row.parameters for row in found.rows] == sizes
  first = rows['body/layer_0']
  assert (first.change, first.rank, first.rate) == (0, (0.0, 5.0), 0)
  np.testing.assert_allclose(first.cka, 1, rtol=1e-6)
  patterns = {name: f'{name}/.*' for name in NAMES}
  change = explain.relative_change(START, case.after, patterns)
  ratio = surgical.relative_gradients(LOSS, START, case.batches, patterns)
  for name in NAMES:
    assert rows[name].change == change[name]
    np.testing.assert_allclose(rows[name].ratio, ratio[name], rtol=1e-5)
  assert rows['head'].rate == 0.6
  assert rows['body/layer_1'].cka < 0.999
  some = jax.tree.map(lambda x: x[:5], case.batches[0])
  exact = fisher.sampled_fisher(
    FORWARD, case.after, case.after, {}, [some], jax.random.key(0)
  )
  mean = np.concatenate([np.ravel(x) for x in jax.tree.leaves(exact['head'])])
  np.testing.assert_allclose(rows['head'].fisher, mean.mean(), rtol=1e-5)
  assert found.fisher_examples == 5


def test_activations_are_those_of_the_modules(measured):
  case, found = measured
  _, rows = activations.run_through(
    FORWARD, START, {}, case.batches, ('body/layer_0', 'body/nothing')
  )
  layer = START['body']['layer_0']
  x = np.concatenate([batch['x'] for batch in case.batches])[:12]
  expected = x @ layer['kernel'] + np.asarray(layer['bias'])[None]
  assert set(rows) == {'body/layer_0'}
  np.testing.assert_allclose(rows['body/layer_0'], expected, atol=1e-5)
  assert len(found.labels) == len(found.before) == 12


def test_the_page_is_self_contained_and_shows_every_flip(measured, tmp_path):
  case, found = measured
  assert found.flips
  names = ['<a>', 'b', 'c']
  page = explain.Page(
    'A & B',
    names,
    [explain.Example(f'example {i}') for i in range(12)],
    [explain.Explained('<i>x</i>', 'why', 0.0123)],
    {'start': '<x>'},
    case.recipe,
  )
  written = explain.write(tmp_path, found, page)
  assert [path.name for path in written] == [
    'explain.html',
    'explain_blocks.png',
    'explain_rates.png',
  ]
  assert all(p.read_bytes()[1:4] == b'PNG' for p in written[1:])
  shown = written[0].read_text()
  assert 'A &amp; B' in shown and '&lt;x&gt;' in shown and '<a>' not in shown
  assert not re.search(r'(src|href)="(?!data:)|<script|url\(', shown)
  assert all(f'example {f.index}<' in shown for f in found.flips)
  assert 'completeness error 1.2%' in shown
  assert all(name in shown for name in NAMES)
  share = 100 * found.accuracy(found.after)
  assert f'to {share:.1f}%' in shown
  rest = explain.write(tmp_path, found, page._replace(recipe=None))
  assert len(rest) == 2 and 'no record of its rates' in rest[0].read_text()


def test_a_recipe_comes_back_and_a_broken_one_is_refused(tmp_path):
  assert recipe.load(tmp_path) is None
  told = recipe.Recipe('wheel:x', 3, (0.1, 0.2), (('head/.*', 10.0), ('.*', 1)))
  recipe.save(tmp_path, told)
  assert recipe.load(tmp_path) == told
  (tmp_path / 'explain.json').write_text(json.dumps({'source': 'x'}))
  with pytest.raises(UsageError, match=r'is no recipe \(KeyError'):
    recipe.load(tmp_path)


def test_block_multipliers_are_means_over_parameters():
  found = recipe.block_multipliers(
    (('.*/bias', 7.0), ('early/.*', 1.0)), BEFORE, BLOCKS
  )
  assert found == {'early': (2 * 7 + 4) / 6, 'late': 7.0}
  assert recipe.block_multipliers((('late/.*', 2.0),), BEFORE, BLOCKS) == {
    'early': 0.0,
    'late': 2.0,
  }


def test_examples_are_read_as_they_were_written(tmp_path):
  path = tmp_path / 'examples.tsv'
  text.write_examples(path, ['a\nb', 'c\td', 'e'], ['x', 'y', 'x'])
  texts, classes = text.read_examples(path, ('y', 'x'), 10)
  assert texts == ['a b', 'c d', 'e']
  assert classes.tolist() == [1, 0, 1]
  assert len(text.read_examples(path, ('y', 'x'), 2)[0]) == 2


@pytest.mark.parametrize(
  'content, words',
  [
    (b'x\ta\nno tab\n', 'line 2 of'),
    (b'z\ta\n', "possible: ['x', 'y']"),
    (b'x\ta\n', 'holds 1 examples'),
    (b'\xff\xfe', 'cannot be read'),
  ],
)
def test_bad_examples_are_named(tmp_path, content, words):
  path = tmp_path / 'examples.tsv'
  path.write_bytes(content)
  with pytest.raises(UsageError, match=re.escape(words)):
    text.read_examples(path, ('x', 'y'), 10)


def test_tokens_are_coloured_by_sign_and_joined_by_word():
  shown = text.coloured(['a<', '##b', 'c'], np.array([1.0, -2.0, 0.5]))
  assert '>a&lt;</span><span' in shown and '>b</span> <span' in shown
  assert 'rgba(0,114,178,0.38)' in shown and 'rgba(213,94,0,0.75)' in shown


def test_measuring_needs_labels_and_one_model(measured):
  case, _ = measured
  with pytest.raises(UsageError, match='no labelled examples'):
    explain.measure(case._replace(batches=[{'x': np.ones((2, 6))}]))
  other = toys.init_of(toys.Net(classes=4))[0]
  with pytest.raises(UsageError, match="'head/bias' has shape"):
    explain.measure(case._replace(before=other))
