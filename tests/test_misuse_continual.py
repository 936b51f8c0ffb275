"""What a newcomer gets wrong with streams is named, with what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import fmeta
from fmeta import continual, fisher, memory, optim, penalty, stream, train
from fmeta.continual import streaming
from fmeta.errors import UsageError, check_number
from fmeta.losses import softmax_cross_entropy

KEY = jax.random.key(2)
LOSS, PARAMS, _, FORWARD = toys.problem(sizes=(4,))
HEADS = np.ones((1, 3), bool)
ROWS = jax.tree.map(np.asarray, toys.batch_of(6))
ROW = jax.tree.map(lambda x: x[0], ROWS)
SGD = optim.sgd(0.1)

# What is made with a number, and numbers that it cannot have.
FACTORIES = {
  'l2_sp strength': (penalty.l2_sp, -1.0),
  'ewc strength': (penalty.ewc, -1),
  'online_ewc strength': (penalty.online_ewc, float('nan')),
  'online_ewc gamma': (lambda x: penalty.online_ewc(1.0, gamma=x), 1.5),
  'ewc_kfac strength': (lambda x: penalty.ewc_kfac(x, 2), -0.1),
  'ewc_kfac num_tasks': (lambda x: penalty.ewc_kfac(1.0, x), 0),
  'mas strength': (penalty.mas, np.float32(-1)),
  'si strength': (penalty.si, '1e3'),
  'si xi': (lambda x: penalty.si(1.0, x), 0.0),
  'rwalk strength': (penalty.rwalk, float('inf')),
  'rwalk alpha': (lambda x: penalty.rwalk(1.0, alpha=x), 3.0),
  'rwalk eps': (lambda x: penalty.rwalk(1.0, eps=x), 0.0),
  'every': (lambda x: penalty.rwalk(1.0, every=x), 2.5),
  'lwf strength': (lambda x: penalty.lwf(FORWARD, x, HEADS), -1.0),
  'lwf temperature': (lambda x: penalty.lwf(FORWARD, 1.0, HEADS, x), 0.0),
  'feature_distillation strength': (
    lambda x: penalty.feature_distillation(FORWARD, x),
    -2.0,
  ),
  'gem margin': (continual.gem, -0.5),
  'gpm energy': (lambda x: continual.gpm('.*kernel', energy=x), 5.0),
  'der alpha': (lambda x: continual.der(FORWARD, LOSS, x), -1.0),
  'der_plus_plus alpha': (
    lambda x: continual.der_plus_plus(FORWARD, LOSS, x, 0.5),
    -1.0,
  ),
  'der_plus_plus beta': (
    lambda x: continual.der_plus_plus(FORWARD, LOSS, 0.5, x),
    -1.0,
  ),
}


@pytest.mark.parametrize('name', FACTORIES)
def test_a_number_out_of_range_is_refused_by_its_name(name):
  make, number = FACTORIES[name]
  with pytest.raises(UsageError, match=f'^{name}=.*; give '):
    make(number)


@pytest.mark.parametrize('name', FACTORIES)
def test_a_number_in_range_is_taken(name):
  make, _ = FACTORIES[name]
  make(1)


def test_numbers_may_be_zero_numpys_or_traced():
  for number in (0, 0.0, np.float32(2), jnp.asarray(-1.0)):
    check_number('strength', number)
  with pytest.raises(UsageError, match='strength=0; give a number above 0'):
    check_number('strength', 0, above=True)
  held = jax.jit(lambda s: penalty.l2_sp(s).init(PARAMS, PARAMS))(-1.0)
  assert fmeta.tree.names(held['anchor']) == fmeta.tree.names(PARAMS)


READ_DATA = {
  'ewc': penalty.ewc(1.0),
  'online_ewc': penalty.online_ewc(1.0),
  'sampled': penalty.ewc(1.0, fisher.sampled_fisher),
  'empirical': penalty.ewc(1.0, fisher.empirical_fisher),
  'batched': penalty.ewc(1.0, fisher.batched_fisher),
  'ewc_kfac': penalty.ewc_kfac(1.0, 2),
  'mas': penalty.mas(1.0),
  'lwf': penalty.lwf(FORWARD, 1.0, HEADS),
}


@pytest.mark.parametrize('name', READ_DATA)
def test_a_tasks_end_without_data_is_refused_where_data_are_read(name):
  """Else nothing would be held back, and nothing said."""
  made = READ_DATA[name]
  state = made.init(PARAMS, PARAMS)
  with pytest.raises(UsageError, match='no batches to .*; give'):
    made.consolidate(state, PARAMS, PARAMS, {}, FORWARD, iter(()), KEY)


NO_PENALTIES = {
  'ewc': penalty.ewc,
  'float': 1.0,
  'list': [penalty.ewc(1.0), penalty.si(1.0)],
}


@pytest.mark.parametrize('given', NO_PENALTIES)
def test_what_is_no_penalty_is_refused(given):
  for use in (
    lambda p: fmeta.finetune(LOSS, SGD, penalty=p),
    lambda p: penalty.all_of(penalty.si(1.0), p),
  ):
    with pytest.raises(UsageError, match=rf'^{given} is no .*all_of\('):
      use(NO_PENALTIES[given])


@pytest.mark.parametrize('name', ['remember', 'prepare'])
def test_one_batch_where_a_list_is_asked_for_is_refused(name):
  learner = fmeta.finetune(LOSS, SGD, penalty=penalty.ewc(1.0))
  stage = train.Stage('a', lambda i: ROWS, 1, **{name: ROWS})
  with pytest.raises(UsageError, match=f"`{name}` of stage 'a' is one batch;"):
    train.fit(learner, learner.init(PARAMS, KEY), [stage], KEY, forward=FORWARD)


def test_what_cannot_be_rehearsed_is_refused():
  learner = fmeta.finetune(LOSS, SGD)
  held = fmeta.reservoir(4, ROW)
  for size in (0, -1, 2.5):
    with pytest.raises(UsageError, match=f'of {size} .*; give at least 1'):
      fmeta.rehearse(learner, held, size)
  with pytest.raises(UsageError, match='is a Learner; give rehearse'):
    fmeta.rehearse(held, learner, 2)
  for capacity in (0, 1.5):
    with pytest.raises(UsageError, match='give at least 1, a whole number'):
      fmeta.reservoir(capacity, ROW)


def test_a_memory_of_whole_columns_is_refused():
  held = fmeta.reservoir(4, ROWS)
  learner = fmeta.rehearse(fmeta.finetune(LOSS, SGD), held, 2)
  with pytest.raises(UsageError, match='a spec of ONE row'):
    learner.step(learner.init(PARAMS, KEY), ROWS, KEY)


def test_another_memory_is_not_taken_for_one_per_task():
  held = fmeta.reservoir(4, ROW)
  with pytest.raises(UsageError, match=r'no rows per task; .*per_task\('):
    memory.task_rows(held.init())
  with pytest.raises(UsageError, match=r'no rows per task; .*per_task\('):
    continual.task_by_task(held).sample(held.init(), 2, KEY)


def test_a_key_that_a_memory_does_not_hold_is_named():
  held = memory.class_balanced(4, ROW).init()
  with pytest.raises(UsageError, match="'labl'; did you mean 'label'"):
    memory.quotas(held, 3, by='labl')


def test_herding_asks_for_features_of_every_row():
  label, weight = jnp.zeros(4, int), jnp.ones(4)
  for features in (jnp.ones(4), jnp.ones((3, 2))):
    with pytest.raises(UsageError, match=r'give \[N, D\], \[N\], \[N\]'):
      memory.herding(features, label, weight, 2, 1)


def test_der_names_outputs_of_another_width():
  loss = continual.der(FORWARD, softmax_cross_entropy, 0.5)
  spec = {**ROW, 'outputs': jax.ShapeDtypeStruct((9,), np.float32)}
  learner = fmeta.rehearse(
    fmeta.finetune(loss, SGD), fmeta.reservoir(4, spec), 2, mix=fmeta.beside
  )
  said = r'outputs of shape \(9,\) per row, the model gives \(3,\)'
  with pytest.raises(UsageError, match=said):
    learner.step(learner.init(PARAMS, KEY), ROWS, KEY)


def test_today_asks_for_allowed():
  mix = continual.today(fmeta.append)
  with pytest.raises(UsageError, match="no 'allowed' for `today`"):
    mix(ROWS, ROWS, jnp.ones(6))


def test_gpm_without_a_pattern_is_refused():
  with pytest.raises(UsageError, match='without patterns; give some'):
    continual.gpm(energy=0.9)


def test_classes_that_do_not_fit_the_logits_are_refused():
  new = np.ones(2, bool)
  with pytest.raises(UsageError, match=r'give \[B, classes\] and bool'):
    continual.fit_bias(jnp.ones((5, 3)), jnp.zeros(5, int), new)
  held = memory.class_balanced(4, ROW).init()
  teach = lambda columns: np.zeros((len(columns['label']), 3))
  with pytest.raises(UsageError, match=r'give logits \[N, classes\] and bool'):
    continual.icarl_columns(ROWS, held, teach, new)


@pytest.mark.parametrize('make', [streaming.slda, streaming.simple_cil])
def test_streaming_classifiers_ask_for_a_label_and_a_weight_of_each_row(make):
  made = make(3, 2)
  x, label = np.ones((4, 2)), np.zeros(4, int)
  for labels, weight in (
    (label[:3], None),
    (np.eye(3, dtype=int)[label], None),
    (label, np.ones(3)),
    (label, 1.0),
  ):
    with pytest.raises(UsageError, match=r'for 4 rows of features; give \[B\]'):
      made.update(made.init(), x, labels, weight)


def test_a_linear_head_asks_for_features_of_its_width():
  made = streaming.ridge(3, 2, 1.0)
  with pytest.raises(UsageError, match=r'\(4, 5\); give \[B, 2\]'):
    made.scores(made.init(), np.ones((4, 5)))


def test_labels_that_are_no_integers_cut_no_tasks():
  """They would have made tasks without examples."""
  columns = {'x': np.ones((2, 1)), 'label': np.array(['0', '1'])}
  with pytest.raises(UsageError, match='by_classes cuts by integers'):
    stream.by_classes(columns, [[0], [1]])


@pytest.mark.parametrize('groups', [[0, 1], ['01'], [[0.5], [1]], [[0], '1']])
def test_a_group_that_is_no_list_of_integers_is_refused(groups):
  columns = {'x': np.ones((2, 1)), 'label': np.arange(2)}
  with pytest.raises(UsageError, match=r'such as \[\[0, 1\], \[2, 3\]\]'):
    stream.by_classes(columns, groups)


def test_groups_may_be_ranges_sets_arrays_and_generators():
  columns = {'x': np.ones((4, 1)), 'label': np.arange(4)}
  groups = [range(1), {1}, np.array([2]), (k for k in [3])]
  tasks = stream.by_classes(columns, groups)
  assert [task.columns['label'].tolist() for task in tasks] == [
    [0],
    [1],
    [2],
    [3],
  ]
