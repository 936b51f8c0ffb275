"""Several penalties as one."""

import jax
import jax.numpy as jnp
import numpy as np
import streamed
import toys

from fmeta import fisher, losses, optim, penalty, tuning
from fmeta.learner import finetune
from fmeta.retune import retune

FORWARD = toys.three_layers
PARAMS = toys.three_kernels()
BATCH = toys.batch_of(6)
LOSS = losses.supervised(FORWARD, losses.softmax_cross_entropy)
PARTS = (
  penalty.l2_sp(0.3),
  penalty.si(2.0),
  penalty.ewc(1.0, fisher.empirical_fisher),
)


def test_the_step_adds_every_gradient_and_each_learns_as_alone():
  made = penalty.all_of(*PARTS)
  learner = finetune(LOSS, optim.sgd(0.2), penalty=made)
  ((path, after),) = streamed.run(learner, PARAMS, [[BATCH] * 3], FORWARD)
  moved = jax.tree.map(lambda x: x + 0.1, after.trainable)
  value, grads = jax.value_and_grad(
    lambda p: made.value(p, p, after.penalty_state, BATCH, None)
  )(moved)
  alone = [
    jax.value_and_grad(
      lambda p, e=each, s=state: e.value(p, p, s, BATCH, None)
    )(moved)
    for each, state in zip(PARTS, after.penalty_state, strict=True)
  ]
  assert all(v > 0 for v, _ in alone)
  np.testing.assert_allclose(value, sum(v for v, _ in alone), rtol=1e-6)
  jax.tree.map(
    lambda x, *y: np.testing.assert_allclose(x, sum(y), rtol=1e-5),
    grads,
    *(g for _, g in alone),
  )
  # What each observed and consolidated, given the same path.
  for each, state in zip(PARTS, after.penalty_state, strict=True):
    held = each.init(PARAMS, PARAMS)
    for here, there in zip(path, path[1:], strict=False):
      slope = jax.grad(lambda p: LOSS(p, {}, BATCH, None)[0])(here.trainable)
      step = jax.tree.map(jnp.subtract, there.trainable, here.trainable)
      held = each.observe(held, here.trainable, slope, step)
    end = path[-1].trainable
    held = each.consolidate(held, end, end, {}, FORWARD, [BATCH], streamed.KEY)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
      held,
      state,
    )


def test_projections_are_composed_in_the_order_given():
  def directing(how):
    return penalty.no_penalty()._replace(
      init=lambda trainable, params: {'by': jnp.asarray(3.0)},
      direct=lambda grads, state: how(grads, state['by']),
    )

  plus = directing(lambda g, by: g + by)
  times = directing(lambda g, by: g * by)
  both = penalty.all_of(plus, times)
  assert both.direct(jnp.asarray(1.0), both.init({}, {})) == 12
  other = penalty.all_of(times, plus)
  assert other.direct(jnp.asarray(1.0), other.init({}, {})) == 6


def test_an_iterator_of_batches_reaches_every_penalty():
  ewc = penalty.ewc(1.0)
  made = penalty.all_of(ewc, ewc)
  state = made.init(PARAMS, PARAMS)
  first, second = made.consolidate(
    state, PARAMS, PARAMS, {}, FORWARD, iter([BATCH]), streamed.KEY
  )
  assert penalty.max_importance(second) > 0
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_draws_of_two_penalties_are_independent():
  ewc = penalty.ewc(1.0, fisher.sampled_fisher)
  made = penalty.all_of(ewc, ewc)
  state = made.init(PARAMS, PARAMS)
  first, second = made.consolidate(
    state, PARAMS, PARAMS, {}, FORWARD, [BATCH], streamed.KEY
  )
  pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
  assert any(np.any(x != y) for x, y in pairs)


def test_none_is_no_penalty():
  made = penalty.all_of()
  assert made.init(PARAMS, PARAMS) == ()
  assert made.value(PARAMS, PARAMS, (), BATCH, None) == 0
  assert made.direct({'p': 1}, ()) == {'p': 1}


def test_what_each_remembers_crosses_a_phase_boundary():
  made = penalty.all_of(*PARTS)
  of = lambda moves: finetune(LOSS, optim.sgd(0.2), tuning=moves, penalty=made)
  probe, whole = of(tuning.select('head/.*')), of(tuning.full())
  ((_, after),) = streamed.run(whole, PARAMS, [[BATCH] * 2], FORWARD)
  between = retune(after, whole, probe, streamed.KEY)
  assert '1/importance/body/layer_0/kernel' in between.dormant
  back = retune(between, probe, whole, streamed.KEY)
  jax.tree.map(
    np.testing.assert_array_equal, back.penalty_state, after.penalty_state
  )
