"""The parameter table says what will happen, in natural order and briefly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmeta
from fmeta import table

KEY = jax.random.key(0)


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def model(layers=3):
  dense = {'kernel': shape(4, 4), 'bias': shape(4)}
  body = {f'layer_{k}': dict(dense) for k in range(layers)}
  return {
    'body': {**body, 'embedding': shape(5, 4)},
    'head': {'kernel': shape(4, 2), 'bias': shape(2)},
  }


def by_name(rows):
  return {row.name: row for row in rows}


def test_rows_carry_rate_decay_and_the_pattern_that_matched():
  rows = by_name(
    table.parameter_rows(
      model(),
      fmeta.select('body/layer_2/.*', 'head/.*'),
      KEY,
      rates=(('head/.*', 10.0), ('.*', 0.5)),
    )
  )
  head, kernel = rows['head/bias'], rows['body/layer_2/kernel']
  assert (head.rate, head.decay, head.pattern) == (10.0, 0.0, 'head/.*')
  assert (kernel.rate, kernel.decay, kernel.pattern) == (0.5, 1.0, '.*')
  still = rows['body/layer_0/kernel']
  assert (still.trainable, still.rate, still.pattern) == (False, None, '')
  assert sum(row.trainable for row in rows.values()) == 4


def test_layers_that_are_alike_fold_into_one_line_and_keep_their_sizes():
  rows = table.parameter_rows(model(12), fmeta.full(), KEY)
  folded = by_name(table.fold(rows))
  assert list(folded) == [
    'body/embedding',
    'body/layer_{0-11}/bias',
    'body/layer_{0-11}/kernel',
    'head/bias',
    'head/kernel',
  ]
  kernel = folded['body/layer_{0-11}/kernel']
  assert (kernel.leaves, kernel.size, kernel.num_bytes) == (12, 192, 768)
  assert table.totals(rows) == table.totals(list(folded.values()))


def test_a_layer_with_its_own_rate_keeps_its_line():
  rows = table.parameter_rows(
    model(4),
    fmeta.full(),
    KEY,
    rates=(('body/layer_2/kernel', 0.1), ('.*', 1.0)),
  )
  names = list(by_name(table.fold(rows)))
  assert 'body/layer_{0-1,3}/kernel' in names
  assert 'body/layer_2/kernel' in names
  assert 'body/layer_{0-3}/bias' in names


def test_two_numbers_fold_only_where_the_grid_is_whole():
  leaf = {'kernel': shape(2, 2)}
  params = {
    'block_0': {'conv_0': leaf, 'conv_1': leaf},
    'block_1': {'conv_0': leaf, 'conv_1': leaf},
    'block_2': {'conv_0': leaf},
  }
  rows = table.fold(table.parameter_rows(params, fmeta.full(), KEY))
  assert sum(row.leaves for row in rows) == 5
  assert {row.name for row in rows} == {
    'block_{0-2}/conv_0/kernel',
    'block_{0-1}/conv_1/kernel',
  }


def test_layer_10_comes_after_layer_2():
  rows = table.parameter_rows(model(11), fmeta.full(), KEY)
  names = [row.name for row in rows if row.name.endswith('kernel')]
  assert names[2:11] == [f'body/layer_{k}/kernel' for k in range(2, 11)]


def test_factors_of_lora_have_their_own_rows():
  rows = by_name(
    table.parameter_rows(model(), fmeta.lora('body/.*/kernel', rank=2), KEY)
  )
  assert rows['body/layer_0/kernel.lora_a'].shape == (4, 2)
  assert rows['body/layer_0/kernel.lora_a'].trainable
  assert not rows['body/layer_0/kernel'].trainable


def test_text_shows_peak_rate_and_totals():
  text = table.parameter_table(
    model(),
    fmeta.select('head/.*'),
    KEY,
    rates=(('head/.*', 20.0), ('.*', 1.0)),
    rate=5e-5,
  )
  line = next(x for x in text.splitlines() if x.startswith('head/kernel'))
  assert line.split() == ['head/kernel', '4x2', 'yes', '0.001', '1', 'head/.*']
  assert 'trainable 10 of 90 (11.11%)' in text


def test_multipliers_that_are_arrays_are_named_as_such():
  rates = (('head/.*', jnp.asarray(2.0)), ('.*', np.ones(5)))
  text = table.parameter_table(
    model(), fmeta.full(), KEY, rates=rates, rate=0.5
  )
  lines = {line.split()[0]: line.split() for line in text.splitlines()}
  assert lines['head/kernel'][3] == '1'
  assert lines['body/embedding'][3] == 'array'


@pytest.mark.parametrize('option', ['rates', 'decay', 'rules'])
def test_a_pattern_that_names_nothing_is_refused(option):
  patterns = (('hed/.*', 0.0), ('.*', 1.0))
  with pytest.raises(fmeta.UsageError, match="no parameter matches 'hed/"):
    table.parameter_rows(model(), fmeta.full(), KEY, **{option: patterns})


def test_a_trainable_leaf_without_a_rate_is_refused():
  with pytest.raises(fmeta.UsageError, match=r"'body/.*' a rate; end the"):
    table.parameter_rows(model(), fmeta.full(), KEY, rates=(('head/.*', 1.0),))


def test_the_default_decay_suits_a_model_without_biases():
  params = {'body': {'kernel': shape(2, 2)}}
  text = table.parameter_table(params, fmeta.full(), KEY)
  assert 'shadowed' not in text


def test_idle_patterns_are_shown_with_their_reason():
  text = table.parameter_table(
    model(),
    fmeta.select('head/.*'),
    KEY,
    rates=(('.*', 1.0), ('head/bias', 2.0), ('body/.*', 0.1)),
  )
  assert "rate 'head/bias' is shadowed" in text
  assert "rate 'body/.*' matches only frozen leaves" in text


def test_no_line_is_wider_than_100_columns():
  deep = {'a_very_long_module_name_' * 4: {'another_one_' * 5: shape(2, 3)}}
  text = table.parameter_table(
    deep,
    fmeta.full(),
    KEY,
    rates=(('(a_very_long_module_name_)+/(another_one_)+', 1.0), ('.*', 1.0)),
    rules=(('(a_very_long_module_name_)+/.*', ('data', ('fsdp', 'tensor'))),),
  )
  assert max(map(len, text.splitlines())) == 100
  assert 'data,fsdp+tensor' in text
