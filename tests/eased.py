"""A stream for EASE on a tiny net, and its paper's equations in numpy."""

import functools

import flax.linen as nn
import jax
import numpy as np
import scipy.special
import toys

import fmeta
from fmeta import adapters, continual, losses, optim, train, tree
from fmeta.fewshot import cosine_classifier

KEY = jax.random.key(13)
GROUPS = ((0, 3), (1, 2), (5,))  # nothing is of class 4
TASKS, CLASSES, DIM, STEPS = 3, 6, 4, 5
ALPHA = 0.3


class Features(nn.Module):
  """The body of the toy net."""

  @nn.compact
  def __call__(self, x, train=False):
    return toys.Body((5, DIM), 0.0, name='body')(x, train)


EMBED = adapters.entering(toys.forward_of(Features()))
HEAD = {'kernel': jax.random.normal(jax.random.key(1), (DIM, CLASSES))}
PARAMS = {**toys.init_of(Features())[0], 'head': HEAD}
TUNING = adapters.bottleneck(
  r'body/layer_\d/kernel', width=2, also=('head/.*',)
)
LOSS = losses.supervised(
  cosine_classifier(EMBED, 5.0),
  continual.masked(losses.softmax_cross_entropy),
)
ANSWER = jax.jit(continual.ease_forward(EMBED, ALPHA))


def finetune(tuning=TUNING, optimizer=None):
  optimizer = optim.adam(0.05) if optimizer is None else optimizer
  return fmeta.finetune(LOSS, optimizer, tuning=tuning)


def wrapped(learner=None, embed=EMBED, **options):
  options = {'tasks': TASKS, 'num_classes': CLASSES, 'dim': DIM} | options
  learner = finetune() if learner is None else learner
  return continual.ease(learner, embed, **options)


LEARNER = wrapped()
STEP = jax.jit(LEARNER.step)


def batch(task, index, shift=0.0):
  rng = np.random.default_rng([task, index])
  label = rng.choice(GROUPS[task], 8).astype(np.int32)
  x = np.eye(CLASSES)[label] + 0.5 * rng.normal(size=(8, CLASSES)) + shift
  allowed = np.tile(np.isin(np.arange(CLASSES), GROUPS[task]), (8, 1))
  return {'x': x.astype(np.float32), 'label': label, 'allowed': allowed}


def remembered(task, shift=0.0):
  """Two batches, the second with rows that are padding."""
  weight = np.array([1, 1, 1, 0, 1, 1, 0, 1], np.float32)
  ones = np.ones(8, np.float32)
  return [
    {**batch(task, 0, shift), 'weight': ones},
    {**batch(task, 1, shift), 'weight': weight},
  ]


def queries():
  rng = np.random.default_rng(99)
  return {'x': rng.normal(size=(7, CLASSES)).astype(np.float32)}


def stages(shift=(0.0, 0.0, 0.0)):
  return [
    train.Stage(
      f't{k}',
      lambda i, k=k: batch(k, i, shift[k]),
      STEPS,
      remember=remembered(k, shift[k]),
    )
    for k in range(TASKS)
  ]


def fit(learner=LEARNER, stream=None, **options):
  return train.fit(
    learner,
    learner.init(PARAMS, KEY),
    stages() if stream is None else stream,
    KEY,
    forward=EMBED,
    quiet=True,
    **options,
  )


def adapter_of(state):
  return {k: v for k, v in state.trainable.items() if k != 'head'}


@functools.cache
def streamed():
  """`(states after each task's end, the adapters as they were trained)`."""
  state, ended, trained = LEARNER.init(PARAMS, KEY), [], []
  for task in range(TASKS):
    for i in range(STEPS):
      state, _ = STEP(state, batch(task, i), KEY)
    trained.append(jax.tree.map(np.asarray, adapter_of(state)))
    key = jax.random.fold_in(KEY, task)
    state = LEARNER.end_task(state, EMBED, remembered(task), key)
    ended.append(state)
  return ended, trained


# The paper in numpy, float64, a loop for every index of its equations.


def features_by_hand(adapter, x):
  x = np.asarray(x, np.float64)
  whole = tree.combine(PARAMS['body'], adapter['body'])
  for name in ('layer_0', 'layer_1'):
    layer = {k: np.asarray(v, np.float64) for k, v in whole[name].items()}
    x = x @ layer['kernel'] + layer['bias']
    inner = x @ layer['kernel.adapter_down'] + layer['kernel.adapter_down_bias']
    inner = inner * scipy.special.ndtr(inner)
    x = x + inner @ layer['kernel.adapter_up'] + layer['kernel.adapter_up_bias']
    x = np.tanh(x)
  return x


def cosine(a, b):
  return a @ b / np.sqrt((a @ a) * (b @ b))


def complement_by_hand(old_old, new_old, new_new, temperature=1.0):
  made = []
  for i in range(len(old_old)):
    sims = np.array([cosine(old_old[i], new) for new in new_old])
    share = np.exp(sims / temperature) / np.exp(sims / temperature).sum()
    made.append(sum(share[j] * new_new[j] for j in range(len(new_new))))
  return np.array(made)


def true_prototypes(trained, groups=GROUPS):
  """{(class, subspace): prototype}, of the classes with rows there."""
  found = {}
  for task in range(len(trained)):
    rows = remembered(task)
    keep = np.concatenate([b['weight'] for b in rows]) > 0
    x = np.concatenate([b['x'] for b in rows])[keep]
    label = np.concatenate([b['label'] for b in rows])[keep]
    for c in groups[task]:
      for s in range(task + 1):
        found[c, s] = features_by_hand(trained[s], x[label == c]).mean(0)
  return found


def filled(found, groups, tasks):
  """The same with the entries above the diagonal of the paper's eq. 10."""
  found = dict(found)
  for s in range(tasks):
    for o in range(s):
      made = complement_by_hand(
        [found[c, o] for c in groups[o]],
        [found[c, o] for c in groups[s]],
        [found[c, s] for c in groups[s]],
      )
      found |= {(c, s): p for c, p in zip(groups[o], made, strict=True)}
  return found


def logits_by_hand(trained, x):
  tasks = len(trained)
  held = filled(true_prototypes(trained), GROUPS, tasks)
  features = [features_by_hand(adapter, x) for adapter in trained]
  logits = np.full((len(x), CLASSES), -np.inf)
  for task in range(tasks):
    for c in GROUPS[task]:
      for row in range(len(x)):
        cosines = [cosine(features[s][row], held[c, s]) for s in range(tasks)]
        others = sum(cosines) - cosines[task]
        logits[row, c] = cosines[task] + ALPHA * others
  return logits
