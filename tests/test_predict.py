import functools
import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tokenizers

from fmeta import evaluate, predict
from fmeta.errors import UsageError
from fmeta.models import BertClassifier, BertConfig, forward, init

LABELS = ('int', 'float', 'str')
WORDS = '[PAD] [UNK] [CLS] [SEP] number of samples a name the'.split()
SMALL = BertConfig(
  vocab_size=len(WORDS),
  hidden_size=8,
  num_layers=2,
  num_heads=2,
  intermediate_size=16,
  max_positions=40,
)
TEXTS = ['number of samples', 'a name', 'the ' * 30, 'samples']


@pytest.fixture
def source(tmp_path) -> pathlib.Path:
  """A folder with the tokenizer of a ten-word language."""
  vocabulary = {word: i for i, word in enumerate(WORDS)}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token='[UNK]')
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
  )
  folder = tmp_path / 'source'
  folder.mkdir()
  tokenizer.save(str(folder / 'tokenizer.json'))
  return folder


@functools.cache
def tiny(seed: int = 0, pooling: str = 'mean'):
  module = BertClassifier(SMALL, len(LABELS), pooling)
  ids = np.ones((1, 4), np.int32)
  batch = {'input_ids': ids, 'attention_mask': ids}
  params, _ = init(module, jax.random.key(seed), batch)
  # Larger than a fresh head, so that answers differ between texts.
  params['head']['kernel'] = 20 * params['head']['kernel']
  return module, params


def answer(run, params, batch):
  return jax.jit(lambda p, b: run(p, {}, b, None)[0])(params, batch)


@pytest.fixture
def workdir(tmp_path, source) -> pathlib.Path:
  module, params = tiny()
  predict.save_run(tmp_path / 'run', module, params, source, LABELS, 24)
  return tmp_path / 'run'


@pytest.mark.parametrize('pooling', ['mean', 'cls'])
def test_a_loaded_run_gives_bitwise_equal_logits(tmp_path, source, pooling):
  module, params = tiny(3, pooling)
  predict.save_run(tmp_path / 'run', module, params, source, LABELS, 24)
  run = predict.load_run(tmp_path / 'run')
  ids = np.arange(20, dtype=np.int32).reshape(2, 10) % len(WORDS)
  batch = {'input_ids': ids, 'attention_mask': np.ones_like(ids)}
  before = answer(forward(module), params, batch)
  after = answer(run.forward, run.params, batch)
  np.testing.assert_array_equal(after, before)
  assert run.labels == LABELS
  assert run.max_length == 24


def test_probabilities_are_those_of_each_text_alone(workdir):
  run = predict.load_run(workdir)
  together = predict.probabilities(run, TEXTS * 10)
  assert together.shape == (40, 3)
  np.testing.assert_allclose(together.sum(1), 1, rtol=1e-12)
  alone = jax.jit(lambda p, b: run.forward(p, {}, b, None)[0])
  for row, text in zip(together, TEXTS, strict=False):
    ids = run.tokenizer.encode(text).ids
    ids = ids[:23] + [3] if len(ids) > 24 else ids
    mask = np.arange(24) < len(ids)
    ids = np.pad(ids, (0, 24 - len(ids))).astype(np.int32)
    batch = {'input_ids': ids[None], 'attention_mask': mask[None]}
    logits = alone(run.params, batch)
    wanted = evaluate.Predictions(np.asarray(logits), np.zeros(1))
    np.testing.assert_allclose(row, wanted.probabilities[0], rtol=1e-4)
  assert predict.probabilities(run, []).shape == (0, 3)


def test_answers_keep_order_and_empty_lines(workdir):
  run = predict.load_run(workdir)
  given = ['a name', '', 'number of samples', '  ']
  shown = list(predict.answers(run, given))
  wanted = predict.probabilities(run, ['a name', 'number of samples'])
  best = wanted.argmax(1)
  assert shown[0] == f'{LABELS[best[0]]}\t{wanted[0].max():.4f}\ta name'
  assert shown[1] == shown[3] == ''
  assert shown[2].startswith(f'{LABELS[best[1]]}\t{wanted[1].max():.4f}\t')
  assert [line.split('\t')[-1] for line in shown[::2]] == given[::2]


