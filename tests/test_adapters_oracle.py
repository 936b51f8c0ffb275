"""Adapters of BERT against peft and torch: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_bert_oracle import TINY, peer, text_batch, to_torch

from fmeta import adapters, models, tree
from fmeta.adapters import siblings

pytestmark = [
  pytest.mark.oracle,
  pytest.mark.usefixtures('optimised'),
  # peft 0.21 reads a name that transformers 5.23 renames.
  pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing'),
]

LENGTH = 3
BATCH = text_batch(TINY.vocab_size, [9, 3, 7])
MODULE = models.BertClassifier(TINY)
ATTENTION = r'body/layer_\d/attention'
IA3 = adapters.ia3(
  f'{ATTENTION}/(key|value)/kernel', inputs=(r'body/layer_\d/mlp/down/kernel',)
)
BOTTLENECK = adapters.bottleneck(
  r'body/layer_\d/(attention/output|mlp/down)/kernel', width=5
)
PREFIX = adapters.prefix(f'{ATTENTION}/(key|value)/kernel', length=LENGTH)
PROMPT = adapters.prompt(length=LENGTH)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Parameters, and the folder that transformers reads them from."""
  from fmeta.pretrained import save_bert

  params, _ = models.init(MODULE, jax.random.key(1), BATCH)
  random = np.random.default_rng(0)
  # Larger than fresh, so that every part matters.
  params = jax.tree.map(
    lambda x: x + jnp.asarray(random.normal(0, 0.1, x.shape), x.dtype), params
  )
  folder = tmp_path_factory.mktemp('bert')
  save_bert(folder, params, TINY)
  return params, folder


def ours(tuning, params, seed=2):
  """Trained leaves by name, the pooled vectors, and the loss's gradients."""
  trainable, frozen = tuning.init(params, jax.random.key(seed))
  random = np.random.default_rng(seed)
  trainable = jax.tree.map(
    lambda x: x + jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype),
    trainable,
  )

  def loss(trainable):
    with tuning.intercept(trainable, frozen) as entered:
      out, _ = models.forward(MODULE)(entered, {}, BATCH, None)
    return (out**3).sum(), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
  by_name = lambda t: {name: tree.get(t, name) for name in tree.names(t)}
  return by_name(trainable), np.asarray(out), by_name(grads)


def pooled(hidden, batch):
  """The mean of the last states over the words seen, and its loss."""
  mask = batch['attention_mask'][:, :, None]
  out = (hidden * mask).sum(1) / mask.sum(1)
  (out**3).sum().backward()
  return out.detach().numpy()


def check(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def torch_tensor(x):
  import torch

  return torch.tensor(np.asarray(x))


def test_ia3_equals_peft(saved):
  import peft

  params, folder = saved
  leaves, out, grads = ours(IA3, params)
  inputs = [f'encoder.layer.{k}.output.dense' for k in range(2)]
  both = [
    f'encoder.layer.{k}.attention.self.{part}'
    for k in range(2)
    for part in ('key', 'value')
  ]
  config = peft.IA3Config(
    task_type='FEATURE_EXTRACTION',
    target_modules=both + inputs,
    feedforward_modules=inputs,
  )
  model = peft.get_peft_model(peer(folder), config).eval()
  scales = {
    name: parameter
    for name, parameter in model.named_parameters()
    if 'ia3_l' in name
  }
  assert len(scales) == len(leaves) == 6

  def theirs(name):
    owner = siblings.module_path(name)
    layer, part = owner.split('/')[1][-1], owner.split('/')[-1]
    place = 'output.dense' if part == 'down' else f'attention.self.{part}'
    return scales[
      f'base_model.model.encoder.layer.{layer}.{place}.ia3_l.default'
    ]

  for name, leaf in leaves.items():
    theirs(name).data = torch_tensor(leaf).reshape(theirs(name).shape)
  batch = to_torch(BATCH)
  check(out, pooled(model(**batch).last_hidden_state, batch))
  for name, grad in grads.items():
    check(grad, theirs(name).grad.numpy().ravel())


def test_prompt_tuning_equals_peft(saved):
  import peft

  params, folder = saved
  ((leaf,), out, (grad,)) = (
    list(x.values()) if isinstance(x, dict) else x for x in ours(PROMPT, params)
  )
  config = peft.PromptTuningConfig(
    task_type='FEATURE_EXTRACTION', num_virtual_tokens=LENGTH
  )
  model = peft.get_peft_model(peer(folder), config).eval()
  weight = model.prompt_encoder['default'].embedding.weight
  weight.data = torch_tensor(leaf)
  batch = to_torch(BATCH)
  hidden = model(**batch).last_hidden_state[:, LENGTH:]
  check(out, pooled(hidden, batch))
  check(grad, weight.grad.numpy())


def test_prefix_tuning_equals_peft(saved):
  import peft

  params, folder = saved
  leaves, out, grads = ours(PREFIX, params)
  config = peft.PrefixTuningConfig(
    task_type='FEATURE_EXTRACTION', num_virtual_tokens=LENGTH
  )
  model = peft.get_peft_model(peer(folder), config).eval()
  weight = model.prompt_encoder['default'].embedding.weight

  def stacked(values):
    """[length, layers x (key, value) x size], as peft keeps them."""
    return np.concatenate(
      [
        values[f'body/layer_{k}/attention/{part}/kernel.prefix']
        for k in range(2)
        for part in ('key', 'value')
      ],
      axis=1,
    )

  weight.data = torch_tensor(stacked(leaves))
  batch = to_torch(BATCH)
  check(out, pooled(model(**batch).last_hidden_state, batch))
  check(stacked(grads), weight.grad.numpy())


def test_bottlenecks_equal_torch(saved):
  import torch

  params, folder = saved
  leaves, out, grads = ours(BOTTLENECK, params)
  model, weights = peer(folder), {}

  def attach(module, owner):
    names = ('down', 'down_bias', 'up', 'up_bias')
    for what in names:
      name = f'{owner}/kernel.adapter_{what}'
      weights[name] = torch_tensor(leaves[name]).requires_grad_()
    down, bias, up, last = (
      weights[f'{owner}/kernel.adapter_{what}'] for what in names
    )

    def behind(_, __, x):
      return x + torch.nn.functional.gelu(x @ down + bias) @ up + last

    module.register_forward_hook(behind)

  for k, layer in enumerate(model.encoder.layer):
    attach(layer.attention.output.dense, f'body/layer_{k}/attention/output')
    attach(layer.output.dense, f'body/layer_{k}/mlp/down')
  batch = to_torch(BATCH)
  check(out, pooled(model(**batch).last_hidden_state, batch))
  assert set(grads) == set(weights)
  for name, grad in grads.items():
    check(grad, weights[name].grad.numpy())
