"""Runs one experiment file: settings from flags, results in a folder.

  python -m experiments.run --config=experiments/fewshot/sinusoid_maml.py \\
    --config.inner_lr=0.02 --workdir=/tmp/sinusoid

An experiment file has a docstring, a `Config` dataclass whose fields all have
defaults, and `run(config, context)` that returns `metrics` and what else
`fmeta.result.OUTCOME` names. Bad input is one line on stderr and exit 2.
"""

import math
import os
import pathlib
import re
import sys
import time
from types import ModuleType
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging
from jax.experimental import multihost_utils

from experiments import files, notes
from fmeta import config as settings
from fmeta import result as results
from fmeta import sharding
from fmeta import workdir as folders
from fmeta.errors import UsageError

MAIN = 'experiments/docparams.py'
_HOST_DEVICES = '--xla_force_host_platform_device_count'
INTERRUPTED = 130  # 128 + 2, what a shell reports of Ctrl-C
_MOST_HOST_DEVICES = 64  # More is a mistyped mesh, not a machine.

_HELP = {
  'config': 'the experiment file (experiments/docparams.py)',
  'workdir': 'a new or empty folder (runs/<experiment>/<nnn>)',
  'mesh': 'axis:size,... for example data:2',
  'data_dir': 'a local copy of the data',
  'resume': 'continue the run in --workdir',
  'list': 'name the experiment files',
  'help': 'this, and with --config=FILE its fields',
}


class Job(NamedTuple):
  """An experiment that is ready to run."""

  name: str
  source: pathlib.Path
  module: ModuleType
  config: Any


def _options() -> flags.FlagValues:
  # Not absl's global flags: with theirs bad input ends in exit 1.
  options = flags.FlagValues()
  for name, words in _HELP.items():
    if name in ('resume', 'list', 'help'):
      flags.DEFINE_bool(name, False, words, flag_values=options)
    else:
      flags.DEFINE_string(name, None, words, flag_values=options)
  return options


def parse(argv: list[str]) -> tuple[flags.FlagValues, list[tuple]]:
  """Splits a command line into options and `--config.field` assignments.

  Raises:
    UsageError: for a flag that does not exist, or a word that is no flag.
  """
  assignments, rest = [], argv[:1]
  for word in argv[1:]:
    found = re.fullmatch(r'--?(no)?config\.([^=]+)(?:=(.*))?', word, re.DOTALL)
    if not found:
      rest.append(word)
    elif found[1]:
      assignments.append((found[2], 'false'))
    else:
      assignments.append((found[2], found[3]))
  options = _options()
  try:
    words = options(rest)[1:]
  except flags.Error as error:
    raise UsageError(str(error)) from error
  if words:
    raise UsageError(
      f'unexpected argument {words[0]!r}; settings are written --name=value'
    )
  return options, assignments


def prepare(options: flags.FlagValues, assignments: list[tuple]) -> Job:
  """Loads the experiment and fixes its config.

  With `--resume` the config must be the stored one; without `--config` the
  workdir's copies of file and config are used.
  """
  stored, given = None, options.config
  if options.resume:
    if not options.workdir:
      raise UsageError('--resume continues a run: name it with --workdir=DIR')
    folder = pathlib.Path(options.workdir)
    stored = folders.reopen(folder)
    name = folders.read_json(folder / folders.RUN)['experiment']
    source = files.find(given or str(folder / folders.EXPERIMENT))
  else:
    source = files.find(given or MAIN)
    name = files.name_of(source)
  module = files.load(source)
  config = module.Config()
  if stored is not None and not given:
    settings.from_json(config, stored)
  settings.override(config, assignments)
  if stored is not None:
    _check_same(stored, config, options.workdir)
  return Job(name, source, module, settings.freeze(config))


def _check_same(stored: dict, config: Any, folder: str) -> None:
  difference = settings.first_difference(stored, settings.to_json(config))
  if difference:
    raise UsageError(
      f'{difference}; resume {folder!r} with the settings it started with, '
      f'or start anew in another --workdir'
    )


