"""A multilayer perceptron."""

from collections.abc import Sequence

from flax import linen as nn

from fmeta.types import Array


class Hidden(nn.Module):
  """The hidden layers, each dense, relu, dropout."""

  sizes: Sequence[int]
  dropout: float

  @nn.compact
  def __call__(self, x: Array, deterministic: bool) -> Array:
    """[B, features] -> [B, sizes[-1]]."""
    for k, size in enumerate(self.sizes):
      x = nn.relu(nn.Dense(size, name=f'layer_{k}')(x))
      x = nn.Dropout(self.dropout)(x, deterministic)
    return x


class Mlp(nn.Module):
  """Dense layers with relu and a linear head; inputs are flattened.

  Attributes:
    sizes: hidden widths, for example (40, 40) for the sinusoids of Finn et
      al. 2017, (400, 400) for split MNIST (van de Ven & Tolias 2019).
    num_outputs: classes, or the dimension of a regression.
    dropout: after each hidden layer.
  """

  sizes: Sequence[int]
  num_outputs: int
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: Array, *, deterministic: bool = True) -> Array:
    """[B, ...] -> [B, num_outputs]."""
    x = x.reshape(x.shape[0], -1)
    x = Hidden(self.sizes, self.dropout, name='body')(x, deterministic)
    return nn.Dense(self.num_outputs, name='head')(x)
