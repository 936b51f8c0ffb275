"""Rows of weight zero change no loss and no gradient, whatever the method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_fewshot_differences as differences
import test_leo as leo
import test_varied_episodes as varied
import toys

from fmeta import fewshot, models, optim, penalty, through
from fmeta.learner import finetune
from fmeta.meta import episode_loss
from fmeta.testing import assert_close

SGD = optim.sgd(0.3)
THREE = differences.THREE


def padded(rows, seed):
  """The last row is padding; without it every class is there."""
  batch = toys.batch_of(rows, seed=seed)
  batch['label'] = jnp.arange(rows) % 3
  weight = jnp.ones(rows).at[-1].set(0.0)
  x = batch['x'].at[-1].set(100.0)
  return {**batch, 'x': x, 'weight': weight}


def episodes():
  parts = [
    {'support': padded(5, k), 'query': padded(4, 10 + k)} for k in range(2)
  ]
  batch = jax.tree.map(lambda *x: jnp.stack(x), *parts)
  return {**batch, 'step_weight': jnp.tile(jnp.asarray([[0.3, 0.7]]), (2, 1))}


def alone(batch):
  parts = {
    part: {k: v[:, :-1] for k, v in batch[part].items() if k != 'weight'}
    for part in ('support', 'query')
  }
  return {**batch, **parts}


def maml():
  return episode_loss(finetune(THREE, SGD), THREE, 2), toys.three_kernels()


def imaml():
  inner = finetune(THREE, SGD, penalty=penalty.l2_sp(0.5))
  way = through.implicit(through.cg(2))
  return episode_loss(inner, THREE, 3, through=way), toys.three_kernels()


def of_row(row):
  return row.loss, row.params


ROWS = {
  'maml': maml,
  'maml++': lambda: of_row(differences.maml_plus_plus()),
  'meta-sgd': lambda: of_row(differences.meta_sgd()),
  'imaml': imaml,
  'leo': lambda: (leo.LOSS, leo.model()),
}


def slope(loss, params, batch):
  run = lambda p, b: loss(p, {}, b, None)[0]
  return jax.jit(jax.value_and_grad(run))(params, batch)


@pytest.mark.parametrize('name', ROWS)
def test_padded_rows_change_nothing(name, x64):
  loss, params = ROWS[name]()
  params, batch = toys.double((params, episodes()))
  found = slope(loss, params, batch)
  assert_close(slope(loss, params, alone(batch)), found, name, 1e-12)


def test_tasks_of_other_sizes_side_by_side_are_the_mean_of_each_alone(x64):
  names = ('x', 'label', 'weight')
  batch = varied.source(tasks=3)(0)
  batch = {p: {k: batch[p][k] for k in names} for p in batch}
  params, _ = models.init(
    varied.NormNet(6),
    varied.KEY,
    {'x': np.zeros((2, 4), np.float32)},
    ('x',),
  )
  params = toys.double(params)
  loss = varied.learners(names[::2])['prototypes']
  found = slope(loss, params, toys.double(batch))
  sizes, each = set(), []
  for task in range(3):
    one = {p: varied.real(batch[p], task) for p in batch}
    one = {p: {k: v[k][None] for k in names[:2]} for p, v in one.items()}
    sizes.add(one['support']['x'].shape)
    plain = varied.learners(('x',))['prototypes']
    each.append(slope(plain, params, toys.double(one)))
  assert len(sizes) == 3
  mean = jax.tree.map(lambda *x: sum(x) / 3, *each)
  assert_close(mean, found, 'three tasks', 1e-12)


def test_an_absent_class_changes_nothing_in_leo(x64):
  # Without the encoder's penalty, a mean over all ways.
  params, batch = toys.double((leo.model(), leo.episodes(1)))
  batch['query']['label'] %= 2
  keep = np.asarray(batch['support']['label'][0]) < 2
  support = jax.tree.map(lambda x: x[:, keep], batch['support'])
  wide = {**batch['support'], 'weight': keep[None] + 0.0}

  def loss(ways):
    return fewshot.leo_loss(
      leo.embed, ways, latent_steps=1, head_steps=1, kl=0.3, encoder=0.0
    )

  expected = slope(loss(2), params, {**batch, 'support': support})
  found = slope(loss(3), params, {**batch, 'support': wide})
  assert_close(expected, found, 'LEO', 1e-12)
