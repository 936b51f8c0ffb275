#!/usr/bin/env bash
#SBATCH --job-name=fmeta
#SBATCH --ntasks=2
#SBATCH --output=slurm-%j.out
# One process per task, one run: sbatch launch/slurm.sh --config=FILE \
#   --mesh=data:2 --workdir=DIR. Run launch/local.sh --list once before, on a
# machine with a package index: the environment must exist on the shared disk.
set -euo pipefail
# Slurm runs a copy of this script; the checkout is where sbatch was called.
root=${SLURM_SUBMIT_DIR:?start me with sbatch from the checkout}
exec srun "$root/.venv/bin/python" -P -m experiments.run "$@"
