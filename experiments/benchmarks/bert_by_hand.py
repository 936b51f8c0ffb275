"""A BERT classifier in plain array operations: a bound for what a step costs.

No linen, no interception, no fmeta: one function of a flat dict of leaves,
with each adapter's formula written where its leaves are found. Differentiating
it by the moving leaves alone is what a careful person would write for one
tuning; `experiments/benchmarks/cost.py` holds our step against it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

Leaves = Mapping[str, jax.Array]


def _low_rank(p: Leaves, name: str, x: jax.Array, scale: float) -> Any:
  """What stands beside x W for rows x, and the gain of both."""
  if f'{name}.lora_a' in p:
    a, b = p[f'{name}.lora_a'], scale * p[f'{name}.lora_b']
    gain = 1.0
    if f'{name}.dora_m' in p:
      whole = jax.lax.stop_gradient(p[name] + a @ b)
      gain = (p[f'{name}.dora_m'] / jnp.sqrt((whole**2).sum(0)))[None]
    return (x @ a) @ b, gain
  if f'{name}.vera_d' in p:
    rows, columns = p[name].shape
    narrow = (x @ p['vera.a'][:rows]) * p[f'{name}.vera_d'][None]
    wide = (narrow @ p['vera.b'][:, :columns]) * p[f'{name}.vera_b'][None]
    return wide, 1.0
  return 0.0, 1.0


def dense(p: Leaves, layer: str, x: jax.Array, scale: float) -> jax.Array:
  """A projection [..., in] -> [..., out] with what stands beside its kernel."""
  name, shape = f'{layer}/kernel', x.shape[:-1]
  x = x.reshape(-1, x.shape[-1])
  if f'{name}.ia3_input_scale' in p:
    x = x * p[f'{name}.ia3_input_scale'][None]
  beside, gain = _low_rank(p, name, x, scale)
  y = (x @ p[name] + beside) * gain + p[f'{layer}/bias'][None]
  if f'{name}.ia3_scale' in p:
    y = y * p[f'{name}.ia3_scale'][None]
  if f'{name}.adapter_down' in p:
    y = y + _bottleneck(p, f'{name}.adapter_', y)
  return y.reshape(*shape, -1)


def _bottleneck(p: Leaves, prefix: str, y: jax.Array) -> jax.Array:
  inner = _gelu(y @ p[f'{prefix}down'] + p[f'{prefix}down_bias'][None])
  return inner @ p[f'{prefix}up'] + p[f'{prefix}up_bias'][None]


def _gelu(x: jax.Array) -> jax.Array:
  return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def norm(p: Leaves, layer: str, x: jax.Array) -> jax.Array:
  """Layer norm over the last axis, BERT's epsilon."""
  mean = x.mean(-1, keepdims=True)
  variance = ((x - mean) ** 2).mean(-1, keepdims=True)
  scaled = (x - mean) * jax.lax.rsqrt(variance + 1e-12)
  scale, bias = p[f'{layer}/scale'], p[f'{layer}/bias']
  return scaled * scale[None, None] + bias[None, None]


def attention(p: Leaves, at: str, hidden, bias, heads: int, scale: float):
  """Self-attention with its residual and norm."""
  rows, length, width = hidden.shape

  def project(name):
    out = dense(p, f'{at}/{name}', hidden, scale)
    out = out.reshape(rows, length, heads, -1)
    past = p.get(f'{at}/{name}/kernel.prefix')
    if past is None:
      return out
    past = past.reshape(1, len(past), heads, -1)
    past = jnp.broadcast_to(past, (rows, *past.shape[1:]))
    return jnp.concatenate([past, out], axis=1)

  query, key, value = project('query'), project('key'), project('value')
  seen = key.shape[1] - length
  bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (seen, 0)))
  scores = jnp.einsum('blhd,bmhd->bhlm', query, key)
  scores = scores * query.shape[-1] ** -0.5 + bias
  mixed = jnp.einsum('bhlm,bmhd->blhd', jax.nn.softmax(scores), value)
  mixed = mixed.reshape(rows, length, width)
  out = dense(p, f'{at}/output', mixed, scale)
  return norm(p, f'{at}/norm', hidden + out)


def logits(p: Leaves, batch: Mapping, config: Any, scale: float) -> jax.Array:
  """[B, L] -> [B, classes], mean pooling; see `models.BertClassifier`."""
  base = 'body/embeddings'
  words = p[f'{base}/word/embedding'][batch['input_ids']]
  mask = batch['attention_mask']
  prompt = p.get(f'{base}/word/embedding.prompt')
  extra = 0 if prompt is None else len(prompt)
  if prompt is not None:
    rows = jnp.broadcast_to(prompt[None], (len(words), *prompt.shape))
    words = jnp.concatenate([rows, words], axis=1)
  first = len(p.get('body/layer_0/attention/key/kernel.prefix', ()))
  where = slice(first, first + words.shape[1])
  position = p[f'{base}/position/embedding'][None, where]
  hidden = words + position + p[f'{base}/type/embedding'][None, :1]
  hidden = norm(p, f'{base}/norm', hidden)
  seen = jnp.pad(mask, ((0, 0), (extra, 0)), constant_values=1)
  bias = jnp.where(seen[:, None, None, :] == 0, -1e9, 0.0)
  for k in range(config.num_layers):
    at = f'body/layer_{k}'
    hidden = attention(
      p, f'{at}/attention', hidden, bias, config.num_heads, scale
    )
    inner = _gelu(dense(p, f'{at}/mlp/up', hidden, scale))
    out = dense(p, f'{at}/mlp/down', inner, scale)
    hidden = norm(p, f'{at}/mlp/norm', hidden + out)
  weights = mask.astype(hidden.dtype)[:, :, None]
  pooled = (hidden[:, extra:] * weights).sum(1)
  pooled = pooled / jnp.maximum(weights.sum(1), 1)
  return dense(p, 'head', pooled, scale)


def step(optimizer, config: Any, scale: float):
  """`(moving, opt_state, still, batch) -> ...`, differentiating `moving`."""

  def loss(moving, still, batch):
    out = logits({**still, **moving}, batch, config, scale)
    losses = optax.softmax_cross_entropy_with_integer_labels(
      out, batch['label']
    )
    right = out.argmax(-1) == batch['label']
    return losses.mean(), (right.mean(), out)

  def run(moving, opt_state, still, batch):
    (value, more), grads = jax.value_and_grad(loss, has_aux=True)(
      moving, still, batch
    )
    updates, opt_state = optimizer.update(grads, opt_state, moving)
    norms = optax.tree.norm(grads), optax.tree.norm(updates)
    moved = optax.apply_updates(moving, updates)
    return moved, opt_state, value, more, norms

  return run
