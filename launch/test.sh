#!/usr/bin/env bash
# Sets up .venv, then ruff, pyright and pytest. Arguments go to pytest.
#   ./launch/test.sh --oracles    the comparisons with peer libraries, and the
#                                 tests that need code compiled as for users
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

oracles=
for argument; do
  if [ "$argument" = --oracles ]; then oracles=1; fi
done

cd "$root"
if [ -n "$oracles" ]; then
  set_up requirements-test requirements-oracles
  exec "$python" -m pytest -m 'oracle or optimised' "$@"
fi
set_up requirements-test
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m pyright --pythonpath "$python"
exec "$python" -m pytest "$@"