def test_top_lists_labels_from_likely_to_unlikely(workdir):
  run = predict.load_run(workdir)
  (line,) = predict.answers(run, ['samples'], top=9)
  cells = line.split('\t')
  assert sorted(cells[0:6:2]) == sorted(LABELS)
  assert sorted(cells[1:6:2], reverse=True) == cells[1:6:2]
  assert cells[6:] == ['samples']


def test_the_same_model_may_be_saved_again_but_no_other(workdir, source):
  module, params = tiny()
  before = (workdir / 'model' / 'model.safetensors').stat().st_mtime_ns
  predict.save_run(workdir, module, params, source, LABELS, 24)
  other = tiny(1)[1]
  with pytest.raises(UsageError, match='already holds another model'):
    predict.save_run(workdir, module, other, source, LABELS, 24)
  with pytest.raises(UsageError, match='already holds another model'):
    predict.save_run(workdir, module, params, source, LABELS, 25)
  after = (workdir / 'model' / 'model.safetensors').stat().st_mtime_ns
  assert before == after
  assert [path.name for path in workdir.iterdir()] == ['model']


def test_nothing_is_saved_for_labels_that_do_not_fit(tmp_path, source):
  module, params = tiny()
  with pytest.raises(UsageError, match='4 labels need'):
    predict.save_run(tmp_path, module, params, source, [*LABELS, 'x'], 24)
  with pytest.raises(UsageError, match=r'no tokenizer\.json'):
    predict.save_run(tmp_path, module, params, tmp_path, LABELS, 24)
  assert not (tmp_path / 'model').exists()


def cut(path: pathlib.Path):
  path.write_bytes(path.read_bytes()[:-7])


def without_labels(path: pathlib.Path):
  path.write_text(json.dumps({'max_length': 24, 'pooling': 'mean'}))


@pytest.mark.parametrize(
  'name, damage, message',
  [
    ('model.safetensors', cut, 'truncated'),
    ('head.safetensors', cut, 'truncated'),
    ('head.safetensors', pathlib.Path.unlink, 'no weights at'),
    ('classifier.json', cut, 'is not JSON'),
    ('classifier.json', without_labels, 'labels=None'),
    ('config.json', pathlib.Path.unlink, r'no config\.json'),
    ('tokenizer.json', pathlib.Path.unlink, r'no tokenizer\.json'),
  ],
)
def test_a_damaged_run_is_refused(workdir, name, damage, message):
  damage(workdir / 'model' / name)
  with pytest.raises(UsageError, match=message):
    predict.load_run(workdir)


@pytest.mark.parametrize(
  'argv, given, message',
  [
    (['{}/nowhere'], b'', 'no run at'),
    (['{}'], b'', "has no folder 'model'"),
    (['{}/run', '--top=0'], b'', '--top=0'),
    (['{}/run', '--top=x'], b'', 'invalid int'),
    ([], b'', 'required: workdir'),
    (['{}/run'], b'a name\n\xff\xfe\n', 'line 2 of the input is not UTF-8'),
  ],
)
def test_bad_input_is_one_line_and_status_two(
  workdir, capsys, argv, given, message
):
  argv = [word.format(workdir.parent) for word in argv]
  assert predict.main(argv, io.BytesIO(given)) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count('\n') == 1


def test_the_command_answers_lines_and_survives_a_closed_pipe(workdir):
  environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
  command = [sys.executable, '-m', 'fmeta.predict', str(workdir)]
  texts = 'a name\n\nnumber of samples\n' * 2000
  with subprocess.Popen(
    command,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=environment,
  ) as process:
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(texts.encode())
    process.stdin.close()
    first = process.stdout.readline().decode().split('\t')
    process.stdout.close()
    errors = process.stderr.read().decode()
  assert first[0] in LABELS and first[2] == 'a name\n'
  assert errors == ''
  assert process.returncode == 141
