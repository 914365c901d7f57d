#!/usr/bin/env bash
# The rows of docs/speed.md on one NVIDIA card, in about ten minutes: first whether its kernels
# compute the right thing, then the steps, then the stages of the evaluation.
#
#   bash benchmarks/gpu.sh [FOLDER]     # also writes check.json, run_b4.json, ... there
#
# Options behind FOLDER go to `python -m benchmarks train`, like --steps=20.
set -euo pipefail
case ${1:-} in
  -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit ;;
esac
folder=$(realpath "${1:-.}")
shift || true
cd "$(dirname "$0")/.."
# By default jax leaves a quarter of a card to others. Without a CPU beside it XLA counts no FLOPs.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}
config=--config=configs/load_config.py
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
measure() {  # NAME COMMAND [OPTIONS]: one that fails does not keep the others from running
  timeout 150 python3 -m benchmarks "${@:2}" --json "$folder/$1.json" || echo "$1: status $?"
}
measure check check
for name in run_b4 run_b2 run_xl2; do
  measure "$name" train "$config:$name" --rounds 3 "$@"
done
measure run_b4_loop train "$config:run_b4" --config.model.unroll=1 --rounds 3 "$@"
measure evaluation evaluation "$config:run_b4" --config.fid.device_batch_size=128 \
  --config.sampling.vae_dtype=bfloat16
