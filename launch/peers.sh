#!/usr/bin/env bash
# Sets up .venv with the peers of experiments/benchmarks/fewshot.py and of
# continual.py, once.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
set_up requirements-test requirements-oracles requirements-peers

# Avalanche asks for another build of torch and for solvers it is not used
# with here: what it imports is listed by hand.
lock=$root/launch/requirements-avalanche.lock
install_once "$lock" --no-deps -r "$lock"

# What pip cannot build for this Python any more is only unpacked: of
# learn2learn the benchmark imports one module, which is plain Python.
lock=$root/launch/requirements-unpacked.lock
seen=$venv/.installed-requirements-unpacked.lock
if ! cmp -s "$lock" "$seen"; then
  echo "unpacking $(basename "$lock")"
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  "$python" -m pip download -qq --disable-pip-version-check --no-deps \
    --no-binary :all: -d "$scratch" -r "$lock" ||
    fail "pip could not download: $lock"
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  for archive in "$scratch"/*.tar.gz; do
    folder=$(basename "$archive" .tar.gz)
    tar -xzf "$archive" -C "$site" --strip-components=1 \
      "$folder/${folder%%-*}"
  done
  cp "$lock" "$seen"
fi
