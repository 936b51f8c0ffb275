# Sourced by the launch scripts: makes .venv once, then only looks.
# What is installed is what the locks say; a copy of each lock inside .venv
# tells that it has been.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=$venv/bin/python

fail() {
  echo "error: $*" >&2
  exit 1
}

# Prints the first Python that the locks were made for, or a newer one.
find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
      2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer found; install python3.11," \
    "or name one: PYTHON=/path/to/python3.11"
}

make_venv() {
  # An environment holds absolute paths: one that was moved is made anew.
  if [ -x "$python" ] && [ "$(cat "$venv/.root" 2>/dev/null)" = "$root" ]; then
    return
  fi
  local base
  base=$(find_python) || exit 1
  echo "making .venv with $("$base" --version)"
  "$base" -m venv --clear "$venv" ||
    fail "$base -m venv failed; on Debian install python3-venv"
  echo "$root" >"$venv/.root"
}

pip_install() {
  "$python" -m pip install -qq --disable-pip-version-check "$@" ||
    fail "pip could not install: $*"
}

# install_once FILE PIP_ARGUMENTS...: unless .venv has seen this very FILE.
install_once() {
  local file=$1 seen
  seen=$venv/.installed-$(basename "$file")
  shift
  if cmp -s "$file" "$seen"; then return; fi
  echo "installing $(basename "$file")"
  pip_install "$@"
  case $file in *-nodeps.lock) check_weights ;; esac
  cp "$file" "$seen"
}

check_weights() {
  "$python" - "$root/launch/weights.sha256" <<'PY' || exit 1
import hashlib, pathlib, sys, sysconfig
expected, name = pathlib.Path(sys.argv[1]).read_text().split()
path = pathlib.Path(sysconfig.get_path('purelib'), name)
found = hashlib.sha256(path.read_bytes()).hexdigest()
if found != expected:
  sys.exit(f'error: {path} has sha256 {found}, not {expected}; remove .venv')
PY
}

# set_up LOCK...: the run time's packages, fmeta itself, and those of LOCKs.
set_up() {
  local name lock
  make_venv
  for name in requirements "$@"; do
    lock=$root/launch/$name.lock
    install_once "$lock" -r "$lock"
  done
  lock=$root/launch/requirements-nodeps.lock
  install_once "$lock" --no-deps -r "$lock"
  install_once "$root/pyproject.toml" --no-deps --no-build-isolation -e "$root"
}

# use NAME VALUE: exports it unless the caller already did, and says which.
use() {
  if [ -n "${!1+set}" ]; then
    echo "  $1=${!1} (already set)"
  else
    export "$1=$2"
    echo "  $1=$2"
  fi
}
