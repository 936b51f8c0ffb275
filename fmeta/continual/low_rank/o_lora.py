"""O-LoRA: a task's factors are held orthogonal to those of earlier tasks."""

import jax.numpy as jnp

from fmeta import tree
from fmeta.adapters.lora import A
from fmeta.errors import UsageError
from fmeta.penalty import no_penalty
from fmeta.penalty.leaves import require_room
from fmeta.types import Array, Params, Penalty, Scalar


def o_lora(strength: Scalar, num_tasks: int) -> Penalty:
  """Orthogonal low-rank adaptation.

    strength * sum_kernels sum_{i < t} sum_{j, k} (A_i' A_t)_{jk}^2

  with A_t [in, rank] of the task at hand and A_i as task i left it (Wang et
  al. 2023, https://arxiv.org/abs/2310.14152; squares as in the paper, where
  the released code adds absolute values). The columns of A span where a task
  moves W, so each moves where none before it did. It is the penalty of a
  learner that folds:

    tuning = adapters.lora('body/.*/kernel', also=('head/.*',))
    hold = continual.o_lora(0.5, num_tasks=10)
    learner = continual.fold(
      finetune(loss, adamw_per_leaf(1e-3), tuning=tuning, penalty=hold)
    )

  Together with another penalty: `all_of(o_lora(...), lwf(...))`. The state has
  num_tasks * in * rank numbers a kernel; a kernel of a convolution is the
  matrix of its leading axes.

  Args:
    strength: the paper's lambda_1. May be traced.
    num_tasks: how many tasks' ends there is room for.

  Raises:
    UsageError: for no task, at `init` without a trainable A, and at a task's
      end if `num_tasks` tasks are remembered already (under `jit`, where
      nothing can be raised, the penalty becomes NaN).
  """
  if num_tasks < 1:
    raise UsageError(f'o_lora of num_tasks={num_tasks}; give at least 1')

  def init(trainable, params):
    del params
    past = {
      kernel: jnp.zeros((num_tasks, *a.shape), a.dtype)
      for kernel, a in _factors(trainable).items()
    }
    return {'past': past, 'tasks': jnp.zeros((), jnp.int32)}

  def value(trainable, params, state, batch, rng):
    del params, batch, rng
    terms = [
      jnp.sum(jnp.einsum('tnj,nk->tjk', state['past'][kernel], a) ** 2)
      for kernel, a in _factors(trainable).items()
    ]
    return strength * sum(terms, jnp.zeros(()))

  def consolidate(state, trainable, *given):
    del given
    require_room('o_lora', state['tasks'], num_tasks)
    slot = jnp.minimum(state['tasks'], num_tasks - 1)
    fits = state['tasks'] < num_tasks
    past = {
      kernel: state['past'][kernel].at[slot].set(jnp.where(fits, a, jnp.nan))
      for kernel, a in _factors(trainable).items()
    }
    return {'past': past, 'tasks': state['tasks'] + 1}

  return no_penalty()._replace(init=init, value=value, consolidate=consolidate)


def _factors(trainable: Params) -> dict[str, Array]:
  """Kernel -> A [in, rank]."""
  named = [name for name in tree.names(trainable) if name.endswith(A)]
  if not named:
    raise UsageError(
      'o_lora holds the factors A of lora apart, and none of them moves; '
      f'trainable are {tree.names(trainable)[:3]}: give tuning=lora(...)'
    )
  leaves = {name: tree.get(trainable, name) for name in named}
  return {
    name.removesuffix(A): a.reshape(-1, a.shape[-1])
    for name, a in leaves.items()
  }
