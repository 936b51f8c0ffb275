"""How active each hidden unit was in the last batch, as model state.

It belongs to a module as BatchNorm's statistics do: it moves in training
only, is saved and resumed with the rest, and stays where the module is frozen.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.adapters import siblings
from fmeta.errors import UsageError
from fmeta.types import Array, Batch, Forward, ModelState, Params

COLLECTION = 'activity'
_SIZE = 'size'


def no_activity(params: Params, layers: Sequence[str]) -> ModelState:
  """The model state that `watched` starts from: zeros [units] per layer.

    learner.init(params, key, {**model_state, **no_activity(params, layers)})

  Args:
    params: with a kernel [in, units] per layer.
    layers: paths of the dense modules.
  """
  return _as_state(
    {
      layer: jnp.zeros(tree.get(params, f'{layer}/kernel').shape[-1])
      for layer in layers
    }
  )


def watched(
  forward: Forward,
  layers: Sequence[str],
  activation: Callable[[Array], Array] = jax.nn.relu,
) -> Forward:
  """A forward pass that also reports mean |activation| per hidden unit.

  In training, `model_state` comes back with the mean over the batch's rows of
  weight above zero (weighted, and over tokens if there are any) of
  |activation(output)| for each layer; evaluation leaves it alone. Microbatches
  (`accumulate`) leave that of the last one.

  Args:
    forward: runs a flax.linen module.
    layers: paths of dense modules, for example `'body/layer_0'`.
    activation: what the model applies to their outputs.

  Raises:
    UsageError: when it runs, if a layer is not called.
  """

  def run(
    params: Params, model_state: ModelState, batch: Batch, rng: Array | None
  ) -> tuple[Any, ModelState]:
    own = {key: x for key, x in model_state.items() if key != COLLECTION}
    if rng is None:
      return forward(params, own, batch, None)[0], model_state
    import flax.linen as nn

    sizes = {}

    def interceptor(next_fun, args, kwargs, context):
      out = next_fun(*args, **kwargs)
      name = '/'.join(context.module.path)
      if name in layers and context.method_name == '__call__':
        sizes[name] = _mean_size(activation(out), batch)
      return out

    with nn.intercept_methods(interceptor):
      outputs, own = forward(params, own, batch, rng)
    missing = sorted(set(layers) - set(sizes))
    if missing:
      raise UsageError(
        f'the model never calls a module {missing[0]!r}; give paths of dense '
        'modules as in the names of their kernels'
      )
    return outputs, {**own, **_as_state(sizes)}

  return run


def sizes_of(
  model_state: ModelState | None, layers: Sequence[str]
) -> dict[str, Array]:
  """What `watched` reported, [units] per layer.

  Raises:
    UsageError: if it did not report one of the layers.
  """
  reported = (model_state or {}).get(COLLECTION, {})
  try:
    return {layer: tree.get(reported, f'{layer}/{_SIZE}') for layer in layers}
  except KeyError as error:
    raise UsageError(
      f'the model does not report how active {error.args[0]!r} was; wrap its '
      'forward pass in plasticity.watched and start from no_activity'
    ) from error


def _mean_size(hidden: Array, batch: Batch) -> Array:
  size = jax.lax.stop_gradient(jnp.abs(hidden.astype(jnp.float32)))
  rows = size.reshape(len(size), -1, size.shape[-1]).mean(1)
  weight = jnp.asarray(batch.get('weight', jnp.ones(len(rows))))[:, None]
  total = jnp.where(weight > 0, weight * rows, 0).sum(0)
  return total / jnp.maximum(weight.sum(), jnp.finfo(jnp.float32).tiny)


def _as_state(sizes: Mapping[str, Array]) -> dict[str, Any]:
  named = {f'{layer}/{_SIZE}': size for layer, size in sizes.items()}
  return {COLLECTION: siblings.grow({}, named)}
