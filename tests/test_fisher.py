import fisher_by_example
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import fisher, tree
from fmeta.errors import UsageError

KEY = jax.random.key(8)
CLASSES = 3


def _linear(params, model_state, batch, rng):
  assert rng is None  # evaluation mode
  logits = batch['x'] @ params['head']['kernel']
  return logits + params['head']['bias'][None], model_state


def _problem(rows=12):
  params, batch = toys.double(
    (
      {'head': {'kernel': jnp.zeros((4, CLASSES)), 'bias': jnp.zeros(CLASSES)}},
      toys.batch_of(rows, features=4),
    )
  )
  random = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: jnp.asarray(random.normal(size=x.shape)), params
  )
  return params, batch


def _split(batch, size):
  """Batches of `size` rows, the last one padded with weight 0."""
  rows = batch['x'].shape[0]
  out = []
  for start in range(0, rows, size):
    index = np.arange(start, start + size)
    part = jax.tree.map(lambda x, i=index: x[i % rows], batch)
    out.append({**part, 'weight': (index < rows).astype(np.float32)})
  return out


def _of(kind, params, batches):
  return kind(_linear, params, params, {}, batches, KEY)


def test_exact_fisher_of_a_softmax_model_in_closed_form(x64):
  params, batch = _problem()
  logits, _ = _linear(params, {}, batch, None)
  p = np.asarray(jax.nn.softmax(logits))
  # E_y (1[y = c] - p_c)^2 = p_c (1 - p_c), times x_i^2 for a kernel.
  spread = p * (1 - p)
  found = _of(fisher.exact_fisher, params, [batch])
  np.testing.assert_allclose(found['head']['bias'], spread.mean(0), rtol=1e-12)
  kernel = np.asarray(batch['x']).T ** 2 @ spread / len(spread)
  np.testing.assert_allclose(found['head']['kernel'], kernel, rtol=1e-12)


def test_empirical_fisher_uses_the_labels_of_the_data(x64):
  params, batch = _problem()
  logits, _ = _linear(params, {}, batch, None)
  wrong = np.asarray(
    jax.nn.one_hot(batch['label'], CLASSES) - jax.nn.softmax(logits)
  )
  found = _of(fisher.empirical_fisher, params, [batch])
  np.testing.assert_allclose(
    found['head']['bias'], (wrong**2).mean(0), rtol=1e-12
  )
  exact = _of(fisher.exact_fisher, params, [batch])
  assert not np.allclose(found['head']['bias'], exact['head']['bias'])


KINDS = [fisher.exact_fisher, fisher.sampled_fisher, fisher.empirical_fisher]
SLOW = [
  fisher_by_example.exact_fisher,
  fisher_by_example.sampled_fisher,
  fisher_by_example.empirical_fisher,
]


@pytest.mark.parametrize('kind', [*KINDS, *SLOW])
def test_batch_size_and_padding_change_nothing(kind, x64):
  params, batch = _problem()
  whole = _of(kind, params, [batch])
  parts = _of(kind, params, _split(batch, 5))
  assert len(_split(batch, 5)) == 3
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), whole, parts
  )


def test_sampled_fisher_is_unbiased(x64):
  # One row many times: draws are independent, so the standard error is known.
  params, batch = _problem()
  copies = 4000
  row = jax.tree.map(lambda x: jnp.repeat(x[:1], copies, 0), batch)
  sampled = _of(fisher.sampled_fisher, params, [row])['head']['bias']
  exact = _of(
    fisher.exact_fisher, params, [jax.tree.map(lambda x: x[:1], batch)]
  )['head']['bias']
  logits, _ = _linear(params, {}, batch, None)
  p = np.asarray(jax.nn.softmax(logits))[0]
  squares = (np.eye(CLASSES) - p) ** 2  # [drawn label, bias]
  variance = p @ squares**2 - (p @ squares) ** 2
  error = np.sqrt(variance / copies)
  np.testing.assert_allclose(exact, p @ squares, rtol=1e-12)
  assert np.all(np.abs(sampled - exact) < 4 * error)
  assert np.any(sampled != exact)


def test_padding_is_never_computed_with(x64):
  params, batch = _problem(5)
  whole = _of(fisher.exact_fisher, params, [batch])
  padded = jax.tree.map(lambda x: jnp.concatenate([x[:1], x, x[:1]]), batch)
  padded['x'] = padded['x'].at[jnp.asarray([0, 6])].set(jnp.nan)
  padded['weight'] = jnp.asarray([0, 1, 1, 1, 1, 1, 0])
  nothing = {**padded, 'weight': jnp.zeros(7)}
  found = _of(fisher.exact_fisher, params, [padded, nothing])
  assert np.all(np.isfinite(found['head']['kernel']))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), whole, found
  )


def test_batched_fisher_depends_on_the_batch_size(x64):
  params, batch = _problem()
  batched = fisher.batched_fisher
  ones = _of(batched, params, _split(batch, 1))['head']['bias']
  empirical = _of(fisher.empirical_fisher, params, [batch])['head']['bias']
  np.testing.assert_allclose(ones, empirical, rtol=1e-12)
  logits, _ = _linear(params, {}, batch, None)
  slopes = jax.nn.one_hot(batch['label'], CLASSES) - jax.nn.softmax(logits)
  for size in (2, 5, 12):
    parts = [slopes[k : k + size].mean(0) for k in range(0, 12, size)]
    by_hand = np.square(parts).mean(0)
    found = _of(batched, params, _split(batch, size))['head']['bias']
    np.testing.assert_allclose(found, by_hand, rtol=1e-12)
    assert found.sum() < 0.8 * empirical.sum()


def test_labels_must_be_classes(x64):
  params, batch = _problem()
  for kind in (fisher.empirical_fisher, fisher.batched_fisher):
    with pytest.raises(UsageError, match="no 'label'"):
      _of(kind, params, [{'x': batch['x']}])
    with pytest.raises(UsageError, match='one class per example'):
      _of(kind, params, [{**batch, 'label': jnp.ones((12, CLASSES))}])


def test_outputs_must_be_logits_of_one_row_per_example(x64):
  params, batch = _problem()

  def forward(params, state, batch, rng):
    return _linear(params, state, batch, rng)[0][:, None], state

  with pytest.raises(UsageError, match=r'\(1, 1, 3\)'):
    fisher.exact_fisher(forward, params, params, {}, [batch], KEY)


def test_only_the_moving_part_is_differentiated():
  _, params, batch, forward = toys.problem()
  moving, _ = tree.partition(params, lambda name: name.startswith('head'))
  part = fisher.exact_fisher(forward, params, moving, {}, [batch], KEY)
  assert tree.names(part) == ['head/bias', 'head/kernel']
  whole = fisher.exact_fisher(forward, params, params, {}, [batch], KEY)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5),
    part['head'],
    whole['head'],
  )
