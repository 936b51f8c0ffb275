"""Adapters in PEFT's format, against peft where it is installed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmeta import adapters, models, pretrained, tree
from fmeta.errors import UsageError
from fmeta.pretrained.peft import PeftConfig, load_peft, save_peft

KEY = jax.random.key(8)
# peft asks transformers under a name that is going away.
PEER = pytest.mark.filterwarnings('ignore:`is_gradient_checkpointing`')
CONFIG = models.BertConfig(
  vocab_size=60,
  hidden_size=24,
  num_layers=2,
  num_heads=4,
  intermediate_size=40,
  max_positions=16,
  dropout=0.0,
  attention_dropout=0.0,
)
MODULE = models.BertClassifier(CONFIG, num_classes=3)
LEAVES = r'body/layer_\d/.*/(query|up|down)/kernel|body/embeddings/word/.*'
CONFIGS = {
  'lora': PeftConfig(4, 6.0),
  'rslora': PeftConfig(4, 6.0, use_rslora=True),
  'dora': PeftConfig(4, 6.0, use_dora=True),
}


def text_batch():
  random = np.random.default_rng(0)
  mask = (np.arange(9)[None] < np.array([9, 2, 6])[:, None]).astype(np.int32)
  ids = random.integers(1, 60, (3, 9)).astype(np.int32) * mask
  return {'input_ids': ids, 'attention_mask': mask}


@pytest.fixture(scope='module')
def params():
  return models.init(MODULE, KEY, text_batch())[0]


def factors(config, params):
  """`(trainable, frozen)` with factors away from their start."""
  make = adapters.dora_init if config.use_dora else adapters.lora_init
  random = np.random.default_rng(1)
  with_factors = tree.map_with_name(
    lambda name, x: (
      x + jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype)
      if '.' in name
      else x
    ),
    make(params, KEY, (LEAVES,), config.rank),
  )
  return config.tuning('head/.*').init(with_factors, KEY)


def logits(tuning, split):
  with tuning.intercept(*split) as entered:
    return models.forward(MODULE)(entered, {}, text_batch(), None)[0]


@pytest.mark.parametrize('name', CONFIGS)
def test_an_adapter_comes_back_bit_by_bit(name, params, tmp_path):
  config = CONFIGS[name]
  trainable, frozen = factors(config, params)
  save_peft(tmp_path / 'a', trainable, config)
  loaded, found = load_peft(tmp_path / 'a', params)
  assert found == config
  again = found.tuning('head/.*').init(loaded, KEY)
  jax.tree.map(np.testing.assert_array_equal, again, (trainable, frozen))
  with pytest.raises(UsageError, match='already holds an adapter'):
    save_peft(tmp_path / 'a', trainable, config)


def test_the_tuning_of_a_config_has_its_scale(params):
  split = factors(CONFIGS['lora'], params)
  name = 'body/layer_1/mlp/up/kernel'
  a, b = (tree.get(split[0], f'{name}.lora_{x}') for x in 'ab')
  for config, scale in ((CONFIGS['lora'], 6 / 4), (CONFIGS['rslora'], 6 / 2)):
    merged = tree.get(config.tuning('head/.*').merge(*split), name)
    np.testing.assert_allclose(
      merged, tree.get(params, name) + scale * a @ b, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'peft_type': 'IA3'}, "peft_type='IA3'; only 'LORA'"),
    ({'rank_pattern': {'query': 2}}, 'rank_pattern=.* must be empty'),
    ({'modules_to_save': ['classifier']}, 'modules_to_save'),
    ({'init_lora_weights': 'pissa'}, "init_lora_weights='pissa'"),
    ({'r': 5}, 'has a .4, 60. tensor'),
    ({'use_dora': True}, "no tensor .*lora_magnitude_vector'"),
  ],
  ids=['method', 'ranks', 'modules', 'pissa', 'rank', 'magnitudes'],
)
def test_what_is_not_supported_is_refused(change, message, params, tmp_path):
  save_peft(tmp_path, factors(CONFIGS['lora'], params)[0], CONFIGS['lora'])
  path = tmp_path / 'adapter_config.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
  with pytest.raises(UsageError, match=message):
    load_peft(tmp_path, params)


def test_an_adapter_of_another_model_is_refused(params, tmp_path):
  save_peft(tmp_path, factors(CONFIGS['lora'], params)[0], CONFIGS['lora'])
  smaller = {**params, 'body': {**params['body']}}
  del smaller['body']['layer_1']
  with pytest.raises(UsageError, match='layer.1.* belongs to no kernel'):
    load_peft(tmp_path, smaller)


@pytest.mark.parametrize(
  ('pattern', 'config', 'message'),
  [
    ('head/kernel', PeftConfig(2, 4.0), "'head/kernel' has no name"),
    (LEAVES, PeftConfig(3, 4.0), 'have rank 2, but .* rank=3'),
    (LEAVES, PeftConfig(2, 4.0, use_dora=True), "no '.dora_m'"),
  ],
  ids=['head', 'rank', 'magnitudes'],
)
def test_factors_that_do_not_fit_are_not_written(
  pattern, config, message, params, tmp_path
):
  found = adapters.lora_init(params, KEY, (pattern,), 2)
  with pytest.raises(UsageError, match=message):
    save_peft(tmp_path, found, config)
  with pytest.raises(UsageError, match='no lora factors'):
    save_peft(tmp_path, params, PeftConfig(2, 4.0))
  assert not list(tmp_path.iterdir())


def their_logits(model, params):
  """peft's BertModel, pooled by the mask, under our head."""
  import torch

  batch = text_batch()
  with torch.no_grad():
    hidden = model(
      **{key: torch.tensor(x).long() for key, x in batch.items()}
    ).last_hidden_state.numpy()
  mask = batch['attention_mask'][:, :, None]
  pooled = (hidden * mask).sum(1) / mask.sum(1)
  head = jax.tree.map(np.asarray, params['head'])
  return pooled @ head['kernel'] + head['bias']


