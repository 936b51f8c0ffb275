"""A fine-tuning step against Hugging Face transformers and PEFT.

  ./launch/test.sh --oracles --collect-only    # once: installs the peers
  ./launch/local.sh --config=experiments/benchmarks/finetune.py

MiniLM on docparams texts with their real padding masks: probe, the last two
blocks, LoRA, full. A step is forward, loss, gradient, clipping at norm 1 and
AdamW on what moves; the peer is a plain torch loop over `BertModel` (sdpa
attention, fused AdamW, `peft` for LoRA), which is what `Trainer` runs. Both
sides see the same texts and start with the allocator settings of
`launch/local.sh` and all cores; no dropout. Four ways to make batches:

- same: both pad every text to `max_length`, so both multiply the same arrays;
- packed: the same texts in every step, in random order: several in a row
  (`fmeta.packing`) beside rows padded to the longest, as `Trainer` does;
- bucketed: fmeta's batches of similar lengths, cut to its buckets, beside
  those of `Trainer` as above;
- grouped: the same beside `Trainer(train_sampling_strategy='group_by_length')`.

One JSON line per row: ratio > 1 means that fmeta is faster. Expected and
measured: experiments/README.md.
"""

import dataclasses
import json
from typing import Any

import jax
import numpy as np

import fmeta
from experiments import minilm
from experiments.benchmarks.paired import Contender, compare
from fmeta import data, models, optim, pretrained, text, train
from fmeta.datasets import docparams
from fmeta.packing import pack_collate
from fmeta.workdir import Context

ROWS = ('probe', 'last_two', 'lora', 'full')
# Ours and theirs, see `batches_of`.
BATCHINGS = {
  'same': ('fixed', 'fixed'),
  'packed': ('packed', 'longest'),
  'bucketed': ('bucketed', 'longest'),
  'grouped': ('bucketed', 'grouped'),
}
CLASSES = len(docparams.LABELS)


@dataclasses.dataclass
class Config:
  """Shapes and lengths of the timings."""

  model: str = pretrained.MINILM
  rows: tuple[str, ...] = ROWS
  batchings: tuple[str, ...] = tuple(BATCHINGS)
  pairs: int = 10
  batches: int = 8  # a timing has one step on each
  batch_size: int = 32
  max_length: int = 64
  row_multiple: int = 2  # of packed rows
  lora_rank: int = 8
  rate: float = 1e-4


SMALL = {'rows': ('probe',), 'pairs': 2, 'batches': 1}


def texts(config: Config) -> dict[str, np.ndarray]:
  """Encoded training texts, enough for `batches`."""
  _, _, tokenizer = minilm.load_model(config.model, CLASSES, 0)
  count = config.batches * config.batch_size
  columns = minilm.load_texts({'train': count})['train']
  return minilm.encode(tokenizer, columns, config.max_length)


def batches_of(columns: dict, config: Config, how: str) -> list[dict]:
  """All texts once, in batches [B, L].

  Args:
    columns: from `texts`.
    config: the sizes.
    how: 'fixed': L is `max_length`; 'longest': L is the batch's longest text;
      'grouped': that of batches of similar lengths; 'bucketed': such batches
      as `fit` gets them; 'packed': L is `max_length`, several texts in a row.
  """
  size, length = config.batch_size, columns['length']
  if how == 'bucketed':
    made = text.bucketed_batches(
      columns, size, 0, minilm.BUCKETS, window=config.batches
    )
    made = dataclasses.replace(made, collate=minilm.collate)
    return [made(k) for k in range(config.batches)]
  order = np.arange(len(length))
  if how == 'grouped':
    order = np.argsort(length, kind='stable')
  if how == 'packed':
    collate = pack_collate(config.max_length, config.row_multiple)
    columns = data.numeric(columns)
    return [collate(data.take(columns, ids)) for ids in order.reshape(-1, size)]
  out = []
  for ids in order.reshape(config.batches, size):
    width = config.max_length if how == 'fixed' else int(length[ids].max())
    mask = np.arange(width)[None] < length[ids, None]
    out.append(
      {
        'input_ids': columns['input_ids'][ids, :width],
        'attention_mask': mask.astype(np.int32),
        'label': columns['label'][ids],
      }
    )
  return out


def tuning_of(row: str, config: Config) -> fmeta.Tuning:
  """What moves in a row."""
  tunings = {
    'probe': fmeta.select('head/.*'),
    'last_two': fmeta.select('body/layer_[45]/.*', 'head/.*'),
    'lora': fmeta.lora(
      r'body/layer_\d+/.*kernel', rank=config.lora_rank, also=('head/.*',)
    ),
    'full': fmeta.full(),
  }
  if row not in tunings:
    raise fmeta.UsageError(f'no row {row!r}; possible: {", ".join(ROWS)}')
  return tunings[row]


