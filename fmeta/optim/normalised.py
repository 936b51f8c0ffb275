"""Directions whose size does not depend on the gradient's.

Signs, per-leaf trust ratios and orthogonalised matrices. None has a
derivative where what it divides by is zero, so all are for plain training or
first-order inner loops.
"""

from typing import Unpack

import jax
import optax
import optax.contrib

from fmeta import tree
from fmeta.optim.patterns import (
  DECAY,
  decay_by_patterns,
  values_of,
)
from fmeta.optim.rates import (
  Limits,
  Options,
  Rate,
  with_multipliers,
  with_rates,
)
from fmeta.types import Params, Scalar

# Which leaves get a trust ratio: as in the released code of LARS and LAMB,
# not biases and norm scales, whose norms start at zero or say nothing.
TRUST = ((r'(.*/)?(bias|scale)', False), ('.*', True))

# Which leaves are matrices of hidden layers: Jordan et al. 2024 leave
# embeddings, the head and vectors to Adam. A LoRA factor is like its kernel.
MATRICES = (
  (r'(.*/)?head/.*', False),
  (r'(.*/)?kernel(\..*)?', True),
  ('.*', False),
)


def lion(
  rate: Rate,
  *,
  b1: Scalar = 0.9,
  b2: Scalar = 0.99,
  **options: Unpack[Options],
) -> optax.GradientTransformation:
  """The sign of an average of gradient and momentum.

    u = sign(b1 m + (1 - b1) g),   m <- b2 m + (1 - b2) g

  (Chen et al. 2023, https://arxiv.org/abs/2302.06675, program 1.) The paper
  takes rates 3 to 10 times below AdamW's, and decay as much above.

  Args:
    rate: float, traced array or optax schedule.
    b1: weight of the momentum in the sign; the paper's.
    b2: decay of the momentum; the paper's.
    **options: see `with_rates`.
  """
  return with_rates(optax.scale_by_lion(b1, b2), rate, **options)


def novograd(
  rate: Rate,
  *,
  b1: Scalar = 0.95,
  b2: Scalar = 0.98,
  eps: Scalar = 1e-8,
  **options: Unpack[Options],
) -> optax.GradientTransformation:
  """Momentum of gradients divided by a running norm per leaf.

    v <- b2 v + (1 - b2) |g|^2,   u <- b1 u + g / (sqrt(v) + eps)

  with v = |g|^2 at the first step (Ginsburg et al. 2019,
  https://arxiv.org/abs/1905.11286, algorithm 1).

  Args:
    rate: float, traced array or optax schedule.
    b1: decay of the momentum; 0.95 in the paper's ResNet-50 runs.
    b2: decay of the norm; 0.98 there.
    eps: added to the norm.
    **options: see `with_rates`; decay is outside the momentum.
  """
  return with_rates(optax.scale_by_novograd(b1, b2, eps), rate, **options)


def _trusted(transformation, adapt):
  def mask(params):
    return values_of(params, adapt, 'trust')

  return optax.masked(transformation, mask)


def lamb(
  rate: Rate,
  *,
  b1: Scalar = 0.9,
  b2: Scalar = 0.999,
  eps: Scalar = 1e-6,
  weight_decay: Scalar = 0.01,
  decay: tree.Patterns = DECAY,
  adapt: tree.Patterns = TRUST,
  **limits: Unpack[Limits],
) -> optax.GradientTransformation:
  """AdamW's direction, rescaled per leaf to the parameters' norm.

    r = m_hat / (sqrt(v_hat) + eps) + weight_decay p,   u = r |p| / |r|

  (You et al. 2019, https://arxiv.org/abs/1904.00962, algorithm 2.)

  Args:
    rate: float, traced array or optax schedule.
    b1: decay of the first moment; the paper's.
    b2: decay of the second moment; the paper's.
    eps: added to the root; the paper's.
    weight_decay: inside the ratio; 0.01 in the paper.
    decay: which leaves decay.
    adapt: which leaves are rescaled: ordered `(pattern, bool)`.
    **limits: `multipliers` and `clip_norm`.
  """
  direction = optax.chain(
    optax.scale_by_adam(b1, b2, eps),
    decay_by_patterns(weight_decay, decay),
    _trusted(optax.scale_by_trust_ratio(), adapt),
  )
  return with_rates(direction, rate, **limits)


