#!/usr/bin/env bash
# The rows of docs/speed.md on one NVIDIA card, in less than 8 minutes: first whether its kernels
# compute the right thing, then the steps and the stages of the evaluation.
#
#   bash benchmarks/gpu.sh [FOLDER]     # also writes check.json and table.json there
#
# Options behind FOLDER go to `python -m benchmarks table`.
set -euo pipefail
case ${1:-} in
  -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit ;;
esac
cd "$(dirname "$0")/.."
folder=${1:-.}
shift || true
# By default jax leaves a quarter of a card to others.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
timeout 150 python3 -m benchmarks check --json "$folder/check.json" ||
    echo "check: failed or too slow (status $?)"
timeout 330 python3 -m benchmarks table --json "$folder/table.json" "$@"
