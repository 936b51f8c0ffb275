"""The optimisers, a row each, and the table that is written from them.

  python tests/zoo.py        # rewrites fmeta/optim/README.md

`tests/test_zoo.py` runs the conformance suite on every row and holds the
written table to what is measured.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from fmeta import optim, tree
from fmeta.meta_safe import meta_slopes

TABLE = pathlib.Path(optim.__file__).parent / 'README.md'
WIDTH = 256  # of the kernel whose state is counted: adafactor factors it


class Row(NamedTuple):
  build: Callable[[float], optax.GradientTransformation]
  how: str
  source: str
  note: str = ''


def direction(transformation):
  return lambda rate: optim.with_rates(transformation(), rate)


def complete(build):
  return lambda rate: optim.with_multipliers(build(rate))


ROWS = {
  'sgd': Row(optim.sgd, 'sgd(rate)', 'Robbins & Monro 1951'),
  'momentum': Row(
    lambda rate: optim.sgd(rate, momentum=0.9),
    'sgd(rate, momentum=0.9)',
    'Polyak 1964',
  ),
  'nesterov': Row(optim.nesterov, 'nesterov(rate)', 'Sutskever et al. 2013'),
  'sgd, clipped': Row(
    lambda rate: optim.sgd(rate, clip_norm=1.0),
    'sgd(rate, clip_norm=1.0)',
    'Pascanu et al. 2013',
    "optax's own `clip_by_global_norm` is NaN at zero",
  ),
  'adaptive clip': Row(
    lambda rate: optim.with_rates(optim.clip_by_unit(0.01), rate),
    'with_rates(clip_by_unit(0.01), rate)',
    'Brock et al. 2021',
    "optax's own `adaptive_grad_clip` is NaN at zero",
  ),
  'adam': Row(optim.adam, 'adam(rate)', 'Kingma & Ba 2014'),
  'adam, eps_root': Row(
    lambda rate: optim.adam(rate, eps_root=1e-8),
    'adam(rate, eps_root=1e-8)',
    'Kingma & Ba 2014',
  ),
  'adamw': Row(
    optim.adamw,
    'adamw(rate)',
    'Loshchilov & Hutter 2017',
    'clipped at norm 1 by default',
  ),
  'adamw, eps_root': Row(
    lambda rate: optim.adamw(rate, eps_root=1e-8),
    'adamw(rate, eps_root=1e-8)',
    'Loshchilov & Hutter 2017',
    'clipped at norm 1 by default',
  ),
  'nadam': Row(optim.nadam, 'nadam(rate)', 'Dozat 2016'),
  'nadam, eps_root': Row(
    lambda rate: optim.nadam(rate, eps_root=1e-8),
    'nadam(rate, eps_root=1e-8)',
    'Dozat 2016',
  ),
  'radam': Row(
    optim.radam,
    'radam(rate)',
    'Liu et al. 2019',
    'its first phase takes the root of a negative number and drops it',
  ),
  'amsgrad': Row(
    direction(optax.scale_by_amsgrad),
    'with_rates(optax.scale_by_amsgrad(), rate)',
    'Reddi et al. 2018',
  ),
  'adamax': Row(
    direction(optax.scale_by_adamax),
    'with_rates(optax.scale_by_adamax(), rate)',
    'Kingma & Ba 2014',
  ),
  'adabelief': Row(optim.adabelief, 'adabelief(rate)', 'Zhuang et al. 2020'),
  'adabelief, eps_root': Row(
    lambda rate: optim.adabelief(rate, eps_root=1e-8),
    'adabelief(rate, eps_root=1e-8)',
    'Zhuang et al. 2020',
  ),
  'yogi': Row(optim.yogi, 'yogi(rate)', 'Zaheer et al. 2018'),
  'adagrad': Row(optim.adagrad, 'adagrad(rate)', 'Duchi et al. 2011'),
  'adadelta': Row(
    direction(optax.scale_by_adadelta),
    'with_rates(optax.scale_by_adadelta(), rate)',
    'Zeiler 2012',
  ),
  'rmsprop': Row(optim.rmsprop, 'rmsprop(rate)', 'Tieleman & Hinton 2012'),
  'adafactor': Row(optim.adafactor, 'adafactor(rate)', 'Shazeer & Stern 2018'),
  'sm3': Row(
    direction(optax.scale_by_sm3),
    'with_rates(optax.scale_by_sm3(), rate)',
    'Anil et al. 2019',
  ),
  'adan': Row(optim.adan, 'adan(rate)', 'Xie et al. 2022'),
  'ademamix': Row(
    direction(optax.contrib.scale_by_ademamix),
    'with_rates(optax.contrib.scale_by_ademamix(), rate)',
    'Pagliardini et al. 2024',
  ),
  'adopt': Row(
    direction(optax.contrib.scale_by_adopt),
    'with_rates(optax.contrib.scale_by_adopt(), rate)',
    'Taniguchi et al. 2024',
  ),
  'sophia': Row(
    lambda rate: optim.sophia(rate, jax.random.key(0), interval=2),
    'sophia(rate, key)',
    'Liu et al. 2023',
    'a Hessian-vector product every 10 steps; flat where it clips',
  ),
  'lion': Row(
    optim.lion, 'lion(rate)', 'Chen et al. 2023', 'a sign: flat elsewhere'
  ),
  'novograd': Row(optim.novograd, 'novograd(rate)', 'Ginsburg et al. 2019'),
  'lars': Row(optim.lars, 'lars(rate)', 'You et al. 2017'),
  'lamb': Row(optim.lamb, 'lamb(rate)', 'You et al. 2019'),
  'muon': Row(
    optim.muon,
    'muon(rate)',
    'Jordan et al. 2024',
    'hidden kernels; Adam for embeddings, the head and vectors',
  ),
  'schedule_free': Row(
    optim.schedule_free_adamw,
    'schedule_free_adamw(rate)',
    'Defazio et al. 2024',
    'evaluate `at_average(state)`',
  ),
  'schedule_free sgd': Row(
    lambda rate: optim.schedule_free(optim.sgd(rate), rate),
    'schedule_free(sgd(rate), rate)',
    'Defazio et al. 2024',
    'evaluate `at_average(state)`',
  ),
  'mechanize': Row(
    lambda rate: optax.contrib.mechanize(optim.sgd(rate)),
    'optax.contrib.mechanize(sgd(1.0))',
    'Cutkosky et al. 2023',
  ),
  'dog': Row(lambda rate: optim.dog(), 'dog()', 'Ivgi et al. 2023'),
  'dowg': Row(
    lambda rate: optim.with_rates(optax.contrib.dowg(-1.0), 1.0),
    'with_rates(optax.contrib.dowg(-1.0), 1.0)',
    'Khaled et al. 2023',
  ),
  'prodigy': Row(
    lambda rate: optim.prodigy(), 'prodigy()', 'Mishchenko & Defazio 2023'
  ),
  'dadapt_adamw': Row(
    complete(lambda rate: optax.contrib.dadapt_adamw()),
    'with_multipliers(optax.contrib.dadapt_adamw())',
    'Defazio & Mishchenko 2023',
  ),
  'momo': Row(
    complete(optax.contrib.momo),
    'with_multipliers(optax.contrib.momo(rate))',
    'Schaipp et al. 2023',
    'reads the loss, which the step hands over',
  ),
}

HEAD = """# Optimisers