def lars(
  rate: Rate,
  *,
  momentum: Scalar = 0.9,
  trust: Scalar = 1e-3,
  weight_decay: Scalar = 0.0,
  decay: tree.Patterns = DECAY,
  adapt: tree.Patterns = TRUST,
  **limits: Unpack[Limits],
) -> optax.GradientTransformation:
  """Momentum on gradients rescaled per leaf to the parameters' norm.

    r = g + weight_decay p,   v <- momentum v + rate trust |p| / |r| r

  (You et al. 2017, https://arxiv.org/abs/1708.03888, algorithm 1, with |r| for
  their |g| + weight_decay |p|, as optax has it.)

  Args:
    rate: float, traced array or optax schedule; it is inside the momentum.
    momentum: decay of the velocity; the paper's.
    trust: the trust coefficient; 1e-3 in the paper.
    weight_decay: added to the gradient; 0.0 is optax's, 5e-4 the paper's.
    decay: which leaves decay.
    adapt: which leaves are rescaled: ordered `(pattern, bool)`.
    **limits: `multipliers` and `clip_norm`.
  """
  steps = optax.chain(
    decay_by_patterns(weight_decay, decay),
    _trusted(optax.scale_by_trust_ratio(trust_coefficient=trust), adapt),
    optax.scale_by_learning_rate(rate),
    optax.trace(momentum),
  )
  return with_multipliers(steps, **limits)


def muon(
  rate: Rate,
  *,
  beta: Scalar = 0.95,
  b1: Scalar = 0.9,
  b2: Scalar = 0.999,
  eps_root: Scalar = 0.0,
  matrices: tree.Patterns = MATRICES,
  rms: Scalar = 0.2,
  **options: Unpack[Options],
) -> optax.GradientTransformation:
  """Orthogonalised momentum for matrices, Adam for the rest.

  For a matrix [in, out] with Nesterov momentum m, and five Newton-Schulz steps
  that bring the singular values of m near 1,

    u = rms sqrt(max(in, out)) orthogonal(m)

  (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the factor is
  that of Liu et al. 2025, https://arxiv.org/abs/2502.16982, eq. 4: it gives u
  the root mean square that AdamW's updates have, so one rate serves both). A
  convolution's kernel [..., out] is the matrix of its flattened inputs.

  Args:
    rate: float, traced array or optax schedule.
    beta: decay of the momentum; 0.95 in Jordan's code.
    b1: Adam's first decay, for the rest.
    b2: Adam's second decay.
    eps_root: added inside Adam's root.
    matrices: which leaves are orthogonalised: ordered `(pattern, bool)`; what
      has fewer than two axes never is.
    rms: 0.2 in Liu et al.
    **options: see `with_rates`.
  """

  def labels(params: Params):
    chosen = values_of(params, matrices, 'rule')
    return jax.tree.map(
      lambda p, yes: 'muon' if yes and p.ndim >= 2 else 'adam', params, chosen
    )

  orthogonal = optax.chain(
    optax.contrib.scale_by_muon(
      beta=beta, weight_dimension_numbers=_as_matrices
    ),
    optax.stateless_with_tree_map(lambda u, p: u * (rms * _longer_side(u))),
  )
  adam = optax.scale_by_adam(b1, b2, eps_root=eps_root)
  direction = optax.partition({'muon': orthogonal, 'adam': adam}, labels)
  return with_rates(direction, rate, **options)


def _longer_side(kernel):
  return max(kernel[..., 0].size, kernel.shape[-1]) ** 0.5


def _as_matrices(leaves):
  def numbers(leaf):
    inputs = tuple(range(leaf.ndim - 1))
    return optax.contrib.MuonDimensionNumbers(inputs, leaf.ndim - 1)

  return jax.tree.map(numbers, leaves)
