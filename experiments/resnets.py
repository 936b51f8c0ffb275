"""Where the published ResNets of CIFAR-10 are."""

import os
import pathlib

from fmeta.errors import UsageError
from fmeta.workdir import Context


def checkpoint_of(
  depth: int, given: str | None, context: Context
) -> pathlib.Path:
  """The file that was given, else that of a depth in the data's folder.

  Raises:
    UsageError: if neither a file nor a folder was named.
  """
  if given:
    return pathlib.Path(given)
  folder = context.data_dir or os.environ.get('FMETA_DATA_DIR')
  if not folder:
    raise UsageError(
      'the weights are not known; give --data_dir=DIR with checkpoints/ and '
      'the images in it, or --config.checkpoint=FILE'
    )
  name = f'cifar10_resnet{depth}.safetensors'
  return pathlib.Path(folder) / 'checkpoints' / name
