#!/usr/bin/env bash
# Trains, evaluates or samples: installs what is missing and runs main.py. The same command again
# goes on where the job stopped.
#
#   bash scripts/launch.sh JOB_NAME [CONFIG] [--config.option=value ...]
#
# CONFIG is a file of configs/ without .yml (default run_b4); `bash scripts/launch.sh --list` shows
# them. From the environment:
#   DATA_ROOT      folder of the datasets (default ./data)
#   LOG_DIR        logs and checkpoints go to LOG_DIR/$USER/JOB_NAME (default ./logs)
#   MAX_RESTARTS   how often to start again after a preemption or a kill (default 0)
#   RESTART_DELAY  seconds before that (default 5)
# Relative paths in options count from the repository's folder. Ctrl-C, SIGTERM or a terminal that
# closes (unless by nohup): the job saves and stops, with status 75; a second Ctrl-C kills it. What
# reads the output (`| head`) may go away: the job goes on, and output.log has all of it.
set -euo pipefail

fail() { echo "launch.sh: $*" >&2; exit 2; }
usage="usage: bash scripts/launch.sh JOB_NAME [CONFIG] [--config.option=value ...]"
# What stands above, and the configs there are; neither needs anything to be installed.
case ${1:-} in
  -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit ;;
  --list) exec python3 "$(dirname "$0")/../main.py" --list ;;
esac

