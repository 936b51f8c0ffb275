import pytest

from fmeta import tree
from fmeta.errors import UsageError

TREE = {'body': {'norm': {'scale': 1}, 'k': 2}, 'head': {'k': 3}, 'top': 4}


def test_names_follow_leaf_order():
  assert tree.names(TREE) == ['body/k', 'body/norm/scale', 'head/k', 'top']


def test_partition_and_combine_are_inverse_and_drop_empty_subtrees():
  yes, no = tree.partition(TREE, lambda name: name.endswith('k'))
  assert yes == {'body': {'k': 2}, 'head': {'k': 3}}
  assert no == {'body': {'norm': {'scale': 1}}, 'top': 4}
  assert tree.combine(yes, no) == TREE == tree.combine(no, yes)
  assert tree.combine(TREE, {'top': 5})['top'] == 5


def test_partition_reads_integer_keys_as_their_digits():
  layers = {'layers': {0: {'k': 1}, 1: {'k': 2}}}
  assert tree.names(layers) == ['layers/0/k', 'layers/1/k']
  yes, _ = tree.partition(layers, lambda name: name == 'layers/1/k')
  assert yes == {'layers': {1: {'k': 2}}}
  assert tree.get(layers, 'layers/1/k') == 2


def test_get_finds_leaves_subtrees_and_neighbours_with_a_suffix():
  factors = {'a': {'k': 1, 'k.lora_a': 2}}
  assert tree.get(factors, 'a/k.lora_a') == 2
  assert tree.get(factors, 'a') == {'k': 1, 'k.lora_a': 2}
  with pytest.raises(KeyError):
    tree.get(factors, 'a/kernel')


def test_first_match_wins_and_matches_whole_names():
  patterns = [('head/.*', 1), ('.*k', 2), ('.*', 3)]
  found = tree.match(TREE, patterns)
  assert found == {
    'body': {'norm': {'scale': 3}, 'k': 2},
    'head': {'k': 1},
    'top': 3,
  }
  assert tree.first_match('ahead/k', [('head/.*', 0)]) is None


@pytest.mark.parametrize(
  ('patterns', 'message'),
  [
    ([('haed/k', 1), ('.*', 0)], "no parameter matches 'haed/k'; did you"),
    ([('head/.*', 1)], "no pattern gives 'body/k' a value"),
    ([('head/(', 1)], 'is not a regular expression'),
    ([(3, 1)], '3 is no pattern'),
  ],
)
def test_bad_patterns_are_refused_in_one_line(patterns, message):
  with pytest.raises(UsageError) as error:
    tree.match(TREE, patterns)
  assert message in str(error.value) and '\n' not in str(error.value)


def test_a_pattern_may_name_a_parameter_outside_the_matched_part():
  part = {'body': {'k': 2}}
  patterns = [('head/.*', 1), ('.*', 0)]
  found = tree.match(part, patterns, known=tree.names(TREE))
  assert found == {'body': {'k': 0}}
  with pytest.raises(UsageError, match='no parameter matches'):
    tree.match(part, patterns)


def test_sizes_count_scalars_and_bytes(x64):
  import jax.numpy as jnp

  arrays = {'a': jnp.zeros((2, 3), 'float64'), 'b': jnp.zeros(4, 'float32')}
  assert tree.size(arrays) == 10 and tree.num_bytes(arrays) == 64
