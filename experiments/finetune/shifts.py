"""Ten shifts of CIFAR-10: six of the image, two of the label, two of features.

A shift is a function of columns alone and of fixed seeds, so it is the same in
every run. Corruptions have the constants of CIFAR-10-C at severity 5
(Hendrycks & Dietterich 2019, https://arxiv.org/abs/1903.12261, released code).
A feature shift is a factor per channel on what a stage of the model gives,
held in a column of ones where it does nothing: one program serves all shifts.
"""

import functools
import io
from collections.abc import Callable

import numpy as np
from flax import linen as nn
from PIL import Image

from fmeta.models import IMAGE, ResNet, forward
from fmeta.stream import CORRUPTIONS as WITH_SEVERITY
from fmeta.types import Forward

Columns = dict[str, np.ndarray]

# Stage whose output is scaled -> column that holds the factors.
SCALED = {'body/stage_1': 'scale_1', 'body/stage_2': 'scale_2'}
# Standard deviation of a factor's log (untuned): often 2.7 times more or less.
SPREAD = 1.0


def gaussian_noise(image: np.ndarray) -> np.ndarray:
  """Adds noise of standard deviation 0.1."""
  noise = np.random.default_rng(1).normal(0, 0.1, image.shape)
  return np.clip(image + noise, 0, 1)


def brightness(image: np.ndarray) -> np.ndarray:
  """The value of HSV plus 0.3; hue and saturation stay."""
  value = image.max(-1, keepdims=True)
  raised = np.minimum(value + 0.3, 1)
  # Black has no hue: it becomes grey.
  scaled = image * raised / np.where(value > 0, value, 1)
  return np.where(value > 0, scaled, raised)


def _each(change: Callable[[Image.Image], Image.Image], images: np.ndarray):
  pixels = np.round(255 * images).astype(np.uint8)
  changed = [np.asarray(change(Image.fromarray(one))) for one in pixels]
  return np.stack(changed).astype(np.float32) / 255


def _compressed(image: Image.Image) -> Image.Image:
  buffer = io.BytesIO()
  image.save(buffer, 'JPEG', quality=40)
  return Image.open(buffer)


def jpeg(image: np.ndarray) -> np.ndarray:
  """JPEG of quality 40."""
  return _each(_compressed, image)


def label_flip(label: np.ndarray) -> np.ndarray:
  """y becomes 9 - y (CIFAR-Flip of Lee et al. 2022)."""
  return 9 - label


def label_merge(label: np.ndarray) -> np.ndarray:
  """Classes 2k and 2k + 1 become 2k."""
  return label - label % 2


def factors(stage: str, channels: int) -> np.ndarray:
  """exp of normal numbers, drawn once for a stage."""
  rng = np.random.default_rng(list(SCALED).index(stage) + 1)
  return np.exp(SPREAD * rng.normal(size=channels)).astype(np.float32)


CORRUPTIONS = {
  'gaussian_noise': gaussian_noise,
  'gaussian_blur': functools.partial(
    WITH_SEVERITY['gaussian_blur'], severity=5
  ),
  'brightness': brightness,
  'contrast': functools.partial(WITH_SEVERITY['contrast'], severity=5),
  'pixelate': functools.partial(WITH_SEVERITY['pixelate'], severity=5),
  'jpeg': jpeg,
}
RELABELLINGS = {'label_flip': label_flip, 'label_merge': label_merge}
RESCALINGS = {
  'stage_1_scaled': 'body/stage_1',
  'stage_2_scaled': 'body/stage_2',
}
SHIFTS = (*CORRUPTIONS, *RELABELLINGS, *RESCALINGS)


def shifted(name: str, columns: Columns, width: int) -> Columns:
  """The columns under a shift, with the factors of both stages.

  Args:
    name: one of `SHIFTS`.
    columns: `image` [N, 32, 32, 3] in [0, 1] and `label` [N].
    width: channels of the model's first stage.
  """
  image, label = columns['image'], columns['label']
  if name in CORRUPTIONS:
    image = CORRUPTIONS[name](image).astype(np.float32)
  if name in RELABELLINGS:
    label = RELABELLINGS[name](label).astype(np.int32)
  out = {'image': image, 'label': label}
  for k, (stage, column) in enumerate(SCALED.items()):
    scale = np.ones(width * 2**k, np.float32)
    if RESCALINGS.get(name) == stage:
      scale = factors(stage, len(scale))
    out[column] = np.tile(scale, (len(label), 1))
  return out


@functools.cache
def forward_of(module: ResNet) -> Forward:
  """The model, each scaled stage's output times its column of factors."""
  run = forward(module, IMAGE)

  def shifted_run(params, model_state, batch, rng):
    def interceptor(next_fun, args, kwargs, context):
      out = next_fun(*args, **kwargs)
      column = SCALED.get('/'.join(context.module.path))
      # Absent from a batch of bare images.
      if column in batch and context.method_name == '__call__':
        out = out * batch[column][:, None, None, :]
      return out

    with nn.intercept_methods(interceptor):
      return run(params, model_state, batch, rng)

  return shifted_run
