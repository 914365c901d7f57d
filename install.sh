#!/usr/bin/env bash
# Installs what the project needs into the active environment (venv or conda), or into .venv
# where none is active. Takes the jax for what the machine has: a TPU, an NVIDIA GPU, or neither.
# Run again, it does nothing. On stdout it prints one line: the Python to use.
#
#   bash install.sh [--dev]          --dev: also what the tests and the linter need
#   JAX_KIND=cuda13 bash install.sh  tpu | cuda13 | cuda12 | cpu, instead of what is found here
#                                    (for a login node that has no accelerator itself)
set -euo pipefail
case ${1:-} in
  -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { echo "install.sh: $*" >&2; }
fail() { say "$*"; exit 1; }

machine=${INSTALL_MACHINE:-}  # the tests put a made-up machine's /sys and /dev there

has_tpu() {
  # Google's PCI devices that are TPUs (jax/_src/hardware_utils.py has the same list): the network
  # card of a Google machine has the vendor number too.
  local folder vendor device
  for folder in "$machine"/sys/bus/pci/devices/*; do
    { read -r vendor <"$folder/vendor" && read -r device <"$folder/device"; } 2>/dev/null ||
      continue
    [[ $vendor == 0x1ae0 ]] || continue
    case $device in
      0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076) return 0 ;;
    esac
  done
  # In a container only the device files may be visible.
  compgen -G "$machine/dev/accel[0-9]*" >/dev/null && return 0
  compgen -G "$machine/dev/vfio/[0-9]*" >/dev/null && [[ -n ${TPU_NAME:-}${TPU_WORKER_ID:-} ]]
}

nvidia_kind() {
  # "580.65.06, 9.0" for each GPU. CUDA 13 needs driver 580 and a GPU of capability 7.5.
  local lines
  lines=$(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null) ||
    return 1
  awk -F '[., ]+' '
    /^[0-9]/ { gpus++; driver = $1 + 0; capability = $(NF - 1) + $NF / 10 }
    /^[0-9]/ && (driver < 580 || capability < 7.5) { old = 1 }
    /^[0-9]/ && driver < 525 { too_old = 1 }
    END {
      if (!gpus) exit 1
      print too_old ? "cpu" : old ? "cuda12" : "cuda13"
      if (too_old) print "install.sh: the NVIDIA driver is older than 525: using the CPU" \
        > "/dev/stderr"
    }' <<<"$lines"
}

machine_kind() {
  if [[ -n ${JAX_KIND:-} ]]; then
    case $JAX_KIND in
      tpu | cuda12 | cuda13 | cpu) echo "$JAX_KIND" ;;
      *) fail "JAX_KIND=$JAX_KIND is none of tpu, cuda13, cuda12, cpu" ;;
    esac
  elif has_tpu; then echo tpu
  else nvidia_kind || echo cpu
  fi
}

find_environment() {
  # Sets `environment` (its folder) and `python`; makes .venv where no environment is active.
  environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
  if [[ -n $environment ]]; then
    python=$environment/bin/python
    [[ -x $python ]] || fail "the active environment $environment has no bin/python"
    is_recent "$python" || fail "$python is older than Python 3.11; activate a newer environment"
    return
  fi
  environment=$PWD/.venv python=$PWD/.venv/bin/python
  if [[ -x $python ]] && is_recent "$python"; then return; fi
  local candidate
  for candidate in python3 python3.12 python3.11 python3.13; do
    is_recent "$candidate" || continue
    "$candidate" -c "import venv, ensurepip" 2>/dev/null ||
      fail "$candidate cannot make environments; on Debian or Ubuntu: apt install python3-venv"
    say "making the environment .venv with $("$candidate" --version)"
    "$candidate" -m venv .venv >&2 || fail "$candidate -m venv .venv failed"
    return
  done
  fail "Python 3.11 or newer is needed and was not found (tried python3, python3.11 to python3.13)"
}

is_recent() { "$1" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; }

install_packages() {
  # install_packages STAMP_FILE STAMP WHAT PIP_ARGUMENTS...
  local file=$1 stamp=$2 what=$3
  shift 3
  say "installing $what into $environment; this takes some minutes"
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >&2 ||
    fail "$environment has no pip"
  "$python" -m pip install --quiet --no-compile --disable-pip-version-check "$@" >&2 ||
    fail "pip could not install $what (its message is above)"
  # pip would compile one file after the other; this takes all cores.
  "$python" -m compileall -qq -j 0 "$("$python" -c \
    'import sysconfig; print(sysconfig.get_path("purelib"))')" >&2 || true
  echo "$stamp" >"$file"
}

is_done() {
  # is_done STAMP_FILE STAMP: what is asked for was installed here before. An accelerator's jax
  # runs on a CPU too, so a machine without one is content with it (a login node, a shared folder).
  local found
  found=$(cat "$1" 2>/dev/null) || return 1
  [[ $found == "$2" || ($2 == "cpu "* && ${found#* } == "${2#* }") ]]
}

# What was installed here before is noted in files of the environment.
base_is_done() { is_done "$environment/.installed-requirements" "$base_stamp"; }
gcs_is_done() { [[ -z $gcs ]] || is_done "$environment/.installed-gcs" "$gcs_stamp"; }
dev_is_done() { [[ -z $dev ]] || is_done "$environment/.installed-dev" "$dev_stamp"; }

main() {
  local dev="" gcs="" kind extra="" base_stamp dev_stamp gcs_stamp
  case ${1:-} in
    "") ;;
    --dev) dev=yes ;;
    *) fail "unknown argument $1; usage: bash install.sh [--dev]" ;;
  esac
  find_environment
  kind=$(machine_kind)
  [[ $kind == cpu ]] || extra="[$kind]"
  base_stamp="$kind $(cksum <requirements.txt)"
  # Buckets: on a TPU machine, and where one of the folders is in one.
  case $kind:${LOG_DIR:-}:${DATA_ROOT:-}:${OUTPUT_DIR:-} in
    tpu:* | *:gs://*) gcs=yes gcs_stamp="gcs $(cksum <requirements-gcs.txt)" ;;
  esac
  dev_stamp="dev $(cksum <requirements-dev.txt)"

  if ! base_is_done || ! gcs_is_done || ! dev_is_done; then
    [[ -w $environment ]] || fail "the environment $environment cannot be written to"
    exec 9>"$environment/.install-lock"
    # Several processes of one job may share the environment: one installs, the others wait.
    if command -v flock >/dev/null; then flock 9; fi
    base_is_done || install_packages "$environment/.installed-requirements" "$base_stamp" \
      "jax$extra and the requirements" -r requirements.txt "jax$extra"
    gcs_is_done || install_packages "$environment/.installed-gcs" "$gcs_stamp" \
      "what buckets need" -r requirements-gcs.txt
    dev_is_done || install_packages "$environment/.installed-dev" "$dev_stamp" \
      "the test tools" -r requirements-dev.txt
  fi
  echo "$python"
}

main "$@"
