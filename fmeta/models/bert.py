"""BERT, an encoder with a linear head (Devlin et al. 2019).

https://arxiv.org/abs/1810.04805. Layers are unrolled and every projection is
a plain `nn.Dense` with a [in, out] kernel, so that an adapter can step into
each of them. The names are `body/embeddings/...`, `body/layer_<k>/...` and
`head/...`; `fmeta.pretrained` fills them from published weights.

The sequence may be entered in the middle: `prefix` runs the embeddings and
the first layers once, `resume` the remaining ones. With a frozen prefix and
no dropout that is the same function at a fraction of the price.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from fmeta.errors import UsageError
from fmeta.types import Array

POOLINGS = ('mean', 'cls')


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
    initializer_range: standard deviation of fresh kernels and embeddings.
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
  initializer_range: float = 0.02

  def __post_init__(self):
    if self.hidden_size % self.num_heads:
      raise UsageError(
        f'num_heads={self.num_heads} does not divide '
        f'hidden_size={self.hidden_size}; choose a divisor'
      )


def _dense(config: BertConfig, features: int, name: str | None = None):
  init = nn.initializers.normal(config.initializer_range)
  return nn.Dense(features, kernel_init=init, name=name)


def _embed(config: BertConfig, rows: int, name: str):
  init = nn.initializers.normal(config.initializer_range)
  return nn.Embed(rows, config.hidden_size, embedding_init=init, name=name)


def _norm(config: BertConfig, name: str):
  # The two-pass variance: E[x^2] - E[x]^2 loses digits where the mean is large.
  return nn.LayerNorm(config.layer_norm_eps, use_fast_variance=False, name=name)


def gelu(x: Array) -> Array:
  """x Phi(x), exactly (Hendrycks & Gimpel 2016); erf is cheaper than erfc."""
  return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def additive_mask(attention_mask: Array) -> Array:
  """[B, L] of 0 and 1 -> [B, 1, 1, L] of 0 where seen and -1e9 where not."""
  hidden = attention_mask[:, None, None, :] == 0
  return jnp.where(hidden, -1e9, 0.0).astype(jnp.float32)


def attend(query: Array, key: Array, bias: Array) -> Array:
  """Probabilities softmax(q k' / sqrt(d) + bias), in float32 or wider.

  Args:
    query: [B, L, heads, d].
    key: [B, M, heads, d].
    bias: additive, broadcastable to [B, heads, L, M].
  """
  scores = jnp.einsum('blhd,bmhd->bhlm', query, key)
  dtype = jnp.promote_types(scores.dtype, jnp.float32)
  scores = scores.astype(dtype) * query.shape[-1] ** -0.5
  return jax.nn.softmax(scores + bias.astype(dtype)).astype(query.dtype)


class Embeddings(nn.Module):
  """Sum of word, position and segment embeddings, normalised."""

  config: BertConfig

  @nn.compact
  def __call__(
    self, input_ids: Array, token_type_ids: Array | None, deterministic: bool
  ) -> Array:
    """[B, L] -> [B, L, hidden]."""
    config, length = self.config, input_ids.shape[1]
    if length > config.max_positions:
      raise UsageError(
        f'{length} tokens in a row, but the model has positions for '
        f'{config.max_positions}; cut the texts when encoding them'
      )
    word = _embed(config, config.vocab_size, 'word')(input_ids)
    position = _embed(config, config.max_positions, 'position').embedding
    segment = _embed(config, config.type_vocab_size, 'type')
    if token_type_ids is None:
      segments = segment.embedding[None, :1]
    else:
      segments = segment(token_type_ids)
    hidden = word + position[None, :length] + segments
    hidden = _norm(config, 'norm')(hidden)
    return nn.Dropout(config.dropout)(hidden, deterministic)


class Attention(nn.Module):
  """Self-attention, residual, norm."""

  config: BertConfig

  @nn.compact
  def __call__(self, hidden: Array, bias: Array, deterministic: bool) -> Array:
    """[B, L, hidden] -> the same."""
    config = self.config
    split = (*hidden.shape[:2], config.num_heads, -1)

    def project(name):
      return _dense(config, config.hidden_size, name)(hidden).reshape(split)

    weights = attend(project('query'), project('key'), bias)
    weights = nn.Dropout(config.attention_dropout)(weights, deterministic)
    mixed = jnp.einsum('bhlm,bmhd->blhd', weights, project('value'))
    out = _dense(config, config.hidden_size, 'output')(
      mixed.reshape(hidden.shape)
    )
    out = nn.Dropout(config.dropout)(out, deterministic)
    return _norm(config, 'norm')(hidden + out)


class Mlp(nn.Module):
  """Two dense layers with a gelu, residual, norm."""

  config: BertConfig

  @nn.compact
  def __call__(self, hidden: Array, deterministic: bool) -> Array:
    """[B, L, hidden] -> the same."""
    config = self.config
    inner = gelu(_dense(config, config.intermediate_size, 'up')(hidden))
    out = _dense(config, config.hidden_size, 'down')(inner)
    out = nn.Dropout(config.dropout)(out, deterministic)
    return _norm(config, 'norm')(hidden + out)


class Layer(nn.Module):
  """One block: attention, then MLP, both post-norm."""

  config: BertConfig

  @nn.compact
  def __call__(self, hidden: Array, bias: Array, deterministic: bool) -> Array:
    """[B, L, hidden] -> the same."""
    hidden = Attention(self.config, name='attention')(
      hidden, bias, deterministic
    )
    return Mlp(self.config, name='mlp')(hidden, deterministic)


class Body(nn.Module):
  """Embeddings and a stack of named layers."""

  config: BertConfig

  def setup(self):
    """Names the parts."""
    self.embeddings = Embeddings(self.config)
    for k in range(self.config.num_layers):
      setattr(self, f'layer_{k}', Layer(self.config))

  def embed(self, input_ids, token_type_ids, deterministic) -> Array:
    """[B, L] -> [B, L, hidden], the state before layer 0."""
    return self.embeddings(input_ids, token_type_ids, deterministic)

  def layers(
    self,
    hidden: Array,
    attention_mask: Array,
    first: int,
    last: int,
    *,
    deterministic: bool,
  ) -> list[Array]:
    """States after each of the layers `first` to `last - 1`."""
    bias, states = additive_mask(attention_mask), []
    for k in range(first, last):
      hidden = getattr(self, f'layer_{k}')(hidden, bias, deterministic)
      states.append(hidden)
    return states


def pool(hidden: Array, attention_mask: Array, pooling: str) -> Array:
  """[B, L, H] -> [B, H]: mean over the tokens seen, or the first token."""
  if pooling == 'cls':
    return hidden[:, 0]
  weights = attention_mask.astype(hidden.dtype)[:, :, None]
  # A padding row has no token: its mean is 0, not 0/0.
  count = jnp.maximum(weights.sum(1), 1)
  return (hidden * weights).sum(1) / count


class BertClassifier(nn.Module):
  """BERT, pooled, with a linear head.

  Attributes:
    config: the sizes.
    num_classes: outputs of the head; None: no head, calls return embeddings.
    pooling: 'mean' over the tokens of `attention_mask` (Sentence-BERT,
      Reimers & Gurevych 2019), or 'cls', the first token.
  """

  config: BertConfig
  num_classes: int | None = None
  pooling: str = 'mean'

  def __post_init__(self):
    super().__post_init__()
    if self.pooling not in POOLINGS:
      raise UsageError(f'pooling={self.pooling!r}; choose one of {POOLINGS}')

  def setup(self):
    """Names the parts."""
    self.body = Body(self.config)
    self.dropout = nn.Dropout(self.config.dropout)
    if self.num_classes:
      self.head = _dense(self.config, self.num_classes)

  def __call__(
    self,
    input_ids: Array,
    attention_mask: Array,
    token_type_ids: Array | None = None,
    *,
    deterministic: bool = True,
  ) -> Array:
    """Logits [B, classes] of rows [B, L]; embeddings without a head."""
    hidden = self.body.embed(input_ids, token_type_ids, deterministic)
    return self.resume(
      hidden, attention_mask, first_layer=0, deterministic=deterministic
    )

  def resume(
    self,
    hidden: Array,
    attention_mask: Array,
    *,
    first_layer: int,
    deterministic: bool = True,
  ) -> Array:
    """The rest of `__call__` from the state that enters `first_layer`."""
    pooled = self._pooled(hidden, attention_mask, first_layer, deterministic)
    if not self.num_classes:
      return pooled
    return self.head(self.dropout(pooled, deterministic))

  def prefix(
    self,
    input_ids: Array,
    attention_mask: Array,
    token_type_ids: Array | None = None,
    *,
    first_layer: int,
    deterministic: bool = True,
  ) -> Array:
    """The state [B, L, H] that enters `first_layer` (see `resume`)."""
    states = self.hidden_states(
      input_ids,
      attention_mask,
      token_type_ids,
      last_layer=first_layer,
      deterministic=deterministic,
    )
    return states[-1]

  def embed(
    self,
    input_ids: Array,
    attention_mask: Array,
    token_type_ids: Array | None = None,
    *,
    deterministic: bool = True,
  ) -> Array:
    """Pooled embeddings [B, H], not normalised, whatever the head."""
    hidden = self.body.embed(input_ids, token_type_ids, deterministic)
    return self._pooled(hidden, attention_mask, 0, deterministic)

  def hidden_states(
    self,
    input_ids: Array,
    attention_mask: Array,
    token_type_ids: Array | None = None,
    *,
    last_layer: int | None = None,
    deterministic: bool = True,
  ) -> list[Array]:
    """Embeddings and the state after each layer, `last_layer + 1` arrays."""
    last = self.config.num_layers if last_layer is None else last_layer
    self._check_layer(last)
    hidden = self.body.embed(input_ids, token_type_ids, deterministic)
    rest = self.body.layers(
      hidden, attention_mask, 0, last, deterministic=deterministic
    )
    return [hidden, *rest]

  def _pooled(self, hidden, attention_mask, first_layer, deterministic):
    self._check_layer(first_layer)
    states = self.body.layers(
      hidden,
      attention_mask,
      first_layer,
      self.config.num_layers,
      deterministic=deterministic,
    )
    return pool([hidden, *states][-1], attention_mask, self.pooling)

  def _check_layer(self, layer: int):
    if not 0 <= layer <= self.config.num_layers:
      raise UsageError(
        f'layer {layer} of a model with {self.config.num_layers} layers; '
        f'choose 0 to {self.config.num_layers}'
      )
