"""The parts of BERT (Devlin et al. 2019): sizes, embeddings, one layer.

https://arxiv.org/abs/1810.04805. Every projection is a plain `nn.Dense` with
a [in, out] kernel, so that an adapter can step into each of them. Dropout
masks are arguments: `Body` draws them for all layers at once.

Three methods are hooks, which do nothing until `nn.intercept_methods` answers
for them (`fmeta.adapters.prefix`, `fmeta.adapters.prompt`):
`Embeddings.prompt`, `Embeddings.first_position` and `Attention.past`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fmeta.errors import UsageError
from fmeta.models.attention import attend
from fmeta.models.dropout import drop, keep
from fmeta.types import Array


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """Sizes of a BERT; defaults are BERT-base uncased (Devlin et al. 2019).

  Attributes:
    vocab_size: rows of the word embedding.
    hidden_size: width of the residual stream.
    num_layers: transformer blocks.
    num_heads: attention heads; must divide `hidden_size`.
    intermediate_size: width inside the MLP.
    max_positions: longest sequence that has position embeddings.
    type_vocab_size: rows of the segment embedding.
    layer_norm_eps: added to the variance.
    dropout: on embeddings, block outputs and the pooled vector.
    attention_dropout: on attention probabilities.
    stochastic_depth: drop rate of the last block's two branches, per row;
      that of block l = 1..L is l / L of it (Huang et al. 2016,
      https://arxiv.org/abs/1603.09382, eq. 4). A dropped block of this
      post-norm model still normalises. 0: none, as in BERT.
    initializer_range: standard deviation of fresh kernels and embeddings.
    remat: a backward pass computes each block again from its input instead of
      keeping what it computes (Chen et al. 2016,
      https://arxiv.org/abs/1604.06174); the numbers are the same.
  """

  vocab_size: int = 30522
  hidden_size: int = 768
  num_layers: int = 12
  num_heads: int = 12
  intermediate_size: int = 3072
  max_positions: int = 512
  type_vocab_size: int = 2
  layer_norm_eps: float = 1e-12
  dropout: float = 0.1
  attention_dropout: float = 0.1
  stochastic_depth: float = 0.0
  initializer_range: float = 0.02
  remat: bool = False

  def __post_init__(self):
    if self.hidden_size % self.num_heads:
      raise UsageError(
        f'num_heads={self.num_heads} does not divide '
        f'hidden_size={self.hidden_size}; choose a divisor'
      )
    for name in ('dropout', 'attention_dropout', 'stochastic_depth'):
      if not 0 <= getattr(self, name) < 1:
        raise UsageError(f'{name}={getattr(self, name)}; give one in [0, 1)')


def with_dropout(
  config: BertConfig, rate: float, *, stochastic_depth: float = 0.0
) -> BertConfig:
  """The config with all of its dropout rates set.

  Parameters and evaluation do not depend on them.

  Args:
    config: any.
    rate: of hidden states and of attention probabilities, in [0, 1).
    stochastic_depth: the last block's, in [0, 1).

  Raises:
    UsageError: if one is out of range.
  """
  return dataclasses.replace(
    config,
    dropout=rate,
    attention_dropout=rate,
    stochastic_depth=stochastic_depth,
  )


def rows(hidden: Array) -> Array:
  """[B, L, H] -> [B L, H], what projections are given.

  Two traps in XLA on CPU: the gradient of a kernel contracts over all leading
  axes, and with two of them the gradient of the outputs is first copied into
  transposed order; and an activation between two shapes needs a buffer of its
  own.
  """
  return hidden.reshape(-1, hidden.shape[-1])


def dense(
  config: BertConfig, features: int, name: str | None = None
) -> nn.Dense:
  """A projection with BERT's initialisation."""
  init = nn.initializers.normal(config.initializer_range)
  return nn.Dense(features, kernel_init=init, name=name)


def embed(config: BertConfig, rows: int, name: str) -> nn.Embed:
  """A table with BERT's initialisation."""
  init = nn.initializers.normal(config.initializer_range)
  return nn.Embed(rows, config.hidden_size, embedding_init=init, name=name)


class Norm(nn.Module):
  """Layer norm (Ba et al. 2016) that scales last.

  (x - mean) / sqrt(var + eps) * scale + bias. `nn.LayerNorm` multiplies scale
  and root first, and so forms a [B, L, H] array that lives until the backward
  pass. The variance is that of x - mean: E[x^2] - E[x]^2 loses digits where
  the mean is large.
  """

  epsilon: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[..., H] -> the same."""
    shape = (1,) * (x.ndim - 1) + x.shape[-1:]
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
    bias = self.param('bias', nn.initializers.zeros, x.shape[-1:])
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + self.epsilon)
    return normal * scale.reshape(shape) + bias.reshape(shape)


def norm(config: BertConfig, name: str) -> Norm:
  """A layer norm with BERT's epsilon."""
  return Norm(config.layer_norm_eps, name=name)


def gelu(x: Array) -> Array:
  """x Phi(x), exactly (Hendrycks & Gimpel 2016); erf is cheaper than erfc."""
  return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


class Masks(NamedTuple):
  """What dropout keeps in one layer; None keeps all.

  Attributes:
    attention: [B, heads, L, L], of the probabilities.
    outputs: [2, B, L, H], of the attention's and of the MLP's output.
    paths: [2, B], factors of the same two by stochastic depth.
  """

  attention: Array | None
  outputs: Array | None
  paths: Array | None = None

  def output(self, index: int) -> Array | None:
    """The mask of the attention's output (0) or of the MLP's (1)."""
    return None if self.outputs is None else self.outputs[index]

  def branch(self, out: Array, index: int, rate: float) -> Array:
    """The output [B, L, H] of branch 0 or 1 after both kinds of dropout."""
    out = drop(out, self.output(index), rate)
    if self.paths is None:
      return out
    return out * self.paths[index][:, None, None].astype(out.dtype)


class Embeddings(nn.Module):
  """Sum of word, position and segment embeddings, normalised."""

  config: BertConfig

  def prompt(self) -> Array | None:
    """A hook: embeddings put before every row; none by default.

    [P, H] for all rows, or [B, P, H].
    """
    return None

  def first_position(self) -> int:
    """A hook: the position of a row's first embedding; 0 by default."""
    return 0

  @nn.compact
  def __call__(
    self,
    input_ids: Array,
    token_type_ids: Array | None,
    prompt: Array | None,
    mask: Array | None,
    position_ids: Array | None = None,
  ) -> Array:
    """[B, L] -> [B, P + L, H]; `mask` is dropout's, of that shape.

    Positions count from `first_position`, or are it plus `position_ids`.
    """
    config = self.config
    word = embed(config, config.vocab_size, 'word')(input_ids)
    if prompt is not None:
      word, token_type_ids = _prompted(prompt, word, token_type_ids)
    first, length = self.first_position(), word.shape[1]
    if first + length > config.max_positions:
      before = first + length - input_ids.shape[1]
      raise UsageError(
        f'{input_ids.shape[1]} tokens in a row'
        + (f' after a prompt or prefix of {before}' if before else '')
        + f', but the model has positions for {config.max_positions}; cut the '
        'texts when encoding them'
      )
    position = embed(config, config.max_positions, 'position')
    if position_ids is None:
      positions = position.embedding[None, first : first + length]
    else:
      positions = position(first + position_ids)
    segment = embed(config, config.type_vocab_size, 'type')
    if token_type_ids is None:
      segments = segment.embedding[None, :1]
    else:
      segments = segment(token_type_ids)
    hidden = word + positions + segments
    hidden = norm(config, 'norm')(hidden)
    return drop(hidden, mask, config.dropout)


def _prompted(prompt, word, token_type_ids):
  """Puts a prompt, of segment 0, before the words of every row."""
  before = prompt.astype(word.dtype)
  if prompt.ndim == 2:
    before = jnp.broadcast_to(before[None], (len(word), *prompt.shape))
  if token_type_ids is not None:
    token_type_ids = jnp.pad(token_type_ids, ((0, 0), (before.shape[1], 0)))
  return jnp.concatenate([before, word], axis=1), token_type_ids


class Attention(nn.Module):
  """Self-attention, residual, norm."""

  config: BertConfig

  def past(self) -> tuple[Array, Array] | None:
    """A hook: keys and values that every row sees before its own.

    [P, H] for all rows, or [B, P, H].
    """
    return None

  @nn.compact
  def __call__(self, hidden: Array, bias: Array, masks: Masks) -> Array:
    """[B, L, H] -> the same."""
    config = self.config
    split = (*hidden.shape[:2], config.num_heads, -1)
    flat = rows(hidden)

    def project(name):
      return dense(config, config.hidden_size, name)(flat).reshape(split)

    query, key, value = project('query'), project('key'), project('value')
    mask, past = masks.attention, self.past()
    if past is not None:
      key, value = _before(past[0], key), _before(past[1], value)
      length = past[0].shape[-2]
      bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (length, 0)))
      mask = self._with_past(mask, length)
    weights = drop(attend(query, key, bias), mask, config.attention_dropout)
    mixed = jnp.einsum('bhlm,bmhd->blhd', weights, value)
    out = dense(config, config.hidden_size, 'output')(mixed.reshape(flat.shape))
    out = masks.branch(out.reshape(hidden.shape), 0, config.dropout)
    return norm(config, 'norm')(hidden + out)

  def _with_past(self, mask: Array | None, length: int) -> Array | None:
    """Draws what dropout keeps of the attention to the past."""
    if mask is None or not length:
      return mask
    shape = (*mask.shape[:-1], length)
    drawn = keep(self.make_rng('dropout'), self.config.attention_dropout, shape)
    return jnp.concatenate([drawn, mask], axis=-1)


