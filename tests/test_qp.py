"""The dual of a projection on a cone, solved inside jit.

One thousand random programs: `test_continual_analytic_projections.py`.
"""

import cones
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls

from fmeta.continual import nonnegative_qp
from fmeta.continual.qp import search
from fmeta.testing import check_gradient

SOLVE = jax.jit(nonnegative_qp)


def _gram(rows, vector):
  return rows @ np.swapaxes(rows, -1, -2), np.einsum(
    '...tp,...p->...t', rows, vector
  )


def test_two_variables_by_hand(x64):
  # Alone the first would be 1, but then the second is pulled up, too.
  quadratic = np.array([[1.0, -0.5], [-0.5, 1.0]])
  np.testing.assert_allclose(
    SOLVE(quadratic, np.array([-1.0, 0.25])), [7 / 6, 1 / 3], rtol=1e-12
  )
  # And here it is not.
  np.testing.assert_allclose(
    SOLVE(quadratic, np.array([-1.0, 0.75])), [1.0, 0.0], rtol=1e-12
  )


def test_a_variable_leaves_again_when_another_makes_it_useless(x64):
  # The steepest row alone enters first; both others together replace it.
  rows = np.array([[1.0, 1.0], [1.0, 0.1], [0.1, 1.0]])
  vector = np.array([-1.0, -1.0])
  found = SOLVE(*_gram(rows, vector))
  expected, _ = nnls(rows.T, -vector)
  np.testing.assert_allclose(rows.T @ found, rows.T @ expected, rtol=1e-12)
  rows[0] *= 0.1
  skew = np.array([-1.0, -0.2])
  found = SOLVE(*_gram(rows, skew))
  expected, _ = nnls(rows.T, -skew)
  np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_dependent_and_zero_rows_give_finite_minimisers(dtype, x64):
  vector = np.array([-1.0, -2.0, 0.5])
  same = np.ones((3, 3))
  for rows, rest in [
    (np.array([[1.0, 0, 0]] * 3), [0, -2, 0.5]),
    (np.array([[1.0, 0, 0], [2.0, 0, 0], [0, 0, 0]]), [0, -2, 0.5]),
    # Both sides of a plane: only what lies within it is left.
    (np.array([[1.0, 0, 0], [-1.0, 0, 0], [0, 1.0, 0]]), [0, 0, 0.5]),
    (np.zeros((3, 3)), vector),
    (same, vector + 2.5 / 3),
  ]:
    quadratic, linear = _gram(rows, vector)
    found = SOLVE(quadratic.astype(dtype), linear.astype(dtype))
    assert found.dtype == dtype and np.all(np.asarray(found) >= 0)
    np.testing.assert_allclose(
      vector + rows.T @ np.asarray(found, float), rest, atol=1e-6
    )


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_what_no_minimiser_can_meet_is_finite_and_soon_found(dtype, x64):
  # Unbounded below: no gradients have these inner products.
  both_ways = np.array([[1.0, -1.0], [-1.0, 1.0]], dtype)
  assert np.all(np.isfinite(SOLVE(both_ways, -np.ones(2, dtype))))
  assert not np.any(SOLVE(np.zeros((2, 2), dtype), -np.ones(2, dtype)))
  random = np.random.default_rng(0)
  rows = random.normal(size=(2000, 20, 4))
  rows = (rows / cones.lengths(rows)[..., None]).astype(dtype)
  linear = random.normal(size=(2000, 20)).astype(dtype)
  linear /= np.abs(linear).max(1, keepdims=True)
  gram = rows @ rows.transpose(0, 2, 1)
  found = jax.jit(jax.vmap(search))(gram, linear, np.ones((2000, 20), bool))
  assert np.all(found.done) and found.count.max() <= 30
  solved = np.asarray(jax.jit(jax.vmap(nonnegative_qp))(gram, linear))
  assert np.all(np.isfinite(solved)) and np.all(solved >= 0)


def test_the_scale_says_what_is_rounding():
  # Both sides of a plane, and a vector in it but for its rounding.
  both_ways = jnp.asarray([[1.0, -1.0], [-1.0, 1.0]])
  linear = jnp.asarray([-1e-7, 0.5e-7])
  assert not np.any(SOLVE(both_ways, linear, None, 1.0))
  assert np.any(SOLVE(both_ways, linear))


def test_absent_variables_are_zero_and_never_read():
  quadratic = np.full((3, 3), np.nan, np.float32)
  linear = np.full(3, np.nan, np.float32)
  quadratic[1, 1], linear[1] = 2.0, -3.0
  mask = jnp.asarray([False, True, False])
  found = SOLVE(quadratic, linear, mask)
  np.testing.assert_allclose(found, [0, 1.5, 0], rtol=1e-6)
  assert not np.any(SOLVE(quadratic, linear, jnp.zeros(3, bool)))


@pytest.mark.parametrize('kind', cones.KINDS)
def test_twenty_variables_take_at_most_twenty_iterations(kind, x64):
  # Of low rank there are a few in a thousand that go in circles when all
  # variables that would be negative leave at once.
  rows, present, vectors = cones.draw(kind, 2000, seed=11)
  rows = rows / cones.lengths(rows)[..., None]
  present &= np.any(rows != 0, axis=2)
  found = jax.jit(jax.vmap(search))(*_gram(rows, vectors), present)
  assert np.all(found.done) and 1 < found.count.max() <= 20


def test_nothing_moves_where_no_slope_is_negative():
  rows, _, vectors = cones.draw('random', 50)
  quadratic, linear = _gram(rows, vectors)
  found = jax.jit(jax.vmap(nonnegative_qp))(quadratic, np.abs(linear))
  assert not np.any(found)


def test_row_lengths_and_the_scale_of_the_vector_change_nothing(x64):
  rows, _, (vector, *_) = cones.draw('opposed', 1)
  rows = rows[0]
  expected = rows.T @ SOLVE(*_gram(rows, vector))
  assert np.linalg.norm(expected) > 0.1
  lengths = 10.0 ** np.linspace(-8, 8, len(rows))[:, None]
  for scale in (1e-9, 1.0, 1e9):
    found = SOLVE(*_gram(lengths * rows, scale * vector))
    np.testing.assert_allclose(
      (lengths * rows).T @ found, scale * expected, atol=1e-12 * scale
    )


def test_vmap_gives_each_program_its_own_solution():
  rows, present, vectors = cones.draw('random', 5)
  quadratic, linear = (x.astype(np.float32) for x in _gram(rows, vectors))
  together = jax.jit(jax.vmap(nonnegative_qp))(quadratic, linear, present)
  for k in range(5):
    alone = SOLVE(quadratic[k], linear[k], present[k])
    np.testing.assert_allclose(together[k], alone, rtol=1e-5, atol=1e-6)
    assert not np.any(together[k][~present[k]]) and np.any(together[k])


def test_the_derivative_is_that_of_differences(x64):
  rows, present, vectors = cones.draw('random', 1, seed=3)
  params = {'rows': jnp.asarray(rows[0]), 'vector': jnp.asarray(vectors[0])}

  def moved(params):
    rows, vector = params['rows'], params['vector']
    dual = nonnegative_qp(rows @ rows.T, rows @ vector, jnp.asarray(present[0]))
    projected = vector + dual @ rows
    return jnp.sum(jnp.sin(projected))

  grads = check_gradient(moved, params)
  # Of all rows those count whose multiplier is not zero.
  counted = np.any(np.asarray(grads['rows']), axis=1)
  assert 0 < counted.sum() < present.sum()
