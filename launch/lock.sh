#!/usr/bin/env bash
# Writes the locks anew from pyproject.toml and launch/*.in, with the newest
# versions that fit together on this Python. Takes minutes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$(find_python)" -m venv "$scratch/venv"
python=$scratch/venv/bin/python

freeze() {
  "$python" -m pip freeze --all --exclude pip | sed 's/+cpu$//' | sort -f
}

cd "$root"
"$python" - >"$scratch/runtime.in" <<'PY'
import tomllib
project = tomllib.load(open('pyproject.toml', 'rb'))
print(*project['project']['dependencies'], sep='\n')
print(*project['build-system']['requires'], sep='\n')
PY
pip_install -U -r "$scratch/runtime.in"
freeze >launch/requirements.lock
cp launch/requirements.lock "$scratch/known"

for name in requirements-test requirements-oracles requirements-peers; do
  pip_install -c "$scratch/known" -r "launch/$name.in"
  comm -13 <(sort "$scratch/known") <(freeze | sort) |
    sort -f >"launch/$name.lock"
  freeze >"$scratch/known"
done
