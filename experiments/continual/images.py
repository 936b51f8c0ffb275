"""Images as bytes: on the device, in a memory, and into a model."""

import jax.numpy as jnp
import numpy as np

import fmeta
from fmeta import data


def as_bytes(columns: data.Columns) -> data.Columns:
  """Images in [0, 1] as bytes: exact for 256 levels, else rounded."""
  image = np.round(columns['image'] * 255).astype(np.uint8)
  return {'image': image, 'label': columns['label'].astype(np.int32)}


def scaled(forward: fmeta.Forward) -> fmeta.Forward:
  """A forward pass of images given as bytes."""

  def of_bytes(params, model_state, batch, rng):
    image = jnp.asarray(batch['image'], jnp.float32) / 255
    return forward(params, model_state, {**batch, 'image': image}, rng)

  return of_bytes
