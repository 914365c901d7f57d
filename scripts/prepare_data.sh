#!/usr/bin/env bash
# Prepares ImageNet: images -> latents as records, and the FID statistics of the images.
#
#   IMAGE_SIZE=256 COMPUTE_LATENT=True COMPUTE_FID=True bash scripts/prepare_data.sh [--option=value ...]
#
# The same command again goes on where it stopped. Further options, and more than one machine:
# docs/data.md, and python -m scripts.prepare_dataset images --help. Set these here or in the
# environment; relative paths count from where the command is given.
set -euo pipefail
case ${1:-} in
  -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit ;;
esac

IMAGENET_ROOT=${IMAGENET_ROOT:-}              # has train/<class>/*.JPEG and val/<class>/*.JPEG
OUTPUT_DIR=${OUTPUT_DIR:-}                    # the records; one folder for each IMAGE_SIZE
LOG_DIR=${LOG_DIR:-logs}                      # output goes to LOG_DIR/$USER/prepare_data_*.log, too
IMAGE_SIZE=${IMAGE_SIZE:-256}                 # 256, 512 or 1024: latents 32x32, 64x64, 128x128
COMPUTE_LATENT=${COMPUTE_LATENT:-True}
COMPUTE_FID=${COMPUTE_FID:-False}             # OUTPUT_DIR/imagenet_{IMAGE_SIZE}_fid_stats.npz
VAE=${VAE:-mse}                               # mse, ema, a folder, or none for pixels

fail() { echo "prepare_data.sh: $*" >&2; exit 2; }
absolute() { case $1 in /* | *://*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

[[ -n $IMAGENET_ROOT ]] || fail "set IMAGENET_ROOT to the folder that has train/ and val/"
[[ -n $OUTPUT_DIR ]] || fail "set OUTPUT_DIR to the folder for the records"
[[ $IMAGE_SIZE =~ ^[0-9]+$ ]] || fail "IMAGE_SIZE=$IMAGE_SIZE is not a whole number"
for name in COMPUTE_LATENT COMPUTE_FID; do
  case ${!name} in True | False) ;; *) fail "$name=${!name} is neither True nor False" ;; esac
done
case $VAE in */*) VAE=$(absolute "$VAE") ;; esac
input=$(absolute "$IMAGENET_ROOT")
output=$(absolute "$OUTPUT_DIR")
case $LOG_DIR in *://*) LOG_DIR=logs ;; esac  # tee writes to this machine only
log_folder=$(absolute "$LOG_DIR")/${USER:-$(id -un 2>/dev/null || echo user)}
mkdir -p "$log_folder" 2>/dev/null && [[ -w $log_folder ]] ||
  fail "cannot write to $log_folder; set LOG_DIR to a folder of yours"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash install.sh) || exit 1
export PYTHONUNBUFFERED=1
# tee takes no notice of Ctrl-C, of a terminal that closes, or of a reader of ours that goes away.
"$python" -m scripts.prepare_dataset images --input="$input" --output="$output" \
  --image_size="$IMAGE_SIZE" --vae="$VAE" \
  --compute_latent="$COMPUTE_LATENT" --compute_fid="$COMPUTE_FID" "$@" \
  2>&1 | (trap '' INT HUP PIPE; tee -a "$log_folder/prepare_data_$IMAGE_SIZE.log" || true)
