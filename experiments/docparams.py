"""One model, one data set, three questions, one page.

  python -m experiments.run                     # about ten minutes, 2 cores
  python -m experiments.run --config.seeds=5    # the committed table

all-MiniLM-L6-v2 on docparams: how well does it fine-tune (probe, surgical,
LoRA, full), how fast does it adapt from a few examples (MAML and its
baselines), how much does it forget over a stream of packages (naive, EWC,
replay, joint)? All rows repeat the same step. Writes `report.html`, its three
panels as PNG and the numbers as `result.json`. Expected and measured:
experiments/README.md.
"""

import dataclasses
import platform
import time

import jax

from experiments.continual import docparams_by_package
from experiments.fewshot import docparams_maml
from experiments.finetune import docparams
from fmeta import report, result
from fmeta.workdir import Context

PANELS = {
  'finetune': docparams,
  'fewshot': docparams_maml,
  'continual': docparams_by_package,
}


@dataclasses.dataclass
class Config:
  """Seeds of all panels, and each panel's own settings."""

  seeds: int = 1
  finetune: docparams.Config = dataclasses.field(
    default_factory=docparams.Config
  )
  fewshot: docparams_maml.Config = dataclasses.field(
    default_factory=docparams_maml.Config
  )
  continual: docparams_by_package.Config = dataclasses.field(
    default_factory=docparams_by_package.Config
  )


SMALL = {
  f'{name}.{field}': value
  for name, module in PANELS.items()
  for field, value in module.SMALL.items()
}


def facts(config: Config, outcome: dict, seconds: float) -> dict:
  """What the numbers depend on."""
  devices = jax.devices()
  return {
    'model': 'sentence-transformers/all-MiniLM-L6-v2 (22.7 M parameters)',
    'seeds': config.seeds,
    'hardware': f'{len(devices)} x {devices[0].device_kind}, '
    f'{platform.machine()}',
    'seconds': round(seconds),
    'date': time.strftime('%Y-%m-%d'),
    'commit': result.commit(),
    'data sha256': outcome['data_sha256'],
    'versions': result.versions(),
  }


def run(config: Config, context: Context) -> dict:
  """Runs the three panels and writes the page."""
  began = time.perf_counter()
  panels, metrics, ci95, outcome = [], {}, {}, {}
  for name, module in PANELS.items():
    settings = dataclasses.replace(getattr(config, name), seeds=config.seeds)
    shown, numbers = module.panel(settings, context)
    print(f'\n{report.terminal_table(shown)}', flush=True)
    panels.append(shown)
    metrics |= numbers['metrics']
    ci95 |= numbers.get('ci95', {})
    outcome = outcome or numbers  # cost and data are those of fine-tuning
  seconds = time.perf_counter() - began
  pages = report.write_report(
    context.workdir / 'report.html',
    'One model, three questions: MiniLM on docparams',
    panels,
    facts(config, outcome, seconds),
  )
  print(f'\n{len(panels)} panels in {seconds:.0f} s: {pages[0]}')
  for shown in panels:
    print(report.answer(shown))
  return {**outcome, 'metrics': metrics, 'ci95': ci95}
