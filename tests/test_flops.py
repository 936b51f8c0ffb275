"""Counted operations against sizes worked out by hand, and against XLA."""

import jax
import jax.numpy as jnp
import pytest
import toys

from fmeta import optim
from fmeta.learner import adapt, finetune
from fmeta.meta import episode_loss
from fmeta.train.dispatch import Program
from fmeta.train.flops import product_flops

LOSS, PARAMS, BATCH, _ = toys.problem()
SGD = optim.sgd(0.1)


def counted(fun, *args, repeat=True):
  return product_flops(jax.jit(fun).trace(*args).jaxpr, repeat=repeat)


def test_a_product_takes_two_operations_per_term():
  x, y = jnp.ones((7, 3, 4)), jnp.ones((7, 4, 5))
  assert counted(jnp.matmul, x, y) == 2 * 7 * 3 * 4 * 5


@pytest.mark.parametrize('groups', [1, 2])
def test_a_convolution_takes_two_operations_per_term(groups):
  image, kernel = jnp.ones((2, 8, 8, 6)), jnp.ones((3, 3, 6 // groups, 4))

  def convolve(x, w):
    return jax.lax.conv_general_dilated(
      x,
      w,
      (2, 2),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=groups,
    )

  outputs = 2 * 4 * 4 * 4
  assert counted(convolve, image, kernel) == 2 * 9 * (6 // groups) * outputs


def test_a_scan_counts_as_often_as_it_runs():
  def power(x):
    return jax.lax.scan(lambda y, _: (y @ x, None), x, length=11)[0]

  x = jnp.ones((3, 3))
  assert counted(power, x) == 11 * 54
  assert counted(power, x, repeat=False) == 54


def test_of_a_conditional_the_dearest_branch_counts():
  def one_or_two(x):
    return jax.lax.cond(x.sum() > 0, lambda: x @ x, lambda: x @ x @ x)

  assert counted(one_or_two, jnp.ones((3, 3))) == 2 * 54


def test_products_are_most_of_what_xla_counts_without_loops():
  x, y = jnp.ones((64, 64)), jnp.ones((64, 64))
  compiled = jax.jit(lambda x, y: jnp.tanh(x @ y) @ y).lower(x, y).compile()
  found = counted(lambda x, y: jnp.tanh(x @ y) @ y, x, y)
  assert 0.95 < found / compiled.cost_analysis()['flops'] <= 1


def flops_of(inner_steps, length=2):
  inner = finetune(LOSS, SGD)
  learner = finetune(episode_loss(inner, LOSS, inner_steps), SGD)
  episode = {'support': toys.batch_of(4), 'query': toys.batch_of(4, seed=1)}
  batches = jax.tree.map(lambda x: jnp.stack([x[None]] * length), episode)
  # Copied: the program donates what it is given.
  params = jax.tree.map(jnp.copy, PARAMS)
  state = learner.init(params, jax.random.key(0))
  program = Program(learner)
  program(state.replace(frozen={}), {}, batches, jax.random.key(1))
  return program.flops_per_step


def test_flops_of_maml_grow_with_its_inner_steps():
  one, four, seven = (flops_of(steps) for steps in (2, 5, 8))
  # Three more inner steps cost the same wherever they come.
  assert 0 < four - one == pytest.approx(seven - four, rel=1e-6)
  learner = finetune(LOSS, SGD)
  state = learner.init(PARAMS, jax.random.key(0))

  def support(state):
    return adapt(
      learner, state, lambda _: toys.batch_of(4), jax.random.key(1), num_steps=3
    )[0].trainable

  # And at least the products of three forward and backward passes.
  assert four - one > counted(support, state)


def test_flops_do_not_depend_on_the_length_of_a_dispatch():
  assert flops_of(2, length=1) == pytest.approx(flops_of(2, length=3), rel=0.02)
