"""CLINC150: 150 intents in ten tasks, by domain or by ten random draws.

  python -m experiments.run --config=experiments/continual/clinc150.py

all-MiniLM-L6-v2 learns 15 new intents per task and answers among all intents
so far (class-incremental). The last `blocks` layers (all six: `full`) and the
head move from cached states of what lies below; `@lora` adapts the queries and
values of the same layers instead. Each seed has an order of tasks of its own.
A step costs what one batch costs in each row but ER and DER++, whose rows at
equal compute are `er_matched` and `er_matched@lora`. The rows that have to be
beaten need no gradient, from the frozen embeddings of the same texts: nearest
class mean by cosine, SLDA and RanPAC (`frozen.py`).

Expected: nearest mean .917, a joint logistic regression .943 to .955, after
the last task (torch and scikit-learn, one order by domain). Measured:
experiments/README.md.
"""

import dataclasses

import jax
import numpy as np

import fmeta
from experiments import minilm
from experiments.continual import frozen, show, table
from experiments.continual.bench import Bench, Labelled, first_of_each
from fmeta import data, stream
from fmeta.datasets import clinc150
from fmeta.models import BertClassifier, forward
from fmeta.pretrained import MINILM
from fmeta.workdir import Context

TASKS = 10
TUNINGS = ('lora',)


@dataclasses.dataclass
class Config(frozen.Config):
  """What one would sweep; iterations and strengths are untuned.

  Rates: the better of two for ER at equal compute, one order (see
  experiments/README.md).
  """

  scenario: str = 'class'
  groups: str = 'domains'  # or 'random'
  methods: tuple[str, ...] = (
    'none',
    'none@lora',
    'o_lora@lora',
    'joint',
    'sampled_ewc',
    'er',
    'er_matched',
    'er_matched@lora',
    'der_plus_plus',
  )
  model: str = MINILM
  blocks: int = 6
  rank: int = 8
  max_length: int = 32
  iterations: int = 94  # two epochs of a task
  batch_size: int = 32
  rate: float = 3e-4
  rates: tuple[str, ...] = ('lora:3e-3',)
  memory_size: int = 450  # three texts of each intent
  fisher_examples: int = 300
  strengths: tuple[str, ...] = (
    'sampled_ewc:1e4',
    'der_plus_plus:0.5',
    'o_lora@lora:0.5',
  )
  steps_per_dispatch: int = 47
  train_examples: int = 100  # of each intent
  test_examples: int = 30


SMALL = {
  'seeds': 2,
  'methods': ('none', 'none@lora', 'o_lora@lora', 'er'),
  'model': '',
  'blocks': 1,
  'rank': 2,
  'max_length': 16,
  'random_features': 16,
  'iterations': 2,
  'batch_size': 8,
  'memory_size': 16,
  'fisher_examples': 8,
  'steps_per_dispatch': 2,
  'train_examples': 2,
  'test_examples': 1,
}


