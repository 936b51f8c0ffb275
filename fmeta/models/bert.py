"""BERT, an encoder with a linear head (Devlin et al. 2019).

https://arxiv.org/abs/1810.04805. Layers are unrolled: an adapter that steps
into a scanned one would add the same delta to every layer. The names are
`body/embeddings/...`, `body/layer_<k>/...` and `head/...`;
`fmeta.pretrained` fills them from published weights.

The sequence may be entered in the middle: `prefix` runs the embeddings and
the first layers once, `resume` the remaining ones. With a frozen prefix and
no dropout that is the same function at a fraction of the price.
"""

import jax.numpy as jnp
from flax import linen as nn

from fmeta.errors import UsageError
from fmeta.models.attention import additive_mask, packed_mask
from fmeta.models.bert_layers import (
  BertConfig,
  Embeddings,
  Layer,
  Masks,
  dense,
)
from fmeta.models.dropout import drop, keep, linear_decay, path_scales
from fmeta.models.pooling import (
  POOLINGS,
  pool,
  pool_packed,
  pool_prompt,
)
from fmeta.types import Array


class Body(nn.Module):
  """Embeddings and a stack of named layers."""

  config: BertConfig

  def setup(self):
    """Names the parts."""
    self.embeddings = Embeddings(self.config)
    layer = nn.remat(Layer) if self.config.remat else Layer
    for k in range(self.config.num_layers):
      setattr(self, f'layer_{k}', layer(self.config))

  def embed(
    self,
    input_ids: Array,
    token_type_ids: Array | None,
    deterministic: bool,
    position_ids: Array | None = None,
  ) -> Array:
    """[B, L] -> [B, P + L, H], the state before layer 0 (see `prompt`)."""
    rows, length = input_ids.shape
    shape = (rows, self.prompt_length() + length, self.config.hidden_size)
    mask = self._mask(self.config.dropout, shape, deterministic)
    prompt = self.embeddings.prompt()
    return self.embeddings(
      input_ids, token_type_ids, prompt, mask, position_ids
    )

  def prompt_length(self) -> int:
    """How many states stand before those of a row's own tokens."""
    prompt = self.embeddings.prompt()
    return 0 if prompt is None else prompt.shape[-2]

  def seen(self, attention_mask: Array) -> Array:
    """The additive mask of rows [B, L]; a prompt is never padding."""
    before = ((0, 0), (self.prompt_length(), 0))
    return additive_mask(jnp.pad(attention_mask, before, constant_values=1))

  def layers(
    self,
    hidden: Array,
    bias: Array,
    first: int,
    last: int,
    deterministic: bool,
  ) -> list[Array]:
    """States before layer `first` and after each one up to `last - 1`."""
    states = [hidden]
    if first == last:  # No layer, no mask to draw.
      return states
    masks = self._masks(hidden.shape, first, last, deterministic)
    for k, mask in zip(range(first, last), masks, strict=True):
      layer = getattr(self, f'layer_{k}')
      states.append(layer(states[-1], bias, mask))
    return states

  def _mask(self, rate, shape, deterministic) -> Array | None:
    if deterministic or not rate:
      return None
    return keep(self.make_rng('dropout'), rate, shape)

  def _paths(self, rows: int, first: int, last: int, deterministic: bool):
    if deterministic or not self.config.stochastic_depth:
      return None
    rates = linear_decay(self.config.stochastic_depth, self.config.num_layers)
    return path_scales(self.make_rng('dropout'), rates[first:last], (2, rows))

  def _masks(
    self, shape, first: int, last: int, deterministic: bool
  ) -> list[Masks]:
    """Draws all layers' masks from three generators, not from four each."""
    config, (rows, length, _), count = self.config, shape, last - first
    square = (count, rows, config.num_heads, length, length)
    attention = self._mask(config.attention_dropout, square, deterministic)
    outputs = self._mask(config.dropout, (count, 2, *shape), deterministic)
    paths = self._paths(rows, first, last, deterministic)

    def row(masks, k):
      return None if masks is None else masks[k]

    return [
      Masks(row(attention, k), row(outputs, k), row(paths, k))
      for k in range(count)
    ]


class BertClassifier(nn.Module):
  """BERT, pooled, with a linear head.

  Attributes:
    config: the sizes.
    num_classes: outputs of the head; None: no head, calls return embeddings.
    pooling: 'mean' over the tokens of `attention_mask` (Sentence-BERT,
      Reimers & Gurevych 2019), 'cls', the first token, or 'prompt', the mean
      over the states of a prompt (L2P).
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
    if self.num_classes:
      self.head = dense(self.config, self.num_classes)

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
    return self._logits(pooled, deterministic)

  def packed(
    self,
    input_ids: Array,
    text_ids: Array,
    position_ids: Array,
    length: Array,
    *,
    deterministic: bool = True,
  ) -> Array:
    """`__call__` on rows that hold several texts each: [B, classes].

    What padding costs is what a row has left; the numbers are those of the
    padded batch. `fmeta.packing.pack_collate` makes such batches.

    Args:
      input_ids: [R, L].
      text_ids: [R, L], which of the B texts a token belongs to, -1 for none.
      position_ids: [R, L], where the token stands in its text.
      length: [B], tokens of each text.
      deterministic: without dropout.

    Raises:
      UsageError: with a prompt or stochastic depth, which act on whole rows.
    """
    if self.body.prompt_length():
      raise UsageError(
        'a prompt stands before a row, and a packed row has several texts; '
        'train prompts on padded batches'
      )
    if self.config.stochastic_depth and not deterministic:
      raise UsageError(
        'stochastic depth drops whole rows, and a packed row has several '
        'texts; set stochastic_depth=0 or use padded batches'
      )
    hidden = self.body.embed(input_ids, None, deterministic, position_ids)
    bias, last = packed_mask(text_ids), self.config.num_layers
    hidden = self.body.layers(hidden, bias, 0, last, deterministic)[-1]
    pooled = pool_packed(hidden, text_ids, position_ids, length, self.pooling)
    return self._logits(pooled, deterministic)

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
    bias = self.body.seen(attention_mask)
    return self.body.layers(hidden, bias, 0, last, deterministic)

  def _logits(self, pooled: Array, deterministic: bool) -> Array:
    if not self.num_classes:
      return pooled
    rate, mask = self.config.dropout, None
    if rate and not deterministic:
      mask = keep(self.make_rng('dropout'), rate, pooled.shape)
    return self.head(drop(pooled, mask, rate))

  def _pooled(self, hidden, attention_mask, first_layer, deterministic):
    self._check_layer(first_layer)
    states = self.body.layers(
      hidden,
      self.body.seen(attention_mask),
      first_layer,
      self.config.num_layers,
      deterministic,
    )
    length = self.body.prompt_length()
    if self.pooling == 'prompt':
      return pool_prompt(states[-1][:, :length])
    # A prompt has no share in the pooled vector.
    return pool(states[-1][:, length:], attention_mask, self.pooling)

  def _check_layer(self, layer: int):
    if not 0 <= layer <= self.config.num_layers:
      raise UsageError(
        f'layer {layer} of a model with {self.config.num_layers} layers; '
        f'choose 0 to {self.config.num_layers}'
      )