def use_host_devices(mesh: str | None) -> None:
  """On CPU, makes as many devices as the mesh has places for.

  Must come before the first computation. One all-reduce of several host
  devices can overtake the next and hang, so dispatch is made synchronous.
  """
  count = math.prod(map(int, re.findall(r':\s*(\d{1,6})\b', mesh or '')))
  xla_flags = os.environ.get('XLA_FLAGS', '')
  if 1 < count <= _MOST_HOST_DEVICES and _HOST_DEVICES not in xla_flags:
    os.environ['XLA_FLAGS'] = f'{xla_flags} {_HOST_DEVICES}={count}'.strip()
  if _HOST_DEVICES in os.environ.get('XLA_FLAGS', ''):
    sharding.synchronous_dispatch()


def open_workdir(options: flags.FlagValues, job: Job) -> pathlib.Path:
  """The run's folder, made and described by process 0 alone."""
  processes = jax.process_count()
  if processes > 1 and not options.workdir:
    raise UsageError(f'{processes} processes share one run: give --workdir=DIR')
  if options.resume:
    return pathlib.Path(options.workdir)
  if options.workdir:
    folder = folders.claim(pathlib.Path(options.workdir))
  else:
    folder = folders.next_free(pathlib.Path('runs') / job.name)
  if processes > 1:  # All have seen it empty before one writes.
    multihost_utils.sync_global_devices('workdir')
  if jax.process_index() == 0:
    config = settings.to_json(job.config)
    folders.describe(folder, config, job.name, job.source)
  return folder


def execute(options: flags.FlagValues, assignments: list[tuple]) -> None:
  """Prepares, runs and records one experiment."""
  began = time.monotonic()
  use_host_devices(options.mesh)
  if 'SLURM_NTASKS' in os.environ:
    sharding.initialize_processes()
  if options.mesh:
    sharding.parse_mesh(options.mesh, jax.device_count())
  job = prepare(options, assignments)
  folder = open_workdir(options, job)
  print(f'{job.name} -> {folder}', flush=True)
  context = folders.Context(
    workdir=folder.resolve(),
    data_dir=options.data_dir,
    mesh=options.mesh,
    resume=options.resume,
  )
  try:
    outcome = job.module.run(job.config, context)
  except UsageError:
    if jax.process_index() == 0 and not options.resume:
      folders.discard(folder)
    raise
  except KeyboardInterrupt:
    said = f'stopped; --resume --workdir={folder} continues'
    print(said, file=sys.stderr, flush=True)
    raise SystemExit(INTERRUPTED) from None
  if jax.process_index() == 0:
    wall_seconds = time.monotonic() - began
    results.write(folder, job.name, outcome, wall_seconds)
    print(f'wrote {folder / results.RESULT}', flush=True)


def help_text(options: flags.FlagValues) -> str:
  """The flags, and the fields of the experiment if one is named."""
  lines = [(__doc__ or '').strip(), '']
  lines += [f'  --{name:<9} {words}' for name, words in _HELP.items()]
  if not options.config:
    return '\n'.join(lines)
  module = files.load(files.find(options.config))
  lines += ['', f'{options.config}: {(module.__doc__ or "").strip()}', '']
  config = module.Config()
  words = notes.of(config)
  for name, value in settings.flatten(config).items():
    note = f'  # {words[name]}' if name in words else ''
    lines.append(f'  --config.{name}={value}{note}')
  return '\n'.join(lines)


def main(argv: list[str]) -> int:
  """Does what the command line says; returns the exit status."""
  logging.set_verbosity(logging.WARNING)
  try:
    options, assignments = parse(argv)
    if options.help:
      print(help_text(options))
    elif options.list:
      print(files.listing())
    else:
      execute(options, assignments)
  except UsageError as error:
    print('error:', ' '.join(str(error).splitlines()), file=sys.stderr)
    return 2
  return 0


def _absl_defaults(argv: list[str]) -> list[str]:
  flags.FLAGS(argv[:1])  # Libraries read absl's flags; ours are not there.
  return argv


if __name__ == '__main__':
  app.run(main, flags_parser=_absl_defaults)
