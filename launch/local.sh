#!/usr/bin/env bash
# Sets up .venv and runs an experiment on this machine; without arguments the
# main job. Arguments are those of `python -m experiments.run`.
#   FMETA_HOST_DEVICES=2 ./launch/local.sh    two CPU devices without --mesh
#   FMETA_LESS_MEMORY=1 ./launch/local.sh     XLA on CPU schedules for memory
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
set_up

echo 'settings:'
# A second run finds its programs compiled.
use JAX_COMPILATION_CACHE_DIR "$root/.cache/jax"
use JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS 0.1
if [ "$(uname)" = Linux ]; then
  # Huge pages, and freed memory is kept: BERT on CPU 1.2-1.3x (2026-11).
  use GLIBC_TUNABLES glibc.malloc.hugetlb=1
  use MALLOC_MMAP_THRESHOLD_ 4000000000
  use MALLOC_TRIM_THRESHOLD_ 8000000000
  use MALLOC_TOP_PAD_ 268435456
fi
flags=
if [ -n "${FMETA_HOST_DEVICES:-}" ]; then
  flags="--xla_force_host_platform_device_count=$FMETA_HOST_DEVICES"
fi
if [ -n "${FMETA_LESS_MEMORY:-}" ]; then
  # Else it computes early what jax.checkpoint leaves for later (2026-11).
  flags="$flags --xla_cpu_enable_concurrency_optimized_scheduler=false"
fi
if [ -n "$flags" ]; then use XLA_FLAGS "${flags# }"; fi

# -P: the folder one stands in must not shadow the package.
exec "$python" -P -m experiments.run "$@"