def make_fmeta(row: str, config: Config, batches: list) -> Any:
  """The compiled step that `fit` dispatches."""
  module, params, _ = minilm.load_model(config.model, CLASSES, 0)
  forward = models.forward(module)
  if 'text_ids' in batches[0]:
    forward = models.forward(module, models.PACKED_TEXT, method='packed')
  learner = fmeta.finetune(
    fmeta.supervised(forward, fmeta.softmax_cross_entropy),
    optim.adamw(config.rate),
    tuning=tuning_of(row, config),
  )
  state = learner.init(params, jax.random.key(0))
  frozen = jax.device_put(state.frozen)
  program, rng = train.Program(learner), jax.random.key(1)
  moving = jax.tree.map(jax.numpy.copy, state.replace(frozen={}))
  stacked = [jax.tree.map(lambda x: x[None], batch) for batch in batches]

  def run(steps: int) -> None:
    nonlocal moving
    for k in range(steps):
      moving, metrics = program(moving, frozen, stacked[k % len(stacked)], rng)
    jax.block_until_ready((moving, metrics))

  return run


def make_torch(row: str, config: Config, batches: list) -> Any:
  """The same in transformers and peft."""
  import torch
  import transformers

  torch.manual_seed(0)
  torch.set_num_threads(torch.get_num_threads())
  folder = pretrained.find(config.model)
  body: Any = transformers.BertModel.from_pretrained(
    folder,
    add_pooling_layer=False,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    attn_implementation='sdpa',
  )
  head = torch.nn.Linear(body.config.hidden_size, CLASSES)
  body = _freeze(body, row, config)
  body.train()
  moving = [p for p in body.parameters() if p.requires_grad]
  moving += list(head.parameters())
  optimizer = torch.optim.AdamW(moving, config.rate, fused=True)
  loss_fn = torch.nn.CrossEntropyLoss()
  inputs = [
    {key: torch.as_tensor(value).long() for key, value in batch.items()}
    for batch in batches
  ]

  def run(steps: int) -> None:
    for k in range(steps):
      batch = inputs[k % len(inputs)]
      mask = batch['attention_mask']
      hidden = body(batch['input_ids'], attention_mask=mask).last_hidden_state
      weights = mask[:, :, None].to(hidden.dtype)
      pooled = (hidden * weights).sum(1) / weights.sum(1)
      loss = loss_fn(head(pooled), batch['label'])
      optimizer.zero_grad()
      loss.backward()
      torch.nn.utils.clip_grad_norm_(moving, 1.0)
      optimizer.step()

  return run


def _freeze(body: Any, row: str, config: Config) -> Any:
  """Leaves trainable in the torch model what moves in the row."""
  if row == 'lora':
    import peft

    names = ('query', 'key', 'value', 'dense')
    made = peft.LoraConfig(
      r=config.lora_rank, lora_alpha=16, target_modules=list(names)
    )
    return peft.get_peft_model(body, made)
  if row != 'full':
    body.requires_grad_(False)
  if row == 'last_two':
    body.encoder.layer[-2:].requires_grad_(True)
  return body


def measure(row: str, config: Config, columns: dict, batching: str) -> dict:
  """One row: both sides in turn."""
  tuning_of(row, config)  # An unknown row ends here.
  if batching not in BATCHINGS:
    raise fmeta.UsageError(
      f'no batching {batching!r}; possible: {", ".join(BATCHINGS)}'
    )
  made = [batches_of(columns, config, how) for how in BATCHINGS[batching]]
  ours = Contender('fmeta', make_fmeta, row=row, config=config, batches=made[0])
  theirs = Contender(
    'transformers', make_torch, row=row, config=config, batches=made[1]
  )
  ratio = compare(ours, theirs, config.pairs, config.batches)
  ours.close()
  theirs.close()
  return {
    'row': row,
    'batches': batching,
    'ratio': round(ratio.median, 3),
    'ci95': [round(ratio.low, 3), round(ratio.high, 3)],
    'fmeta_seconds_per_step': round(ratio.seconds[0], 4),
    'peer_seconds_per_step': round(ratio.seconds[1], 4),
    'padding': [round(1 - filled(side), 2) for side in made],
    'pairs': ratio.pairs,
  }


def filled(batches: list[dict]) -> float:
  """The share of tokens that are no padding."""
  masks = [
    batch['text_ids'] >= 0 if 'text_ids' in batch else batch['attention_mask']
    for batch in batches
  ]
  return float(sum(m.sum() for m in masks) / sum(m.size for m in masks))


def run(config: Config, context: Context) -> dict:
  """Times every row and prints a JSON line each."""
  del context
  columns = texts(config)
  metrics, ci95 = {}, {}
  for batching in config.batchings:
    for row in config.rows:
      line = measure(row, config, columns, batching)
      print(json.dumps(line), flush=True)
      name = f'{row}, {batching}'
      metrics[f'{name} ratio'] = line['ratio']
      ci95[f'{name} ratio'] = line['ci95']
      for key in ('fmeta_seconds_per_step', 'peer_seconds_per_step'):
        metrics[f'{name} {key}'] = line[key]
  return {'metrics': metrics, 'ci95': ci95}
