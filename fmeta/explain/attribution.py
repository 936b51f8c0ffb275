"""Integrated gradients over tokens and pixels."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.types import Array, Batch, Forward, ModelState, Params


class Attribution(NamedTuple):
  """What each input contributed to a number.

  Attributes:
    values: shaped like the input.
    total: f(x) - f(baseline).
    gap: sum of `values` minus `total`; zero for the exact integral.
  """

  values: np.ndarray
  total: float
  gap: float

  @property
  def error(self) -> float:
    """|gap| as a share of |total|; infinite if only the total is zero."""
    if not self.total:
      return float('inf') if self.gap else 0.0
    return abs(self.gap) / abs(self.total)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _integrate(fun, x, baseline, steps, at_once, args):
  nodes, weights = np.polynomial.legendre.leggauss(steps)
  nodes = jnp.asarray((nodes + 1) / 2, x.dtype)
  weights = jnp.asarray(weights / 2, x.dtype)

  def gradient(node):
    return jax.grad(fun)(baseline + node * (x - baseline), *args)

  grads = jax.lax.map(gradient, nodes, batch_size=at_once)
  values = (x - baseline) * jnp.tensordot(weights, grads, 1)
  return values, fun(x, *args) - fun(baseline, *args)


def integrated_gradients(
  fun: Callable[..., Array],
  x: Array,
  baseline: Array,
  *args: Any,
  steps: int = 50,
  at_once: int = 10,
) -> Attribution:
  """What each entry of x contributes to f(x) - f(baseline).

  a_i = (x_i - b_i) int_0^1 df/dx_i (b + t (x - b)) dt (Sundararajan et al.
  2017, https://arxiv.org/abs/1703.01365, eq. 1), with Gauss-Legendre nodes in
  place of their Riemann sum. Completeness (their proposition 1) says that the
  a_i sum to f(x) - f(b); `gap` is what is missing.

  Args:
    fun: `(x, *args) -> scalar`; the same object is compiled once.
    x: the input.
    baseline: of the same shape, where nothing is said.
    *args: arrays that `fun` reads, such as parameters.
    steps: nodes; 20 to 300 suffice says the paper, section 5.
    at_once: nodes in one batch of the device (untuned).

  Raises:
    UsageError: if the shapes differ or steps < 1.
  """
  if jnp.shape(x) != jnp.shape(baseline):
    raise UsageError(
      f'the input has shape {jnp.shape(x)}, the baseline '
      f'{jnp.shape(baseline)}; give equal ones'
    )
  if steps < 1:
    raise UsageError(f'steps={steps}; give at least 1')
  at_once = min(at_once, steps)
  values, total = _integrate(fun, x, baseline, steps, at_once, args)
  values = np.asarray(values)
  gap = float(values.astype(np.float64).sum()) - float(total)
  return Attribution(values, float(total), gap)


@functools.cache
def _logit_of_image(forward: Forward):
  def fun(image, params, model_state, target):
    batch = {'image': image[None]}
    return forward(params, model_state, batch, None)[0][0, target]

  return fun


def pixels(
  forward: Forward,
  params: Params,
  model_state: ModelState,
  image: Array,
  target: int,
  *,
  baseline: Array | None = None,
  steps: int = 50,
) -> Attribution:
  """What each pixel [H, W, C] contributes to the logit of class `target`.

  Args:
    forward: reads `image` [B, H, W, C].
    params: of the model.
    model_state: read only.
    image: [H, W, C].
    target: a class.
    baseline: an image; black as in the paper, section 3, by default.
    steps: see `integrated_gradients`.
  """
  image = jnp.asarray(image)
  baseline = jnp.zeros_like(image) if baseline is None else baseline
  return integrated_gradients(
    _logit_of_image(forward),
    image,
    baseline,
    params,
    model_state,
    jnp.asarray(target),
    steps=steps,
    # All nodes at once: XLA's convolutions are slow inside a loop on CPU.
    at_once=steps,
  )


@functools.cache
def _logit_of_embeddings(forward: Forward, module: str):
  """The logit as a function of what the embedding `module` gives."""

  def fun(vectors, params, batch, target):
    entered = []

    def interceptor(next_fun, args, kwargs, context):
      if '/'.join(context.module.path) == module and (
        context.method_name == '__call__'
      ):
        entered.append(module)
        return vectors[None]
      return next_fun(*args, **kwargs)

    with nn.intercept_methods(interceptor):
      logits, _ = forward(params, {}, batch, None)
    if not entered:
      raise UsageError(
        f'no module {module!r} was called; name the embedding of the tokens'
      )
    return logits[0, target]

  return fun


def tokens(
  forward: Forward,
  params: Params,
  batch: Batch,
  target: int,
  *,
  fixed: Sequence[bool],
  padding: int = 0,
  module: str = 'body/embeddings/word',
  steps: int = 50,
) -> Attribution:
  """What each token contributes to the logit of class `target`, values [L].

  The path runs between word embeddings: from those of a text that has the
  padding token at every place that is not `fixed`, to those of the text. A
  token's value is the sum over its vector (Sundararajan et al. 2017, section
  5.4). Positions and the mask stay.

  Args:
    forward: reads `input_ids` and `attention_mask`.
    params: of the model.
    batch: one text, [1, L].
    target: a class.
    fixed: for each place, whether its token stays: [CLS], [SEP], padding.
    padding: row of the table that says nothing; 0 is BERT's [PAD].
    module: the `nn.Embed` of the tokens.
    steps: see `integrated_gradients`.
  """
  table = tree.get(params, f'{module}/embedding')
  ids = jnp.asarray(batch['input_ids'])[0]
  if len(fixed) != len(ids):
    raise UsageError(f'{len(fixed)} marks for {len(ids)} tokens; give one each')
  empty = jnp.where(jnp.asarray(fixed, bool), ids, padding)
  found = integrated_gradients(
    _logit_of_embeddings(forward, module),
    table[ids],
    table[empty],
    params,
    dict(batch),
    jnp.asarray(target),
    steps=steps,
  )
  return found._replace(values=found.values.sum(-1))
