"""Low-rank adaptation (LoRA).

A factor is a leaf beside its kernel, `kernel.lora_a` and `kernel.lora_b`.
"""

import functools
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.adapters.norms import running_statistics
from fmeta.errors import UsageError
from fmeta.tuning import keep_under
from fmeta.types import Array, Params, Scalar, Tuning

A, B = '.lora_a', '.lora_b'


def lora_init(
  params: Params, rng: Array, patterns: tuple[str, ...], rank: int
) -> dict:
  """The parameters with low-rank factors beside every matching kernel.

  A is uniform in +-1/sqrt(in) and B is zero, so the model starts unchanged
  (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1; the
  distribution of A is the one of the authors' code). Use it to let an outer
  loop own the factors: they are then meta-learned instead of drawn anew in
  every episode.

  Args:
    params: full parameters; matching kernels are [in, out].
    rng: key; each factor's own key depends on its name only.
    patterns: full-match regular expressions of the kernels to adapt.
    rank: width of the factors, A [in, rank] and B [rank, out].

  Raises:
    UsageError: if a pattern matches nothing or a leaf is not [in, out].
  """
  leaf_names = tree.names(params)
  tree.check_patterns(patterns, leaf_names)
  pairs = [(pattern, None) for pattern in patterns]
  factors = {}
  for name in leaf_names:
    if tree.first_match(name, pairs) is None or name.endswith((A, B)):
      continue
    factors[name] = _new_factors(tree.get(params, name), name, rank, rng)
  return _with_factors(params, factors)


def _new_factors(kernel, name: str, rank: int, rng: Array):
  if kernel.ndim != 2:
    raise UsageError(
      f'lora needs [in, out] kernels, but {name!r} has shape {kernel.shape}; '
      'narrow the pattern, or unroll scanned layers'
    )
  if not 0 < rank <= min(kernel.shape):
    raise UsageError(
      f'lora rank {rank} for {name!r} of shape {kernel.shape}; possible: '
      f'1..{min(kernel.shape)}'
    )
  rng = jax.random.fold_in(rng, zlib.crc32(name.encode()))
  bound = kernel.shape[0] ** -0.5
  shape = (kernel.shape[0], rank)
  a = jax.random.uniform(rng, shape, kernel.dtype, -bound, bound)
  return a, jnp.zeros((rank, kernel.shape[1]), kernel.dtype)


def _with_factors(params: Mapping, factors: Mapping, prefix: str = '') -> dict:
  out = {}
  for key, value in params.items():
    name = f'{prefix}{key}'
    if isinstance(value, Mapping):
      out[key] = _with_factors(value, factors, name + '/')
    else:
      out[key] = value
      if name in factors:
        out[f'{key}{A}'], out[f'{key}{B}'] = factors[name]
  return out


def _factors(trainable: Params) -> dict[str, tuple[Array, Array]]:
  return {
    name.removesuffix(A): (
      tree.get(trainable, name),
      tree.get(trainable, name.removesuffix(A) + B),
    )
    for name in tree.names(trainable)
    if name.endswith(A)
  }


def _without_factors(trainable: Params) -> dict:
  return tree.partition(trainable, lambda name: not name.endswith((A, B)))[0]


def _lora_tuning(patterns, rank, alpha, also, intercept) -> Tuning:
  if rank < 1:
    raise UsageError(f'lora rank {rank}; give at least 1')

  def init(params, rng):
    born = any(name.endswith(A) for name in tree.names(params))
    if not born:
      params = lora_init(params, rng, patterns, rank)
    for name, (a, _) in _factors(params).items():
      if a.shape[-1] != rank:
        raise UsageError(
          f'factors of {name!r} have rank {a.shape[-1]}, but the tuning says '
          f'rank={rank}; give both the same'
        )
    if also:
      tree.check_patterns(also, tree.names(params))
    pairs = [(pattern, None) for pattern in also]
    return tree.partition(
      params,
      lambda name: (
        name.endswith((A, B)) or tree.first_match(name, pairs) is not None
      ),
    )

  def merge(trainable, frozen):
    factors = _factors(trainable)
    base = tree.combine(frozen, _without_factors(trainable))

    def add(name, leaf):
      if name not in factors:
        return leaf
      a, b = factors[name]
      return leaf + (alpha / rank) * (a @ b)

    return tree.map_with_name(add, base)

  return Tuning(
    init, merge, keep_under, functools.partial(intercept, merge, alpha / rank)
  )


@contextmanager
def _merged_path(merge, scale, trainable, frozen) -> Iterator[Params]:
  del scale
  with running_statistics(trainable, frozen):
    yield merge(trainable, frozen)


@contextmanager
def _low_rank_path(merge, scale, trainable, frozen) -> Iterator[Params]:
  import flax.linen as nn

  del merge
  factors, entered = _factors(trainable), set()

  def interceptor(next_fun, args, kwargs, context):
    name = '/'.join((*context.module.path, 'kernel'))
    outputs = next_fun(*args, **kwargs)
    if (
      name in factors
      and isinstance(context.module, nn.Dense)
      and context.method_name == '__call__'
    ):
      entered.add(name)
      a, b = factors[name]
      inputs = args[0] if args else kwargs['inputs']
      # A layer that computes in bf16 stays bf16.
      delta = scale * ((inputs @ a) @ b)
      outputs = outputs + delta.astype(outputs.dtype)
    return outputs

  with (
    nn.intercept_methods(interceptor),
    running_statistics(trainable, frozen),
  ):
    yield tree.combine(frozen, _without_factors(trainable))
  missed = sorted(set(factors) - entered)
  if missed:
    raise UsageError(
      f'lora factors of {missed[0]!r} (and {len(missed) - 1} more) never '
      'entered an nn.Dense; use lora_merged for other layers'
    )


def lora(
  *patterns: str,
  rank: int = 8,
  alpha: Scalar = 16.0,
  also: tuple[str, ...] = (),
) -> Tuning:
  """Low-rank adaptation through the activations of dense layers.

  y = x W + (alpha / rank) (x A) B with W frozen (Hu et al. 2021,
  https://arxiv.org/abs/2106.09685, eq. 3). No full-size weight gradient is
  ever formed; `merge` gives W + (alpha / rank) A B for export. Factors
  already among the parameters (`lora_init`) are used, otherwise they are
  born from the key given to `init`.

  Args:
    *patterns: full-match regular expressions of [in, out] kernels.
    rank: width of the factors; 8 as in the paper's Table 2 (RoBERTa-base).
    alpha: scale; 16 as in the paper's Table 9 for rank 8. May be traced.
    also: patterns of ordinary parameters that move too, such as a new head.

  Raises:
    UsageError: if a pattern matches nothing, a kernel is not [in, out], the
      rank does not fit, or an adapted kernel does not belong to an `nn.Dense`.
  """
  return _lora_tuning(patterns, rank, alpha, also, _low_rank_path)


def lora_merged(
  *patterns: str,
  rank: int = 8,
  alpha: Scalar = 16.0,
  also: tuple[str, ...] = (),
) -> Tuning:
  """LoRA that runs the model on merged weights, for any [in, out] parameter.

  The same function of the factors as `lora`, at the cost of a full-size
  weight gradient; for layers that are no `nn.Dense`.
  """
  return _lora_tuning(patterns, rank, alpha, also, _merged_path)
