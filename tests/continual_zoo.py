"""Every continual method on a small stream, for tests that take them all."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import prompted
import toys

import fmeta
from fmeta import (
  adapters,
  continual,
  fisher,
  losses,
  memory,
  optim,
  penalty,
  train,
)
from fmeta.continual.prompts import CODA_PROMPT, DUAL_PROMPT

FEATURES, CLASSES = 6, 3
TASKS, STEPS = 3, 12
LOSS, PARAMS, _, FORWARD = toys.problem(dropout=0.2)
ROW = {
  'x': jax.ShapeDtypeStruct((FEATURES,), np.float32),
  'label': jax.ShapeDtypeStruct((), np.int32),
}
KEPT = {**ROW, 'outputs': jax.ShapeDtypeStruct((CLASSES,), np.float32)}


class Method(NamedTuple):
  """How a method takes the stream.

  Attributes:
    learner: makes it.
    remembers: whether it looks at a task's data again at its end.
    ends_task: whether it is told of a task's end besides.
    params: what it starts from.
    to_batch: what the model takes of a batch.
    prepares: whether it looks at a task's data before its first step.
  """

  learner: Callable[[], fmeta.Learner]
  remembers: bool = False
  ends_task: bool = False
  params: fmeta.types.Params = PARAMS
  to_batch: Callable[[dict], dict] = dict
  prepares: bool = False


def batch(task: int, index: int) -> dict[str, np.ndarray]:
  """Batch `index` of a task: its own blobs for the same three classes."""
  rng = np.random.default_rng([task, index])
  label = rng.integers(0, CLASSES, 6).astype(np.int32)
  means = np.random.default_rng(task).normal(size=(CLASSES, FEATURES))
  x = means[label] + 0.5 * rng.normal(size=(6, FEATURES))
  return {'x': x.astype(np.float32), 'label': label}


def finetune(loss=LOSS, **options) -> fmeta.Learner:
  """The step with Adam."""
  return fmeta.finetune(loss, optim.adam(1e-2), **options)


def replay(
  learner: fmeta.Learner, held: fmeta.Memory | None = None, mix=fmeta.append
) -> fmeta.Learner:
  """With ten rows held, by default in a reservoir, four of them in a step."""
  held = fmeta.reservoir(10, KEPT) if held is None else held
  return fmeta.rehearse(learner, held, 4, mix=mix)


def beside(loss) -> fmeta.Learner:
  """With a loss that reads the memory."""
  return replay(finetune(loss), mix=fmeta.beside)


def held_back(held_by: fmeta.Penalty) -> Callable[[], fmeta.Learner]:
  """With a penalty."""
  return lambda: finetune(penalty=held_by)


def by_task(value_and_grad, whole: bool) -> fmeta.Learner:
  """With a reservoir for each task and a second gradient."""
  held = memory.per_task(TASKS, 4, ROW)
  if whole:
    held = continual.task_by_task(held)
  learner = finetune(value_and_grad=value_and_grad)
  return replay(learner, held, fmeta.beside)


def low_rank(tuning, **options) -> fmeta.Learner:
  """With factors of rank two in the body, and a head."""
  tuning = tuning('body/.*kernel', rank=2, also=('head/.*',))
  return fmeta.finetune(
    LOSS, fmeta.adamw_per_leaf(1e-2), tuning=tuning, **options
  )


def o_lora() -> fmeta.Learner:
  """Beside a penalty that looks at the data."""
  hold = penalty.all_of(continual.o_lora(1.0, TASKS), penalty.ewc(5.0))
  return continual.fold(low_rank(adapters.lora, penalty=hold))


def inf_lora() -> fmeta.Learner:
  """With thresholds that leave a direction to later tasks."""
  learner = low_rank(adapters.lora_fa)
  return continual.inf_lora(learner, TASKS, epsilon=0.3)


CRITERION = losses.softmax_cross_entropy


def text(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Words in place of features, for prompts."""
  ids = np.clip(columns['x'] + 5, 0, prompted.CONFIG.vocab_size - 1)
  ids = ids[:, :4].astype(np.int32)
  seen = np.ones_like(ids)
  return {'input_ids': ids, 'attention_mask': seen, 'label': columns['label']}


def prompts(loss, suffixes=(), **options) -> fmeta.Learner:
  """On a tiny BERT; with suffixes, of a method that counts tasks."""
  if not suffixes:
    return finetune(loss, **options)
  optimizer = continual.of_this_task(optim.adam(1e-2), suffixes)
  learner = fmeta.finetune(loss, optimizer, **options)
  return continual.counting_tasks(learner, TASKS)


