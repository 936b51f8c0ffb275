import copy
import dataclasses
import json
import pickle
from typing import Literal

import pytest

from experiments import notes
from fmeta import config as settings
from fmeta.errors import UsageError


@dataclasses.dataclass
class Optim:
  lr: float = 0.1
  decay: float | None = None


@dataclasses.dataclass
class Config:
  steps: int = 3
  debug: bool = False
  name: str = 'full'
  rates: tuple[float, ...] = (1.0, 2.0)
  shape: tuple[int, int] = (2, 3)
  kind: Literal['sgd', 'adam'] = 'sgd'
  optim: Optim = dataclasses.field(default_factory=Optim)

  @property
  def twice(self):
    return 2 * self.steps


@pytest.mark.parametrize(
  'field, text, value',
  [
    ('steps', '7', 7),
    ('steps', '-7', -7),
    ('debug', 'true', True),
    ('debug', 'False', False),
    ('debug', '0', False),
    ('debug', None, True),
    ('name', 'a=b c', 'a=b c'),
    ('name', '', ''),
    ('rates', '1e-3,2', (0.001, 2.0)),
    ('rates', '(1,)', (1.0,)),
    ('rates', '[3, 4]', (3.0, 4.0)),
    ('rates', '', ()),
    ('shape', '4,5', (4, 5)),
    ('kind', 'adam', 'adam'),
    ('optim.lr', '3', 3.0),
    ('optim.decay', '0.5', 0.5),
    ('optim.decay', 'None', None),
  ],
)
def test_a_flag_is_read_as_the_annotated_type(field, text, value):
  config = Config()
  settings.override(config, [(field, text)])
  found = settings.flatten(config)[field]
  assert found == value
  assert type(found) is type(value)


@pytest.mark.parametrize(
  'field, text, words',
  [
    ('steps', '1.5', ["config.steps is an integer, not '1.5'"]),
    ('steps', '1e3', ['an integer']),
    ('debug', 'maybe', ["true or false, not 'maybe'"]),
    ('rates', '1,x', ['a list like a,b', 'a number', "'1,x'"]),
    ('shape', '1,2,3', ['a list of 2', "'1,2,3'"]),
    ('kind', 'adm', ['one of sgd, adam', "'adm'"]),
    ('optim.lr', 'nan', ["a number, not 'nan'"]),
    ('optim.decay', 'x', ['a number or none']),
    ('optim.lr', None, ['needs a value (a number)', '--config.optim.lr=']),
    ('stepz', '1', ["'config.stepz'", "did you mean 'config.steps'"]),
    ('optim.l', '1', ["did you mean 'config.optim.lr'"]),
    ('optim', '1', ['optim.lr, optim.decay']),
    ('steps.x', '1', ["no field 'config.steps.x'"]),
    ('zzzzzz', '1', ["possible: ['config.steps', 'config.debug'"]),
  ],
)
def test_a_wrong_flag_is_one_line_that_names_the_remedy(field, text, words):
  config = Config()
  with pytest.raises(UsageError) as caught:
    settings.override(config, [(field, text)])
  message = str(caught.value)
  assert '\n' not in message
  for word in words:
    assert word in message
  assert config == Config()


@dataclasses.dataclass
class Noted:
  """A field's words stand beside it or above it."""

  rate: float = 0.1  # of the #1 optimiser
  plain: int = 0

  # Several lines
  # above.
  shape: tuple[int, ...] = (
    1,  # of an item
  )
  text: str = '# no comment'


@dataclasses.dataclass
class More(Noted):
  """A default that is only changed keeps its words."""

  rate: float = 0.2
  plain: int = 1  # now with words
  optim: Noted = dataclasses.field(default_factory=Noted)


def test_notes_are_the_comments_of_fields():
  found = notes.of(More())
  assert found['rate'] == found['optim.rate'] == 'of the #1 optimiser'
  assert found['plain'] == 'now with words' and 'optim.plain' not in found
  assert 'text' not in found
  assert found['shape'] == 'Several lines above.'


def test_a_class_without_source_has_no_notes():
  made = dataclasses.make_dataclass('Made', [('rate', float, 0.1)])
  assert notes.of(made()) == {}


def test_each_seed_is_a_field_of_its_own():
  @dataclasses.dataclass
  class Seeded:
    seed: settings.Seeds = dataclasses.field(default_factory=settings.Seeds)

  config = Seeded()
  settings.override(config, [('seed.data', '3')])
  assert config.seed == settings.Seeds(init=0, data=3, train=0)


def test_the_last_of_two_flags_for_a_field_wins():
  config = Config()
  settings.override(config, [('steps', '1'), ('steps', '2')])
  assert config.steps == 2


def test_a_config_survives_json():
  config = Config()
  settings.override(config, [('rates', '5'), ('optim.lr', '4')])
  stored = json.loads(json.dumps(settings.to_json(config)))
  assert settings.from_json(Config(), stored) == config
  assert stored['optim'] == {'lr': 4.0, 'decay': None}


def test_a_stored_field_that_the_file_lost_is_refused():
  with pytest.raises(UsageError, match=r"'optim\.momentum'"):
    settings.from_json(Config(), {'optim': {'momentum': 1}})


def test_the_first_difference_is_named_with_both_values():
  stored = settings.to_json(Config())
  config = Config()
  assert settings.first_difference(stored, settings.to_json(config)) is None
  config.optim.lr = 7.0
  found = settings.first_difference(stored, settings.to_json(config))
  assert found == 'config.optim.lr was 0.1 and is now 7.0'


def test_a_field_on_one_side_only_is_a_difference():
  found = settings.first_difference({'a': 1}, {'a': 1, 'b': None})
  assert found == "config.b was 'absent' and is now None"


def test_a_frozen_config_refuses_assignment_at_every_depth():
  config = settings.freeze(Config())
  with pytest.raises(dataclasses.FrozenInstanceError, match='config.steps'):
    config.steps = 4
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.optim.lr = 4.0
  with pytest.raises(dataclasses.FrozenInstanceError):
    del config.steps
  assert settings.flatten(config) == settings.flatten(Config())


def test_a_frozen_config_is_still_itself():
  config = settings.freeze(settings.freeze(Config()))
  assert isinstance(config, Config)
  assert config.twice == 6
  assert repr(config) == repr(Config())
  assert settings.to_json(config) == settings.to_json(Config())


def test_copies_of_a_frozen_config_can_be_changed():
  config = settings.freeze(Config(steps=5))
  replaced = dataclasses.replace(config, name='probe')
  assert type(replaced) is Config
  assert (replaced.steps, replaced.name) == (5, 'probe')
  copied = copy.deepcopy(config)
  copied.steps = 6
  copied.optim.lr = 6.0
  assert (config.steps, config.optim.lr) == (5, 0.1)


def test_a_slotted_dataclass_freezes_too():
  @dataclasses.dataclass(slots=True)
  class Small:
    steps: int = 1

  config = settings.freeze(Small())
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.steps = 2


def test_a_frozen_config_travels_to_another_process_and_stays_frozen():
  config = settings.freeze(Config(steps=7))
  again = pickle.loads(pickle.dumps(config))
  assert again == config
  for part in (again, again.optim):
    with pytest.raises(dataclasses.FrozenInstanceError):
      part.lr = 3.0
