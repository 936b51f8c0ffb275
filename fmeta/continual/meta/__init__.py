"""Meta-continual learning: a loss of episodes whose support is a stream.

| method | what the inner loop moves | what is learned outside |
|---|---|---|
| `oml_loss` | the head, an example at a time | the representation |
| `anml_loss` of a `Gated` model | body and head | all, and a gate on features |
| `la_maml` | all, at a rate per weight | weights and rates, online |
| `mer` | all, in two nested Reptile steps | the same, online |

`boundaries_loss` is for streams of tasks whose penalty or memory hears of each
task's end.
"""

from fmeta.continual.meta.anml import Gated, anml_loss
from fmeta.continual.meta.boundaries import boundaries_loss
from fmeta.continual.meta.la_maml import (
  la_maml,
  la_maml_init,
  lookahead_loss,
  rates_first,
)
from fmeta.continual.meta.mer import mer
from fmeta.continual.meta.oml import fresh_classes, oml_loss, on_features

__all__ = [
  'Gated',
  'anml_loss',
  'boundaries_loss',
  'fresh_classes',
  'la_maml',
  'la_maml_init',
  'lookahead_loss',
  'mer',
  'oml_loss',
  'on_features',
  'rates_first',
]