def _before(past, own):
  """[P, H] or [B, P, H] and [B, L, heads, d] -> [B, P + L, heads, d]."""
  batch, _, heads, size = own.shape
  rows = len(past) if past.ndim == 3 else 1
  past = past.astype(own.dtype).reshape(rows, -1, heads, size)
  past = jnp.broadcast_to(past, (batch, *past.shape[1:]))
  return jnp.concatenate([past, own], axis=1)


class Mlp(nn.Module):
  """Two dense layers with a gelu, residual, norm."""

  config: BertConfig

  @nn.compact
  def __call__(self, hidden: Array, masks: Masks) -> Array:
    """[B, L, H] -> the same."""
    config = self.config
    inner = gelu(dense(config, config.intermediate_size, 'up')(rows(hidden)))
    out = dense(config, config.hidden_size, 'down')(inner)
    out = masks.branch(out.reshape(hidden.shape), 1, config.dropout)
    return norm(config, 'norm')(hidden + out)


class Layer(nn.Module):
  """One block: attention, then MLP, both post-norm."""

  config: BertConfig

  @nn.compact
  def __call__(self, hidden: Array, bias: Array, masks: Masks) -> Array:
    """[B, L, H] -> the same."""
    hidden = Attention(self.config, name='attention')(hidden, bias, masks)
    return Mlp(self.config, name='mlp')(hidden, masks)
