"""Losses of a batch and of remembered rows beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import fmeta
from fmeta import continual, losses, memory, optim
from fmeta.errors import UsageError

KEY = jax.random.key(1)
CE = losses.softmax_cross_entropy
PARAMS = toys.three_kernels()
CLASSES = 3


def _beside(seed=0, size=6, past=8, valid=None, **extra):
  """A batch with remembered rows beside it; weights are not all equal."""
  batch = toys.batch_of(size, seed=seed, weight=[1, 2, 0, 1, 1, 0.5][:size])
  rows = toys.batch_of(past, seed=seed + 50)
  stored = np.random.default_rng(seed + 9).normal(size=(past, CLASSES))
  valid = jnp.ones(past) if valid is None else jnp.asarray(valid, jnp.float32)
  rows = {**rows, 'outputs': jnp.asarray(stored, jnp.float32), **extra}
  return fmeta.beside(batch, rows, valid)


def _logits(x):
  return np.asarray(toys.three_layers(PARAMS, {}, {'x': x}, None)[0], float)


def _ce(logits, label, allowed=None):
  logits = logits if allowed is None else np.where(allowed, logits, -np.inf)
  top = logits.max(1, keepdims=True)
  log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(1))
  return log_sum - logits[np.arange(len(label)), label]


def _parts(batch):
  own = _logits(batch['x']), np.asarray(batch['label'])
  past = _logits(batch['memory_x']), np.asarray(batch['memory_label'])
  return own, past, np.asarray(batch['memory_outputs'], float)


def _average(values, weight):
  return np.sum(values * weight) / max(np.sum(weight), 1e-9)


def by_hand(name, batch):
  """The papers' sums in numpy."""
  (own, label), (past, past_label), stored = _parts(batch)
  weight, valid = (
    np.asarray(batch['weight']),
    np.asarray(batch['memory_weight']),
  )
  squared = ((past - stored) ** 2).mean(1)
  if name == 'der':
    return _average(_ce(own, label), weight) + 0.3 * _average(squared, valid)
  if name == 'der_plus_plus':
    replayed = _average(_ce(past, past_label)[1::2], valid[1::2])
    kept = _average(squared[::2], valid[::2])
    return _average(_ce(own, label), weight) + 0.3 * kept + 0.7 * replayed
  present = np.isin(np.arange(CLASSES), label[weight > 0])
  current = _ce(
    own, label, np.tile(present, (len(label), 1)) | np.eye(3, dtype=bool)[label]
  )
  return _average(current, weight) + _average(_ce(past, past_label), valid)


LOSSES = {
  'der': continual.der(toys.three_layers, CE, 0.3),
  'der_plus_plus': continual.der_plus_plus(toys.three_layers, CE, 0.3, 0.7),
  'er_ace': continual.er_ace(toys.three_layers, CE),
}


@pytest.mark.parametrize('name', LOSSES)
def test_the_loss_is_that_of_the_paper(name):
  loss_fn = jax.jit(LOSSES[name])
  for valid in (np.ones(8), [1, 1, 0, 1, 1, 0, 0, 0], np.zeros(8)):
    batch = _beside(valid=valid)
    found, aux = loss_fn(PARAMS, {}, batch, KEY)
    np.testing.assert_allclose(found, by_hand(name, batch), rtol=1e-6)
    np.testing.assert_allclose(aux.outputs, _logits(batch['x']), rtol=2e-6)
    assert aux.weight == 5.5
    right = _logits(batch['x']).argmax(1) == batch['label']
    weight = np.asarray(batch['weight'])
    assert np.isclose(aux.metrics['accuracy'], _average(right, weight))


@pytest.mark.parametrize('name', LOSSES)
def test_an_empty_memory_leaves_no_trace_in_value_or_gradient(name):
  grad = jax.jit(jax.value_and_grad(LOSSES[name], has_aux=True))
  batches = [_beside(valid=np.zeros(8)), _beside(valid=np.zeros(8))]
  # Whatever lies in the empty slots.
  for key in ('memory_x', 'memory_outputs'):
    batches[1][key] = batches[1][key] * 100
  first, second = (grad(PARAMS, {}, batch, KEY) for batch in batches)
  jax.tree.map(np.testing.assert_array_equal, first, second)
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(first[1]))
  plain = jax.grad(losses.supervised(toys.three_layers, CE), has_aux=True)
  if name != 'er_ace':
    expected, _ = plain(
      PARAMS, {}, toys.batch_of(6, weight=[1, 2, 0, 1, 1, 0.5]), KEY
    )
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
      expected,
      first[1],
    )


def test_labels_of_the_batch_push_no_other_class_in_er_ace():
  batch = _beside(valid=np.zeros(8))
  batch['label'] = jnp.asarray([0, 2, 1, 0, 2, 2])  # class 1 has no weight
  grads, _ = jax.grad(LOSSES['er_ace'], has_aux=True)(PARAMS, {}, batch, KEY)
  head = np.asarray(grads['head']['kernel'])
  assert not np.any(head[:, 1]) and np.all(np.any(head[:, [0, 2]], axis=0))


