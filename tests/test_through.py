"""Ways through an inner loop: one derivative, whatever is kept."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import adapters, gradients, optim, penalty, through, tree, tuning
from fmeta.errors import UsageError
from fmeta.learner import adapt, finetune
from fmeta.meta import episode_loss, in_chunks
from fmeta.testing import check_gradient
from fmeta.types import Aux

KEY = jax.random.key(3)
MATRICES = ('body/.*/kernel',)
LOSS, PARAMS, _, _ = toys.problem(dropout=0.2, sizes=(4,))
LORA = adapters.lora(*MATRICES, rank=2, also=('head/bias',))
INNER = {
  'sgd': lambda: finetune(LOSS, optim.sgd(0.3)),
  'clipped adamw': lambda: finetune(LOSS, optim.adamw(0.1, eps_root=1e-8)),
  'lora': lambda: finetune(LOSS, optim.sgd(0.3), tuning=LORA),
  'accumulate, l2-sp': lambda: finetune(
    LOSS,
    optim.sgd(0.3),
    penalty=penalty.l2_sp(0.1),
    value_and_grad=gradients.accumulate(2),
  ),
}
EXACT = {
  way.__name__: way for way in (through.plain, through.remat, through.mixed)
}


def episodes(tasks=2):
  parts = [
    {
      'support': toys.batch_of(4, seed=k),
      'query': toys.batch_of(3, seed=10 + k),
    }
    for k in range(tasks)
  ]
  return toys.double(jax.tree.map(lambda *x: jnp.stack(x), *parts))


def start(what):
  params = toys.double(PARAMS)
  return (
    adapters.lora_init(params, KEY, MATRICES, 2) if what == 'lora' else params
  )


def outer(inner, way, over=jax.vmap, steps=3):
  """`params -> (value, gradient)` of MAML."""
  loss = episode_loss(inner, LOSS, steps, through=way, over=over)
  batch = episodes()
  return jax.jit(
    jax.value_and_grad(lambda params: loss(params, {}, batch, KEY)[0])
  )


def close(found, expected, tolerance=1e-12):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, tolerance, tolerance),
    found,
    expected,
  )


@pytest.mark.parametrize('what', INNER)
def test_remat_and_mixed_are_plain(what, x64):
  inner, params = INNER[what](), start(what)
  expected = outer(inner, through.plain)(params)
  for way in (through.remat, through.mixed):
    close(outer(inner, way)(params), expected)
  grads = expected[1]
  if what == 'lora':
    factor = tree.get(grads, 'body/layer_0/kernel.lora_a')
    assert np.any(factor != 0)  # It is meta-learned.
  # It is no first-order gradient by accident.
  first = outer(inner, through.first_order)(params)
  close(first[0], expected[0])
  kernel = first[1]['body']['layer_0']['kernel']
  assert np.abs(kernel - grads['body']['layer_0']['kernel']).max() > 1e-4


@pytest.mark.parametrize('way', [through.mixed, through.remat, through.plain])
@pytest.mark.parametrize('num_segments', [1, 2, 3, 6])
def test_segments_change_what_is_kept_and_nothing_else(num_segments, way, x64):
  # Adam counts its steps and dropout has a key for each: they go on.
  inner, params = INNER['clipped adamw'](), start('full')
  found = outer(inner, through.in_segments(num_segments, way), steps=6)(params)
  close(found, outer(inner, through.plain, steps=6)(params))


def test_what_segments_record_has_a_place_per_step(x64):
  learner = finetune(LOSS, optim.sgd(0.3))
  batch = jax.tree.map(lambda x: x[0], episodes()['support'])

  def losses(way):
    return adapt(
      learner,
      learner.init(start('full'), KEY),
      lambda i: batch,
      KEY,
      num_steps=6,
      every=lambda state, aux: aux.metrics['loss'],
      through=way,
    )[1]

  found = jax.jit(lambda: losses(through.in_segments(2)))()
  assert found.shape == (6,)
  close(found, jax.jit(lambda: losses(through.plain))())


@pytest.mark.parametrize('num_segments', [0, 4])
def test_segments_that_do_not_divide_are_refused(num_segments, x64):
  way = through.in_segments(num_segments)
  with pytest.raises(UsageError, match=f'6 .* into {num_segments} segments'):
    outer(INNER['sgd'](), way, steps=6)(start('full'))


def test_mixed_agrees_with_central_differences(x64):
  inner = INNER['clipped adamw']()
  loss = episode_loss(inner, LOSS, 2, through=through.mixed)
  batch = episodes()
  check_gradient(lambda params: loss(params, {}, batch, KEY)[0], start('full'))


@pytest.mark.parametrize('what', ['sgd', 'accumulate, l2-sp'])
def test_first_order_is_the_learner_with_constant_gradients(what, x64):
  wrap = gradients.first_order(
    gradients.accumulate(2) if what != 'sgd' else gradients.reverse
  )
  held = penalty.l2_sp(0.1) if what != 'sgd' else penalty.no_penalty()
  constant = finetune(LOSS, optim.sgd(0.3), penalty=held, value_and_grad=wrap)
  expected = outer(constant, through.plain)(start(what))
  found = outer(INNER[what](), through.first_order)(start(what))
  close(found, expected)


def test_tasks_in_chunks_are_tasks_side_by_side(x64):
  inner, params = INNER['sgd'](), start('full')
  chunked = outer(inner, through.mixed, over=in_chunks(1))(params)
  close(chunked, outer(inner, through.mixed)(params))


def test_what_each_step_records_is_differentiated_too(x64):
  """Values, model state and metrics have cotangents of their own."""
  learner = finetune(LOSS, optim.sgd(0.3))
  batches = toys.double(
    jax.tree.map(
      lambda *x: jnp.stack(x), *(toys.batch_of(4, seed=k) for k in range(3))
    )
  )

  def objective(params, way):
    last, history = adapt(
      learner,
      learner.init(params, KEY),
      lambda i: jax.tree.map(lambda x: x[i], batches),
      KEY,
      num_steps=3,
      every=lambda state, aux: aux.metrics['loss'],
      through=way,
    )
    return history.sum() + sum(
      jnp.sum(x**2) for x in jax.tree.leaves(last.trainable)
    )

  params = toys.double(PARAMS)
  plain = jax.value_and_grad(objective)(params, through.plain)
  close(jax.value_and_grad(objective)(params, through.mixed), plain)


def test_a_loop_inside_a_loop_goes_its_own_way(x64):
  """The outer way does not leak into an inner learner's loop."""

  def nested(inside, outside):
    inner = finetune(LOSS, optim.sgd(0.3))
    loss = episode_loss(inner, LOSS, 1, through=inside)
    middle = finetune(loss, optim.sgd(0.3))
    batch = episodes()
    halves = {'support': batch, 'query': batch}
    halves = jax.tree.map(lambda x: x[None], halves)
    whole = episode_loss(middle, loss, 1, through=outside)
    grad = jax.jit(jax.grad(lambda p: whole(p, {}, halves, KEY)[0]))
    return grad(start('full'))

  expected = nested(through.plain, through.plain)
  close(nested(through.remat, through.mixed), expected)