def bert(folder, params):
  import transformers

  transformers.utils.logging.disable_progress_bar()
  if not folder.exists():
    pretrained.save_bert(folder, params, CONFIG)
  return transformers.BertModel.from_pretrained(
    folder, attn_implementation='eager', add_pooling_layer=False
  ).eval()


@PEER
@pytest.mark.oracle
@pytest.mark.parametrize('name', CONFIGS)
def test_an_exported_adapter_gives_the_same_logits_in_peft(
  name, params, tmp_path
):
  import peft

  config = CONFIGS[name]
  split = factors(config, params)
  ours = logits(config.tuning('head/.*'), split)
  save_peft(tmp_path / 'adapter', split[0], config)
  model = peft.PeftModel.from_pretrained(
    bert(tmp_path / 'bert', params), tmp_path / 'adapter'
  )
  theirs = their_logits(model.eval(), params)
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
  plain = models.forward(MODULE)(params, {}, text_batch(), None)[0]
  assert np.abs(ours - plain).max() > 0.01


@PEER
@pytest.mark.oracle
@pytest.mark.parametrize('name', CONFIGS)
def test_an_adapter_of_peft_gives_the_same_logits_here(name, params, tmp_path):
  import peft
  import torch

  wanted = CONFIGS[name]
  model = peft.get_peft_model(
    bert(tmp_path / 'bert', params),
    peft.LoraConfig(
      r=4,
      lora_alpha=6,
      target_modules=['query', 'value', 'word_embeddings', 'output.dense'],
      use_rslora=wanted.use_rslora,
      use_dora=wanted.use_dora,
    ),
  )
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for key, tensor in model.named_parameters():
      if 'lora_' in key:
        tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
  model.save_pretrained(tmp_path / 'adapter')
  loaded, config = load_peft(tmp_path / 'adapter', params)
  assert config == wanted
  tuning = config.tuning('head/.*')
  ours = logits(tuning, tuning.init(loaded, KEY))
  theirs = their_logits(model.eval(), params)
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