class Texts:
  """The texts, their cached states, and streams over them."""

  def __init__(self, config: Config, context: Context):
    self.config = config
    self.module, self.params, tokenizer = minilm.load_model(
      config.model, clinc150.NUM_INTENTS, config.seed.init
    )
    layers = self.module.config.num_layers
    if config.blocks > layers:
      raise fmeta.UsageError(
        f'config.blocks is {config.blocks}; the model has {layers} layers'
      )
    self.first = layers - config.blocks
    self.blocks = '|'.join(map(str, range(self.first, layers)))
    splits = clinc150.load(context.data_dir)
    counts = {'train': config.train_examples, 'test': config.test_examples}
    self.domains = _domains(splits['train'])
    self.splits, self.embedded = {}, {}
    for name, count in counts.items():
      columns = first_of_each(splits[name], count)
      columns = minilm.encode(tokenizer, columns, config.max_length)
      columns = minilm.with_prefix(
        self.module, self.params, columns, self.first
      )
      self.embedded[name] = self._embed(columns)
      seen = np.arange(columns['hidden'].shape[1])[None]
      self.splits[name] = {
        'hidden': columns['hidden'],
        'attention_mask': seen < columns['length'][:, None],
        'label': columns['label'].astype(np.int32),
      }

  def _embed(self, columns: data.Columns) -> data.Columns:
    """Embeddings of the whole frozen model."""
    bare = BertClassifier(self.module.config, None, self.module.pooling)
    embed = forward(
      bare, minilm.HIDDEN, method='resume', first_layer=self.first
    )
    run = jax.jit(lambda params, batch: embed(params, {}, batch, None)[0])
    params = {'body': self.params['body']}
    made = [
      np.asarray(run(params, batch)) for batch in minilm.eval_batches(columns)
    ]
    feature = np.concatenate(made)[: len(columns['label'])]
    return {'feature': feature, 'label': columns['label'].astype(np.int32)}

  def groups(self, order: int) -> dict[str, tuple[int, ...]]:
    """The intents of each task, in the order of that number."""
    config = self.config
    if config.groups == 'random':
      drawn = stream.class_orders(clinc150.NUM_INTENTS, TASKS, order)
      return {f'draw {k + 1}': tuple(group) for k, group in enumerate(drawn)}
    names = sorted(self.domains)
    chosen = [names[k] for k in stream.task_order(TASKS, order)]
    return {name: self.domains[name] for name in chosen}

  def tasks(self, splits: table.Splits, order: int) -> Labelled:
    """Ten tasks of fifteen intents."""
    groups = self.groups(order)
    made = [
      stream.by_classes(splits[name], groups) for name in ('train', 'test')
    ]
    return Labelled(*made, stream.class_mask(groups, clinc150.NUM_INTENTS))

  def bench(self, splits: table.Splits, order: int) -> Bench:
    """The stream of cached states."""

    def start(key):
      fresh = jax.random.normal(key, self.params['head']['kernel'].shape)
      head = {**self.params['head'], 'kernel': 0.02 * fresh}
      return {**self.params, 'head': head}

    return Bench(
      self.tasks(splits, order),
      self.config.scenario,
      minilm.from_layer(self.module, self.first),
      start,
      test_batch=150,
      tuning=fmeta.select(f'body/layer_({self.blocks})/.*', 'head/.*'),
    )

  def tunings(self) -> dict[str, fmeta.Tuning]:
    """What else may move, by the names in `TUNINGS`."""
    kernels = f'body/layer_({self.blocks})/attention/(query|value)/kernel'
    made = fmeta.lora(kernels, rank=self.config.rank, also=('head/.*',))
    return dict(zip(TUNINGS, (made,), strict=True))


def _domains(columns: data.Columns) -> dict[str, tuple[int, ...]]:
  found = {}
  for domain in np.unique(columns['domain']):
    labels = columns['label'][columns['domain'] == domain]
    found[str(domain)] = tuple(np.unique(labels).tolist())
  return found


def check(config: Config) -> None:
  """Raises `UsageError` for what does not exist, before texts are read."""
  frozen.check(config, TUNINGS)
  if config.max_length not in minilm.BUCKETS:
    raise fmeta.UsageError(
      f'max_length {config.max_length}; texts are padded to one of '
      f'{minilm.BUCKETS}'
    )
  if config.groups not in ('domains', 'random'):
    raise fmeta.UsageError(
      f"groups {config.groups!r}; possible: 'domains', 'random'"
    )


def run(config: Config, context: Context) -> dict:
  """All rows and orders, a table and a picture."""
  check(config)
  texts = Texts(config, context)
  without = frozen.measure(
    config, context, lambda order: texts.tasks(texts.embedded, order)
  )
  made = table.Table(
    config,
    context,
    texts.splits,
    0.1,
    texts.bench,
    reorders=True,
    tunings=texts.tunings(),
  )
  return show.run(made, 'CLINC150', {}, 'clinc150.png', without)