# Data loss (t - c)'A(t - c)/2, query (t - d)'B(t - d)/2.
A = np.array([[2.0, 0.3, 0.0], [0.3, 1.0, 0.2], [0.0, 0.2, 0.5]])
B = np.array([[1.0, 0.1, 0.0], [0.1, 2.0, 0.0], [0.0, 0.0, 1.5]])
C, D, PHI = (np.array(x) for x in ([1.0, -1, 2], [0.5, 1, 0], [0.2, 0.1, -0.3]))
STRENGTH = 0.7


def quadratic(params, model_state, batch, rng):
  del rng
  gap = params['t'] - batch['at']
  value = 0.5 * gap @ batch['form'] @ gap
  return value, Aux(model_state, {}, jnp.ones(()))


def quadratic_episode():
  part = lambda form, at: {'form': jnp.asarray(form), 'at': jnp.asarray(at)}
  episode = {'support': part(A, C), 'query': part(B, D)}
  return jax.tree.map(lambda x: x[None], episode)


def implicit_gradient(solve, steps=400):
  """Of the start and of the strength, by `implicit`."""

  def inner(hyper):
    held = penalty.l2_sp(hyper['strength'])
    return finetune(quadratic, optim.sgd(0.3), penalty=held)

  way = through.implicit(solve)
  loss = episode_loss(inner, quadratic, steps, through=way)
  params = {
    'model': {'t': jnp.asarray(PHI)},
    'hyper': {'strength': jnp.asarray(STRENGTH)},
  }
  batch = quadratic_episode()
  return jax.grad(lambda p: loss(p, {}, batch, KEY)[0])(params)