absolute() {
  [[ ! $1 =~ ^[A-Za-z][A-Za-z0-9_+.-]+:/ || $1 =~ ^gs://[^/] ]] ||
    fail "$1: of addresses only gs://BUCKET/... can be read and written"
  case $1 in /* | *://*) echo "$1" ;; *) echo "$PWD/$1" ;; esac
}

output_name() {
  # Of several processes that share LOG_DIR each has an output file of its own: by its number where
  # that is in the shell, else on a TPU (jax asks elsewhere which host of a slice it is) by host;
  # main.py then sees to it that output.log names the file of process 0.
  local argument number=${SLURM_PROCID:-${OMPI_COMM_WORLD_RANK:-${RANK:-}}}
  for argument; do
    case $argument in --process_id=*) number=${argument#*=} ;; esac
  done
  if [[ -z $number ]] && has_tpu; then number=$(hostname); fi
  case ${number:-0} in 0) echo output.log ;; *) echo "output.$number.log" ;; esac
}

has_tpu() {
  local machine=${INSTALL_MACHINE:-}  # as in install.sh
  compgen -G "$machine/dev/accel[0-9]*" >/dev/null || compgen -G "$machine/dev/vfio/[0-9]*" >/dev/null
}

show() {
  # Copies stdin to stdout; on a terminal a progress line takes the place of the one before.
  [[ -t 1 ]] || { exec cat; }
  local line open="" width
  width=$(tput cols 2>/dev/null || echo 80)
  while IFS= read -r line; do
    if [[ $line == "step "* ]]; then
      printf '\r%s\033[K' "${line:0:width-1}"
      open=yes
    else
      [[ -z $open ]] || printf '\n'
      printf '%s\n' "$line"
      open=""
    fi
  done
  [[ -z $open ]] || printf '\n'
}

run() {
  # Runs a command such that a signal to this script reaches it; its exit status in `status`.
  # It runs in the background because bash holds signals back while a command is in front.
  # In the background bash lets it ignore Ctrl-C, so that it hears of it once, as SIGTERM.
  [[ -z $stopping ]] || { status=75; return 0; }
  "$@" >&3 2>&1 3>&- &
  child=$!
  [[ -z $stopping ]] || kill -TERM "$child" 2>/dev/null || true  # it came in between
  local signals=""
  until [[ $signals == "$signals_seen" ]]; do  # a signal ends `wait`, not the command
    signals=$signals_seen status=0
    wait "$child" || status=$?
  done
  child=""
  # Ended by what it was sent before it could listen: nothing is lost, and it may be begun again.
  case $stopping:$status in ?*:129 | ?*:130 | ?*:143) status=75 ;; esac
}

stop() {
  signals_seen+=x
  if [[ -n $stopping && $1 == INT ]]; then
    kill -KILL "$child" 2>/dev/null || true
  elif [[ -n $child ]]; then
    kill -TERM "$child" 2>/dev/null || true
  fi
  stopping=$1
}

run_job() {
  # run_job WORKDIR CONFIG ARGUMENTS...: main.py, again where it was stopped from outside.
  local workdir=$1 config=$2
  shift 2
  while [[ -z $stopping ]]; do
    run "$python" main.py --workdir="$workdir" --config="configs/load_config.py:$config" "$@"
    # 75: main.py saved and left because the machine is taken away; above 128: killed by a signal.
    [[ $status == 75 || $status -gt 128 ]] || return 0
    [[ -z $stopping && $restarts -lt $MAX_RESTARTS ]] || return 0
    restarts=$((restarts + 1))
    echo "launch.sh: exit status $status; restart $restarts of $MAX_RESTARTS" >&3
    sleep "$RESTART_DELAY" &
    child=$!
    wait "$child" || true  # a signal ends it
    child=""
  done
}

main() {
  [[ $# -ge 1 ]] || fail "$usage"
  local job=$1 config=run_b4
  shift
  [[ $job =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ ]] ||
    fail "JOB_NAME '$job' may have letters, digits, '_', '.' and '-' only; $usage"
  if [[ $# -ge 1 && $1 != -* ]]; then config=$1; shift; fi
  [[ ${MAX_RESTARTS:=0} =~ ^(0|[1-9][0-9]{0,8})$ ]] ||
    fail "MAX_RESTARTS=$MAX_RESTARTS is not a whole number (without leading zeros)"
  [[ ${RESTART_DELAY:=5} =~ ^[0-9]+([.][0-9]+)?[smhd]?$ ]] ||
    fail "RESTART_DELAY=$RESTART_DELAY is not a number of seconds (or 5m, 1h)"

  local root data_root log_dir workdir output
  root=$(dirname "${BASH_SOURCE[0]}")/..
  [[ -z ${DATA_ROOT:-} ]] || data_root=$(absolute "$DATA_ROOT")
  [[ -z ${LOG_DIR:-} ]] || log_dir=$(absolute "$LOG_DIR")
  cd "$root"
  export DATA_ROOT=${data_root:-data} PYTHONUNBUFFERED=1
  local user=${USER:-$(id -un 2>/dev/null || echo user)}
  workdir=${log_dir:-logs}/$user/$job
  output=$workdir
  case $workdir in *://*) output=logs/$user/$job ;; esac  # tee writes to this machine only
  mkdir -p "$output" 2>/dev/null && [[ -w $output ]] ||
    fail "cannot write to $output; set LOG_DIR to a folder of yours"
  output+=/$(output_name "$@")
  export MEANFLOW_OUTPUT=$output  # for main.py, which puts it beside a run in a bucket

  local child="" stopping="" signals_seen=x status=0 restarts=0 tee_pid tee=(tee -a)
  trap 'stop INT' INT
  trap 'stop TERM' TERM
  trap 'stop HUP' HUP  # not where it is ignored (nohup): bash then leaves it so
  local python
  python=$(bash install.sh) || exit 1

  # tee outlives a Ctrl-C, which goes to every process of the terminal, and whoever reads from it.
  if tee -p </dev/null >/dev/null 2>&1; then tee+=(-p); fi
  exec 3> >(trap '' INT TERM HUP; exec 3>&-; (trap '' PIPE; exec "${tee[@]}" "$output") | show)
  tee_pid=$!
  # A config that there is not is told of by main.py, before anything is made.
  local made=
  case $config in
    digits_restore | digits_upscale | digits_words) made=digits_pairs ;;
    digits | digits_*) made=digits ;;
    signals) made=signals ;;
  esac
  if [[ -n $made && -f configs/$config.yml ]]; then
    run "$python" -m scripts.prepare_dataset "$made" --output "$DATA_ROOT/$made"
  fi
  if [[ $status == 0 ]]; then
    run_job "$workdir" "$config" "$@"
  fi
  exec 3>&-
  wait "$tee_pid" 2>/dev/null || true
  exit "$status"
}

main "$@"
