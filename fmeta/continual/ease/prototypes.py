"""Class prototypes in every subspace, those without data synthesised.

Arrays over subspaces and classes are [T, C, ...]; `rows` [T, C] counts the
rows of each class in each task, and is all that says which task a class is of.
"""

import jax
import jax.numpy as jnp

from fmeta.baselines import unit_length
from fmeta.types import Array, Scalar

# Its exponential is zero.
NEVER = -1e9


def complement(
  similarity: Array,
  new: Array,
  present: Array | None = None,
  temperature: Scalar = 1.0,
) -> Array:
  """Prototypes of old classes in a subspace that never saw their rows.

    p_i = sum_j softmax_j(sim_ij / temperature) new_j

  (Zhou et al. 2024, https://arxiv.org/abs/2403.12030, eqs. 8 and 9). The paper
  writes the softmax's sum over i; here it is over j, as in the released code,
  so that p_i is a mean of new prototypes.

  Args:
    similarity: [O, N], cosines of old and new classes where both have rows.
    new: [N, D], prototypes of the new classes in the new subspace.
    present: bool [N], which of them there are; all by default.
    temperature: 1 in the paper; towards 0 the most similar new class alone is
      left. May be traced.

  Returns:
    [O, D].
  """
  sharp = similarity / temperature
  if present is not None:
    sharp = jnp.where(present[None, :], sharp, NEVER)
  return jnp.matmul(jax.nn.softmax(sharp, axis=1), new, precision='highest')


def means(sums: Array, rows: Array) -> Array:
  """True prototypes [T, C, D]; zero where a subspace saw no row of a class.

  Args:
    sums: [T, C, D], of the features in each subspace of every row that came
      when the subspace was there.
    rows: [T, C].
  """
  # A task's rows are seen in its own subspace and in all before it.
  seen = jnp.cumsum(rows[::-1], axis=0)[::-1][:, :, None]
  return sums / jnp.where(seen > 0, seen, 1)


def completed(
  prototypes: Array, rows: Array, temperature: Scalar = 1.0
) -> Array:
  """`means` with the missing ones synthesised by `complement`, [T, C, D].

  A class is compared with the classes of a later task in the subspace of its
  own task, the last that had rows of it.
  """
  last = len(rows) - 1 - jnp.argmax(rows[::-1] > 0, axis=0)
  units = unit_length(prototypes)
  cosines = jnp.einsum('tid,tjd->tij', units, units, precision='highest')
  similarity = cosines[last, jnp.arange(rows.shape[1])]
  made = jax.vmap(complement, (None, 0, 0, None))(
    similarity, prototypes, rows > 0, temperature
  )
  missing = jnp.arange(len(rows))[:, None] > last[None, :]
  return jnp.where(missing[:, :, None], made, prototypes)


def ensemble(
  features: Array, prototypes: Array, rows: Array, alpha: Scalar = 0.1
) -> Array:
  """Logits [B, C]: cosines in all subspaces, that of the class's task first.

    l_c(x) = cos(f_t(x), p_tc) + alpha sum_{s other} cos(f_s(x), p_sc)

  for a class of task t (eq. 12; cosines in each subspace as in the released
  code). A class without rows gets -inf.

  Args:
    features: [T, B, D]; zero in subspaces that are still to come.
    prototypes: [T, C, D], without a hole.
    rows: [T, C].
    alpha: weight of the subspaces of other tasks. May be traced.
  """
  weights = jnp.where(rows > 0, 1.0, alpha)[:, :, None]
  weighted = weights * unit_length(prototypes)
  logits = jnp.einsum(
    'tbd,tcd->bc', unit_length(features), weighted, precision='highest'
  )
  return jnp.where(rows.sum(0)[None, :] > 0, logits, -jnp.inf)