@pytest.mark.parametrize(
  'solve',
  [through.cg(3), through.neumann(200, 0.3)],
  ids=['conjugate gradients', 'Neumann series'],
)
def test_implicit_is_the_closed_form(solve, x64):
  system = A + STRENGTH * np.eye(3)
  minimiser = np.linalg.solve(system, A @ C + STRENGTH * PHI)
  pull = np.linalg.solve(system, B @ (minimiser - D))
  found = implicit_gradient(solve)
  close(found['model']['t'], STRENGTH * pull)
  # d minimiser / d strength = system^-1 (start - minimiser).
  close(found['hyper']['strength'], pull @ (PHI - minimiser))


def test_too_few_steps_of_the_solver_are_an_approximation(x64):
  exact = implicit_gradient(through.cg(3))['model']['t']
  rough = implicit_gradient(through.cg(1))['model']['t']
  assert 1e-3 < np.abs(exact - rough).max() < 0.5


def test_implicit_of_a_network_is_a_dense_solve(x64):
  loss_fn, params, _, _ = toys.problem(sizes=(3,))
  params = toys.double(params)
  held = penalty.l2_sp(0.5)
  inner = finetune(loss_fn, optim.sgd(0.4), penalty=held)
  batch = jax.tree.map(lambda x: x[:1], episodes())
  support, query = (
    jax.tree.map(lambda x: x[0], batch[part]) for part in ('support', 'query')
  )
  way = through.implicit(through.cg(60))
  loss = episode_loss(inner, loss_fn, 600, through=way)
  found = jax.jit(jax.grad(lambda p: loss(p, {}, batch, KEY)[0]))(params)

  flat, unflatten = jax.flatten_util.ravel_pytree(params)
  value = lambda t, part: loss_fn(unflatten(t), {}, part, None)[0]

  @jax.jit
  def by_hand(flat):
    descend = lambda t, _: (
      t - 0.4 * (jax.grad(value)(t, support) + 0.5 * (t - flat)),
      None,
    )
    minimiser = jax.lax.scan(descend, flat, length=600)[0]
    hessian = jax.hessian(value)(minimiser, support)
    system = hessian + 0.5 * jnp.eye(flat.size)
    return jnp.linalg.solve(system, jax.grad(value)(minimiser, query))

  expected = 0.5 * by_hand(flat)
  close(jax.flatten_util.ravel_pytree(found)[0], expected, 1e-8)


def test_implicit_without_steps_is_plain(x64):
  inner, params = INNER['accumulate, l2-sp'](), start('full')
  way = through.implicit(through.cg(2))
  expected = outer(inner, through.plain, steps=0)(params)
  close(outer(inner, way, steps=0)(params), expected)


def test_implicit_needs_a_penalty_and_solvers_need_steps(x64):
  way = through.implicit(through.cg(1))
  with pytest.raises(UsageError, match='of a learner without a penalty'):
    outer(INNER['sgd'](), way)(start('full'))
  for make in (through.cg, lambda steps: through.neumann(steps, 0.1)):
    with pytest.raises(UsageError, match=r'num_steps=0\); choose 1 or more'):
      make(0)


def temporary_bytes(way, steps):
  loss_fn, params, _, _ = toys.problem(sizes=(64, 64))
  inner = finetune(loss_fn, optim.sgd(0.1), tuning=tuning.select('head/.*'))
  loss = episode_loss(inner, loss_fn, steps, through=way)
  part = jax.tree.map(lambda x: x[None], toys.batch_of(256))
  batch = {'support': part, 'query': part}
  run = jax.jit(jax.grad(lambda p: loss(p, {}, batch, KEY)[0]))
  compiled = run.lower(params).compile()
  state = steps * tree.num_bytes(params['head'])
  return compiled.memory_analysis().temp_size_in_bytes - state


def test_only_plain_keeps_the_activations_of_every_step():
  grown = {
    name: temporary_bytes(way, 40) / temporary_bytes(way, 5)
    for name, way in EXACT.items()
  }
  assert grown['plain'] > 1.5
  assert grown['remat'] < 1.1 and grown['mixed'] < 1.1, grown