Every row takes a rate (float, traced array or schedule), ordered `multipliers`
and `clip_norm`; those that are directions take `weight_decay` and `decay` as
well, see `rates.py`. All pass `fmeta.testing.check_learner`.

*state*: bytes of optimiser state per parameter, on a float32 kernel
[256, 256] and its bias. The next three columns say whether reverse mode
through eight updates agrees with central differences in float64 (h = 1e-7, to
one part in a thousand): at a random point; where one gradient or all are
exactly zero, as for LoRA's A while B = 0; where a leaf is zero, as a fresh
bias is. An optimiser with a **no** is refused, in one line, once a
meta-gradient has to flow through it; plain training, `first_order()` inner
loops and `reptile_loss` take any.

Not in optax 0.2.8, so not here: Shampoo and SOAP, K-FAC, CAME, 8-bit states.
Left out though in optax: `lbfgs` (its line search evaluates the loss again),
`cocob` and `madgrad` (they write parameters anew from their start, so a
multiplier is no rate).

Written by `python tests/zoo.py`; `tests/test_zoo.py` holds it true.

| optimiser | source | state | random point | zero gradient | zero leaf | note |
|---|---|---|---|---|---|---|
"""


def state_bytes(row: Row) -> str:
  """Bytes of state per parameter, to two digits."""
  shapes = {'kernel': (WIDTH, WIDTH), 'bias': (WIDTH,)}
  layer = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
  params = {'body': {'layer_0': layer}}
  state = jax.eval_shape(row.build(0.1).init, params)
  count = tree.size(params)
  return f'{tree.num_bytes(state) / count:.2f}'


def safety(row: Row) -> list[str]:
  """Whether a meta-gradient is right at the table's three kinds of point."""
  wrong = [slope.wrong for slope in meta_slopes(row.build(0.1))]
  groups = wrong[0], wrong[1] or wrong[2], wrong[3]
  return ['**no**' if group else 'yes' for group in groups]


def line(row: Row, measured: list[str]) -> str:
  cells = [f'`{row.how}`', row.source, state_bytes(row), *measured, row.note]
  return f'| {" | ".join(cells)} |\n'


def written() -> dict[str, list[str]]:
  """The cells of the committed table, by optimiser."""
  rows = [r for r in TABLE.read_text().splitlines() if r.startswith('| `')]
  cells = [[cell.strip() for cell in r.strip('|').split('|')] for r in rows]
  return {row[0].strip('`'): row for row in cells}


if __name__ == '__main__':
  TABLE.write_text(
    HEAD + ''.join(line(row, safety(row)) for row in ROWS.values())
  )
