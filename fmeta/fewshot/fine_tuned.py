"""Fine-tuning a head's encoder on the support set of each new task."""

from typing import Any

from fmeta.data.augment import Augment, augmented
from fmeta.fewshot.episode_losses import (
  Predict,
  beside_support,
  head_forward,
)
from fmeta.fewshot.heads import Head, Learned
from fmeta.losses import Criterion, softmax_cross_entropy, supervised
from fmeta.meta import predict_episodes
from fmeta.types import Forward, Learner, LossFn


def support_loss(
  head: Head | Learned,
  embed: Forward,
  ways: int,
  augment: Augment,
  criterion: Criterion = softmax_cross_entropy,
) -> LossFn:
  """The augmented support set as queries of itself.

    L(p) = mean_i criterion(head(f_p(support), f_p(augment(x_i))), y_i)

  The last stage of P>M>F (pre-train, meta-train, fine-tune; Hu et al. 2022,
  https://arxiv.org/abs/2204.07305, section 3.3): no query of the task is
  needed. An inner learner of it goes to `predict_fine_tuned`.

  Args:
    head: as for `head_loss`.
    embed: as for `head_loss`.
    ways: as for `head_loss`.
    augment: `(batch, key) -> batch`, anew in every step; in evaluation mode
      nothing is augmented.
    criterion: the loss per row.

  Returns:
    A `LossFn` of one task's support batch.
  """
  of_queries = supervised(head_forward(head, embed, ways), criterion)
  loss_fn = augmented(of_queries, augment)

  def loss(params, model_state, batch, rng):
    queries = {**batch, 'support': batch}
    return loss_fn(params, model_state, queries, rng)

  return loss


def predict_fine_tuned(
  inner: Learner,
  head: Head | Learned,
  embed: Forward,
  ways: int,
  num_steps: int,
  **options: Any,
) -> Predict:
  """A head after fine-tuning on each support set, for `evaluate_episodes`.

  Args:
    inner: what fine-tunes, for example `finetune(support_loss(...), adam(r))`.
      The authors' code has `cosine_prototypes()` as head and chooses r per
      domain from {0, 1e-4, 1e-3, 1e-2} on a few labelled episodes.
    head: as for `head_loss`.
    embed: as for `head_loss`.
    ways: as for `head_loss`.
    num_steps: 0 is `predict_head`; 50 or 100 in the authors' code.
    **options: `model_state` and `over` of `predict_episodes`.

  Returns:
    `(params, episodes, rng) -> logits [tasks, Q, ways]`.
  """
  forward = head_forward(head, embed, ways)
  answer = predict_episodes(inner, forward, num_steps, **options)
  return lambda params, episodes, rng: answer(
    params, beside_support(episodes), rng
  )
