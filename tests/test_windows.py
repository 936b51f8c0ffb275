"""Windows and their transpose: a pair of linear primitives."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fmeta.models import MatmulConv
from fmeta.models.windows import fold, sliced, unfold, windows

CASES = [(3, 2, 7), (3, 2, 4), (3, 1, 5), (4, 3, 7), (1, 2, 4)]


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def sizes(size, stride, side):
  return dict(height=side, width=side + 1, size=size, stride=stride)


@pytest.mark.parametrize('size, stride, side', CASES)
def test_windows_are_the_strided_slices_and_fold_is_their_transpose(
  size, stride, side, x64
):
  static = sizes(size, stride, side)
  x = draw(2, side, side + 1, 3)
  expected = jax.jit(functools.partial(sliced, **static))(x)
  found = windows(x, size, stride)
  np.testing.assert_array_equal(found, expected)
  assert found.shape[1:3] == (-(-side // stride), -(-(side + 1) // stride))
  # <A x, y> = <x, A' y>, with y that no symmetry helps.
  y = draw(*found.shape, seed=1)
  back = fold.bind(y, **static)
  np.testing.assert_allclose((found * y).sum(), (x * back).sum(), rtol=1e-12)


def test_both_have_all_derivatives_to_second_order(x64):
  static = sizes(3, 2, 4)
  x, y = draw(1, 4, 5, 2), draw(1, 2, 3, 18)
  for primitive, at in ((unfold, x), (fold, y)):

    @jax.jit
    def curved(x, primitive=primitive):
      return jnp.sin(primitive.bind(jnp.cos(x), **static)).sum()

    check_grads(curved, (at,), order=2, modes=('fwd', 'rev'), atol=1e-6)


@pytest.mark.parametrize('axis', [0, 2])
def test_under_vmap_they_are_the_same_for_each(axis):
  x = draw(2, 3, 4, 5, 2).astype(np.float32)
  run = functools.partial(windows, size=3, stride=2)
  y = run(x)  # any number of leading axes
  static = sizes(3, 2, 4)
  for primitive, whole in ((unfold, x), (fold, y)):
    expected = primitive.bind(whole, **static)
    moved = jnp.moveaxis(whole, 0, axis)
    mapped = jax.vmap(functools.partial(primitive.bind, **static), axis)
    np.testing.assert_array_equal(mapped(moved), expected)
    for k in range(2):
      alone = primitive.bind(whole[k], **static)
      np.testing.assert_array_equal(expected[k], alone)


def copies(text, size):
  """How many arrays of `size` scalars a compiled program copies."""
  shapes = re.findall(r'= f32\[([\d,]+)\]\S* (?:copy|transpose)\(', text)
  return [math.prod(map(int, shape.split(','))) for shape in shapes].count(size)


def test_a_kernels_gradient_needs_no_copy_no_scatter_and_no_slices():
  module, x = MatmulConv(24, stride=2), draw(8, 12, 12, 4).astype(np.float32)
  params = module.init(jax.random.key(0), x)['params']
  outputs = 8 * 6 * 6 * 24  # as many scalars as nothing else has

  def ours(params, x):
    return jnp.square(module.apply({'params': params}, x)).sum()

  def three_leading_axes(params, x):
    patches = sliced(x, height=12, width=12, size=3, stride=2)
    kernel = params['kernel'].reshape(-1, 24)
    out = jnp.tensordot(patches, kernel, 1) + params['bias'][None, None, None]
    return jnp.square(out).sum()

  def program(loss):
    gradient = jax.jit(jax.grad(loss, (0, 1)))
    return gradient.lower(params, x).compile().as_text()

  text, before = program(ours), program(three_leading_axes)
  assert copies(before, outputs) and not copies(text, outputs)
  assert 'concatenate(' in before and 'concatenate(' not in text
  assert 'gather(' in text and 'scatter(' not in text
