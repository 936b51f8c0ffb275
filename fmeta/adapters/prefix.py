"""Prefix tuning: trained keys and values in every attention layer.

The leaves stand beside the projections that make the other keys and values:
`<attention>/key/kernel.prefix` and `<attention>/value/kernel.prefix`.
"""

from collections.abc import Iterable, Mapping

import jax

from fmeta import tree
from fmeta.adapters import entry, siblings
from fmeta.errors import UsageError
from fmeta.types import Array, Params, Tuning

PREFIX = '.prefix'
SUFFIXES = (PREFIX,)


def prefix_init(
  params: Params, rng: Array, patterns: tuple[str, ...], length: int
) -> dict:
  """The parameters with a prefix beside every matching kernel.

  Its rows are the projections x W + b of one set of standard normal vectors
  x per attention layer, so keys and values start at the size that real ones
  have (Li & Liang 2021, section 7.4, start from the activations of words).

  Args:
    params: full parameters; matching kernels are [in, out].
    rng: key; a layer's vectors depend on its name only.
    patterns: full-match regular expressions of key and value kernels.
    length: of the prefix; 0 leaves the model as it is.

  Raises:
    UsageError: if a pattern matches nothing, a leaf is not [in, out], a key
      comes without its value, or the length is negative.
  """
  if length < 0:
    raise UsageError(f'prefix of length {length}; give at least 0')
  names = siblings.owners(params, patterns)
  pairs_of(names)
  leaves = {}
  for name in names:
    kernel, path = tree.get(params, name), siblings.module_path(name)
    if kernel.ndim != 2:
      raise UsageError(
        f'prefix needs [in, out] kernels, but {name!r} has shape '
        f'{kernel.shape}; narrow the pattern, or unroll scanned layers'
      )
    key = siblings.key_for(rng, siblings.module_path(path))
    x = jax.random.normal(key, (length, kernel.shape[0]), kernel.dtype)
    layer = tree.get(params, path) if path else params
    bias = layer['bias'][None] if 'bias' in layer else 0.0
    leaves[name + PREFIX] = x @ kernel + bias
  return siblings.grow(params, leaves)


def pairs_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
  """`{attention: (key's leaf, value's leaf)}`.

  Raises:
    UsageError: if a key comes without its value.
  """
  found: dict[str, dict[str, str]] = {}
  for name in names:
    attention, _, part = siblings.module_path(name).rpartition('/')
    found.setdefault(attention, {})[part] = name
  for attention, parts in found.items():
    if set(parts) != {'key', 'value'}:
      raise UsageError(
        f'prefix of {sorted(parts)} in {attention!r}; let the pattern match '
        "the kernels of 'key' and 'value' of an attention, and no other"
      )
  return {path: (parts['key'], parts['value']) for path, parts in found.items()}


def enter(leaves: entry.Leaves, shapes: Mapping) -> entry.Interceptor:
  """Answers the models' hooks `past` and `first_position`; see `entering`."""
  del shapes
  prefixes = leaves[PREFIX]
  pairs = pairs_of(prefixes)
  length = max(leaf.shape[-2] for leaf in prefixes.values())

  def interceptor(next_fun, args, kwargs, context):
    path = '/'.join(context.module.path)
    if context.method_name == 'first_position':
      return next_fun(*args, **kwargs) + length
    if context.method_name != 'past' or path not in pairs:
      return next_fun(*args, **kwargs)
    return tuple(
      entry.note(name + PREFIX, prefixes[name]) for name in pairs[path]
    )

  return interceptor


def prefix(
  *patterns: str, length: int = 20, also: tuple[str, ...] = ()
) -> Tuning:
  """Prefix tuning: every attention also sees `length` trained pairs.

    softmax(q [P_k; K]' / sqrt(d)) [P_v; V]

  with frozen projections (Li & Liang 2021, https://arxiv.org/abs/2101.00190,
  eq. 3; without their reparametrisation, as Liu et al. 2021,
  https://arxiv.org/abs/2110.07602, run it on BERT). For our BERT:

    prefix('body/layer_.*/attention/(key|value)/kernel', also=('head/.*',))

  The prefix is seen by every token, also by those of padding, and stands at
  the first positions: tokens take the positions after it. `merge` gives the
  parameters with the prefixes, which `models.forward` and
  `adapters.entering` run. Models answer through two methods, `past` and
  `first_position`; see `fmeta/models/bert_layers.py`.

  Args:
    *patterns: full-match regular expressions of the kernels of keys and
      values.
    length: of the prefix; 20 is untuned.
    also: patterns of ordinary parameters that move too, such as a new head.

  Raises:
    UsageError: as `prefix_init`, or, in the first step, if the model has no
      place for a prefix.
  """

  def born(params, rng):
    return prefix_init(params, rng, patterns, length)

  return entry.entering_tuning(born, SUFFIXES, also)
