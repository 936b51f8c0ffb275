"""P>M>F on Omniglot: meta-train a prototypical network, then fine-tune it.

  python -m experiments.run --config=experiments/fewshot/omniglot/pmf.py

Everything is `protonet` with cosines until the test; there the body is tuned
on each task's support set, whose augmented copies are its queries (Hu et al.
2022, https://arxiv.org/abs/2204.07305, section 3.3; their first stage, a
network pre-trained on other data, is left out). Measured:
experiments/README.md.
"""

import dataclasses

import fmeta
from experiments.fewshot.omniglot import measure, protonet, task
from fmeta import fewshot, optim
from fmeta.data import augment_images
from fmeta.types import Forward
from fmeta.workdir import Context

SMALL = {**protonet.SMALL, 'test_steps': 2}


@dataclasses.dataclass
class Config(protonet.Config):
  """A head's; rate and steps of the last stage are untuned."""

  scale: float = 10.0
  crop: int = 2  # pixels that a copy is shifted by at most
  test_lr: float = 1e-4
  test_steps: int = 50


def run(config: Config, context: Context) -> dict:
  """Trains the embedding, then tests three ways with fine-tuning."""
  head = fewshot.cosine_prototypes(config.scale)
  augment = augment_images.images(augment_images.crop(config.crop))

  def tuned(embed: Forward):
    loss = fewshot.support_loss(head, embed, config.ways, augment)
    inner = fmeta.finetune(loss, optim.adam(config.test_lr))
    return fewshot.predict_fine_tuned(
      inner, head, embed, config.ways, config.test_steps
    )

  method = protonet.method(config, context, head)._replace(
    predict=tuned(task.model(config, None)),
    predict_alone=tuned(measure.by_support(config, None)),
  )
  return task.run(config, context, method)