def l2p() -> fmeta.Learner:
  """Two of four prompts."""
  loss = continual.l2p_loss(*prompted.ASKING, CRITERION, chosen=2, strength=0.5)
  return prompts(loss, tuning=continual.l2p_tuning(size=4, length=1))


def dual_prompt() -> fmeta.Learner:
  """A general prompt in one layer, experts in the other."""
  tuning = continual.dual_prompt_tuning(
    general=(prompted.FIRST,),
    expert=(prompted.SECOND,),
    tasks=TASKS,
    general_length=1,
    expert_length=2,
  )
  loss = continual.dual_prompt_loss(*prompted.ASKING, CRITERION, 0.5)
  return prompts(loss, DUAL_PROMPT, tuning=tuning)


def coda_prompt() -> fmeta.Learner:
  """Two components a task in one layer."""
  tuning = continual.coda_prompt_tuning(
    prompted.SECOND, tasks=TASKS, per_task=2, length=1
  )
  run = continual.coda_prompt_forward(*prompted.ASKING)
  held = continual.coda_prompt_penalty(0.1)
  loss = losses.supervised(run, CRITERION)
  return prompts(loss, CODA_PROMPT, tuning=tuning, penalty=held)


TEACHER = penalty.lwf(FORWARD, 0.5, np.ones((1, CLASSES), bool))
TWO = penalty.all_of(penalty.si(0.1), TEACHER)

METHODS = {
  'naive': Method(finetune),
  'ewc': Method(held_back(penalty.ewc(5.0)), True),
  'ewc sampled': Method(
    held_back(penalty.ewc(5.0, fisher.sampled_fisher)), True
  ),
  'ewc kfac': Method(held_back(penalty.ewc_kfac(5.0, TASKS)), True),
  'online ewc': Method(held_back(penalty.online_ewc(5.0, gamma=0.9)), True),
  'si': Method(held_back(penalty.si(0.1)), False, True),
  'mas': Method(held_back(penalty.mas(1.0)), True),
  'rwalk': Method(held_back(penalty.rwalk(0.1, every=5)), False, True),
  'lwf': Method(held_back(TEACHER), True),
  'features': Method(
    held_back(penalty.feature_distillation(FORWARD, 0.1)), False, True
  ),
  'si and lwf': Method(held_back(TWO), True),
  'er': Method(lambda: replay(finetune())),
  'er balanced': Method(
    lambda: replay(finetune(), memory.class_balanced(10, ROW))
  ),
  'er and ewc': Method(lambda: replay(finetune(penalty=fmeta.ewc(5.0))), True),
  'der': Method(lambda: beside(continual.der(FORWARD, CRITERION, 0.5))),
  'der++': Method(
    lambda: beside(continual.der_plus_plus(FORWARD, CRITERION, 0.5, 0.5))
  ),
  'er-ace': Method(lambda: beside(continual.er_ace(FORWARD, CRITERION))),
  'a-gem': Method(lambda: by_task(continual.a_gem(), False), False, True),
  'gem': Method(lambda: by_task(continual.gem(), True), False, True),
  'ogd': Method(held_back(continual.ogd(12, 4)), True),
  'gpm': Method(held_back(continual.gpm('.*kernel', energy=0.5)), True),
  'o-lora': Method(o_lora, True),
  'inf-lora': Method(inf_lora, True, prepares=True),
  'l2p': Method(l2p, params=prompted.PARAMS, to_batch=text),
  'dual prompt': Method(
    dual_prompt, False, True, prompted.PARAMS, to_batch=text
  ),
  'coda prompt': Method(
    coda_prompt, False, True, prompted.PARAMS, to_batch=text
  ),
}


def stages(method: Method) -> list[train.Stage]:
  """Three tasks of twelve steps."""
  return [
    train.Stage(
      f'task_{task}',
      lambda index, task=task: method.to_batch(batch(task, index)),
      STEPS,
      [batch(task, k) for k in range(2)] if method.remembers else (),
      ends_task=method.ends_task,
      prepare=[batch(task, k) for k in range(2)] if method.prepares else (),
    )
    for task in range(TASKS)
  ]


def row_of_matrix(params, state, stage) -> list[float]:
  """Numbers that depend on every leaf, one per task so far."""
  del state
  total = sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(params))
  return [total + task for task in range(stage + 1)]
