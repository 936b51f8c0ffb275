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

# One worker a core, at most four: each compiles and holds its own programs.
workers=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
if [ "$workers" -gt 4 ]; then workers=4; fi
parallel=(-n "$workers" --dist loadfile)

cd "$root"
if [ -n "$oracles" ]; then
  set_up requirements-test requirements-oracles
  exec "$python" -m pytest "${parallel[@]}" -m 'oracle or optimised' "$@"
fi
set_up requirements-test
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m pyright --pythonpath "$python"
exec "$python" -m pytest "${parallel[@]}" "$@"
