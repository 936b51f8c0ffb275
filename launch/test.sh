#!/usr/bin/env bash
# Sets up .venv, then ruff, pyright and pytest. Arguments go to pytest.
#   ./launch/test.sh --oracles    only the comparisons with peer libraries
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

oracles=
for argument; do
  if [ "$argument" = --oracles ]; then oracles=1; fi
done

cd "$root"
if [ -n "$oracles" ]; then
  set_up requirements-test requirements-oracles
  exec "$python" -m pytest -m oracle "$@"
fi
set_up requirements-test
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m pyright --pythonpath "$python"
exec "$python" -m pytest "$@"