def test_every_class_competes_for_remembered_rows_in_er_ace():
  batch = {**_beside(), 'weight': jnp.zeros(6)}
  grads, _ = jax.grad(LOSSES['er_ace'], has_aux=True)(PARAMS, {}, batch, KEY)
  assert np.all(np.any(np.asarray(grads['head']['kernel']), axis=0))


def test_the_halves_of_der_plus_plus_share_no_row():
  batch = _beside()
  grad = jax.grad(
    lambda x: LOSSES['der_plus_plus'](
      PARAMS, {}, {**batch, 'memory_outputs': x}, KEY
    )[0]
  )
  moved = np.any(np.asarray(grad(batch['memory_outputs'])), axis=1)
  np.testing.assert_array_equal(moved, [True, False] * 4)
  # A memory that is half full serves both terms: what is valid comes first.
  half = _beside(valid=[1, 1, 1, 1, 0, 0, 0, 0])
  _, aux = LOSSES['der_plus_plus'](PARAMS, {}, half, KEY)
  assert aux.metrics['distillation'] > 0 and aux.metrics['replayed'] > 0


@pytest.mark.parametrize('name', LOSSES)
def test_classes_that_may_not_be_answered_get_no_gradient(name):
  criterion = continual.masked(CE)
  make = {
    'der': lambda f: continual.der(f, criterion, 0.3),
    'der_plus_plus': lambda f: continual.der_plus_plus(f, criterion, 0.3, 0.7),
    'er_ace': lambda f: continual.er_ace(f, criterion),
  }[name]
  batch = _beside()
  for key in ('label', 'memory_label'):
    batch[key] = batch[key] % 2
  for prefix in ('', 'memory_'):
    size = len(batch[prefix + 'label'])
    batch[prefix + 'allowed'] = jnp.tile(
      jnp.asarray([True, True, False]), (size, 1)
    )
  (_, aux), grads = jax.value_and_grad(make(toys.three_layers), has_aux=True)(
    PARAMS, {}, batch, KEY
  )
  head = np.asarray(grads['head']['kernel'])
  assert not np.any(head[:, 2]) and np.all(np.any(head[:, :2], axis=0))
  # What is remembered is the model's own.
  np.testing.assert_allclose(aux.outputs, _logits(batch['x']), rtol=2e-6)
  if name == 'der':
    (_, _), (past, _), stored = _parts(batch)
    expected = ((past - stored) ** 2)[:, :2].mean()
    np.testing.assert_allclose(aux.metrics['distillation'], expected, rtol=1e-6)


def _rehearsing(loss_fn, mix=fmeta.beside, keys=('x', 'label', 'outputs')):
  spec = {
    'x': jax.ShapeDtypeStruct((6,), jnp.float32),
    'label': jax.ShapeDtypeStruct((), jnp.int32),
    'outputs': jax.ShapeDtypeStruct((3,), jnp.float32),
  }
  held = memory.reservoir(16, {key: spec[key] for key in keys})
  return fmeta.rehearse(
    fmeta.finetune(loss_fn, optim.sgd(0.1)), held, 4, mix=mix
  )


def test_what_der_remembers_are_the_logits_before_the_step():
  learner = _rehearsing(LOSSES['der'])
  state = learner.init(PARAMS, KEY)
  batch = toys.batch_of(8)
  state, aux = jax.jit(learner.step)(state, batch, KEY)
  np.testing.assert_array_equal(
    state.memory['rows']['outputs'][:8], aux.outputs
  )
  np.testing.assert_allclose(aux.outputs, _logits(batch['x']), rtol=2e-6)
  # Its own logits have moved by then: the second step distils.
  _, aux = jax.jit(learner.step)(state, batch, KEY)
  assert aux.metrics['distillation'] > 0


def test_remembered_rows_get_the_mask_of_today():
  batch = toys.batch_of(4)
  batch['allowed'] = jnp.asarray([[True, False, True]] * 4)
  rows = {**toys.batch_of(3, seed=1), 'allowed': jnp.zeros((3, 3), bool)}
  mixed = continual.today(fmeta.beside)(batch, rows, jnp.ones(3))
  np.testing.assert_array_equal(mixed['memory_allowed'], batch['allowed'][:3])
  mixed = continual.today(fmeta.append)(batch, rows, jnp.ones(3))
  np.testing.assert_array_equal(mixed['allowed'], [[True, False, True]] * 7)


def _without(batch, *keys):
  return {k: v for k, v in batch.items() if k not in keys}


@pytest.mark.parametrize(
  ('name', 'batch', 'message'),
  [
    ('der', toys.batch_of(4), "no 'memory_\\*' keys"),
    ('der', _without(_beside(), 'memory_outputs'), "holds no 'outputs'"),
    ('der_plus_plus', _beside(past=1), 'splits 1 remembered rows'),
    (
      'er_ace',
      {
        **_beside(),
        'label': jnp.zeros((6, 3)),
        'memory_label': jnp.zeros((8, 3)),
      },
      'labels of float32',
    ),
    ('er_ace', _without(_beside(), 'memory_x'), "does not hold 'x'"),
  ],
)
def test_bad_batches_are_refused_in_one_line(name, batch, message):
  with pytest.raises(UsageError, match=message):
    jax.eval_shape(LOSSES[name], PARAMS, {}, batch, KEY)
