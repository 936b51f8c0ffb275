"""What `fewshot.py` times: MAML of Conv4 and of MiniLM's LoRA factors."""

from typing import Any, NamedTuple

import jax
import numpy as np

import fmeta
from experiments import minilm
from fmeta import adapters, models, optim


class Row(NamedTuple):
  """What is adapted in how many inner steps.

  Attributes:
    steps: of the inner loop.
    layers: how many of MiniLM's last layers get factors, 0 for all of them;
      None: the model is Conv4.
  """

  steps: int
  layers: int | None = None


ROWS = {
  'conv4_1': Row(1),
  'conv4_5': Row(5),
  'lora_last_two': Row(3, 2),
  'lora_all': Row(3, 0),
}


class Problem(NamedTuple):
  """A row: what is minimised, what moves outside, from where, and on what.

  Attributes:
    loss: of meta-batches; its derivative is the meta-gradient.
    tuning: of the outer step.
    params: where both sides start, factors included.
    batches: meta-batches of numpy arrays [tasks, rows, ...].
  """

  loss: fmeta.LossFn
  tuning: fmeta.Tuning
  params: Any
  batches: list[dict]


def images(config: Any) -> list[dict]:
  """Meta-batches of noise: only shapes matter to a timing."""
  random = np.random.default_rng(0)

  def part(each):
    rows = config.ways * each
    label = np.repeat(np.arange(config.ways, dtype=np.int32), each)
    return {
      'image': random.random((config.tasks, rows, 28, 28, 1), np.float32),
      'label': np.tile(label, (config.tasks, 1)),
    }

  return [
    {'support': part(config.shots), 'query': part(config.queries)}
    for _ in range(config.batches)
  ]


def texts(config: Any, vocabulary: int) -> list[dict]:
  """Meta-batches of random tokens, a quarter to all of `max_length` long."""
  random, width = np.random.default_rng(0), config.max_length

  def part(each):
    shape = config.text_tasks, config.ways * each
    length = random.integers(-(-width // 4), width + 1, (*shape, 1))
    mask = (np.arange(width) < length).astype(np.int32)
    ids = random.integers(1, vocabulary, mask.shape).astype(np.int32)
    label = np.repeat(np.arange(config.ways, dtype=np.int32), each)
    return {
      'input_ids': ids * mask,
      'attention_mask': mask,
      'label': np.tile(label, (shape[0], 1)),
    }

  return [
    {'support': part(config.shots), 'query': part(config.text_queries)}
    for _ in range(config.batches)
  ]


def meta_loss(row: Row, forward, rate, tuning):
  """MAML's loss with plain SGD inside."""
  loss = fmeta.supervised(forward, fmeta.softmax_cross_entropy)
  inner = fmeta.finetune(loss, optim.sgd(rate), tuning=tuning)
  return fmeta.episode_loss(inner, loss, row.steps)


def problem(name: str, config: Any) -> Problem:
  """The named row."""
  row = ROWS[name]
  if row.layers is not None:
    return _lora_problem(row, config)
  module, batches = models.Conv4(config.ways, config.filters), images(config)
  example = {'image': batches[0]['support']['image'][0]}
  params, _ = models.init(module, jax.random.key(0), example, models.IMAGE)
  forward, tuning = models.forward(module, models.IMAGE), fmeta.full()
  loss = meta_loss(row, forward, config.inner_lr, tuning)
  return Problem(loss, tuning, params, batches)


def _lora_problem(row: Row, config: Any) -> Problem:
  module, params, _ = minilm.load_model(config.model, config.ways, 0)
  layers, rank = lora_layers(row, module.config.num_layers), config.lora_rank
  kernels = rf'body/layer_({"|".join(map(str, layers))})/.*kernel'
  params = adapters.lora_init(params, jax.random.key(1), (kernels,), rank)
  inner = fmeta.lora(kernels, rank=rank, also=('head/.*',))
  forward = models.forward(module)
  loss = meta_loss(row, forward, config.lora_lr, inner)
  outer = fmeta.select(r'.*\.lora_[ab]', 'head/.*')
  return Problem(loss, outer, params, texts(config, module.config.vocab_size))


def lora_layers(row: Row, count: int) -> list[int]:
  """Numbers of the adapted layers of `count`."""
  return list(range(count))[-(row.layers or count) :]
