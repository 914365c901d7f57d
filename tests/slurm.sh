#!/usr/bin/env bash
# SLURM for real, on this machine: one node, two tasks, a run that is stopped and requeued.
#
#   bash tests/slurm.sh [FOLDER]     FOLDER: where to work and leave the logs (default: a new one)
#
# Needs slurm-wlm and munge (apt install slurm-wlm munge) and root, as slurmd starts tasks for users;
# it says so where they are missing. It brings up daemons of its own, with a configuration, a key and
# ports of its own, and ends them. What it does: a job of `srun bash scripts/launch.sh` trains the
# digits in two tasks; `scancel --signal=TERM` stops it; it saves, ends with status 75 and requeues
# itself; the requeued job goes on to the end. The same run unbroken ends bit for bit the same.
set -euo pipefail

skip() { echo "slurm.sh: not run: $*"; exit 0; }
fail() { echo "slurm.sh: FAILED: $*" >&2; exit 1; }

for program in munged slurmctld slurmd srun sbatch scancel scontrol squeue; do
  command -v "$program" >/dev/null || PATH=$PATH:/usr/sbin:/sbin
  command -v "$program" >/dev/null ||
    skip "there is no $program (on Debian: apt install slurm-wlm munge)"
done
[[ $(id -u) == 0 ]] || skip "slurmd starts tasks for users, and has to be root"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
here=$PWD
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
cd "$folder"
folder=$PWD
python=$(bash "$here/install.sh")
steps=${STEPS:-150}
pids=()

finish() {
  # The daemons of this script, by their numbers.
  scancel --user="$(id -un)" 2>/dev/null || true
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
}
trap finish EXIT

free_port() {
  "$python" -c "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])"
}

start_slurm() {
  mkdir -p state spool munge
  chmod 755 "$folder"
  chmod 700 munge
  dd if=/dev/urandom of=munge/key bs=1024 count=1 2>/dev/null
  chmod 400 munge/key
  munged --foreground --force --key-file="$folder/munge/key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" \
    >munged.log 2>&1 &
  pids+=($!)
  local node
  node=$(hostname -s)
  cat >slurm.conf <<CONF
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# cred_expire: how long a requeued job waits before it may start again
AuthInfo=socket=$folder/munge.socket,cred_expire=5
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerType=sched/builtin
MpiDefault=none
ReturnToService=2
MailProg=/bin/true
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=$node Default=YES MaxTime=INFINITE OverSubscribe=FORCE State=UP
CONF
  export SLURM_CONF=$folder/slurm.conf
  slurmctld -D -c >slurmctld.log 2>&1 &
  pids+=($!)
  slurmd -D -c >slurmd.log 2>&1 &
  pids+=($!)
  for _ in $(seq 60); do
    [[ $(sinfo -h -o %T 2>/dev/null) == idle ]] && return
    sleep 1
  done
  fail "the node does not become idle; see the logs in $folder"
}

# The job of docs/pods.md, on one node without GPUs.
write_job() {
  cat >job.sh <<'JOB'
#!/bin/bash
#SBATCH --nodes=1 --ntasks=2 --requeue --open-mode=append
cd "$PROJECT"
srun bash scripts/launch.sh "$NAME" digits "${WORDS[@]}" --config.training.num_steps="$STEPS" ||
  { [[ $? == 75 ]] && echo "status 75: requeued" && scontrol requeue "$SLURM_JOB_ID"; }
JOB
  local words=(
    --config.model.depth=1 --config.training.batch_size=16 --config.training.log_per_step=10
    --config.training.sample_on_training=False --config.fid.on_training=False
    --config.training.checkpoint_per_epoch=100000
  )
  sed -i "2a WORDS=(${words[*]})" job.sh
}

submit() {
  NAME=$1 sbatch --parsable --job-name="$1" --output="$folder/$1.out" --export=ALL job.sh
}

state() { squeue -h -j "$1" -o %T 2>/dev/null || true; }

until_says() {
  # until_says PATTERN FILE SECONDS
  for _ in $(seq "$3"); do
    grep -q "$1" "$2" 2>/dev/null && return
    sleep 1
  done
  fail "no '$1' in $2 within $3 s"
}

until_over() {
  # until_over JOB: the last lines of a run come before the end of its job.
  for _ in $(seq 60); do
    case $(state "$1") in "" | COMPLETED) return ;; esac
    sleep 1
  done
  fail "job $1 does not end"
}

start_slurm
write_job
export PROJECT=$here STEPS=$steps LOG_DIR=$folder/logs DATA_ROOT=$folder/data USER=me
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$folder/compiled VIRTUAL_ENV=${python%/bin/*}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_NUM_CPU_DEVICES=1
(cd "$here" && "$python" -m scripts.prepare_dataset digits --output "$DATA_ROOT/digits")

job=$(submit broken)
until_says "step 50/" logs/me/broken/output.log 300
scancel --signal=TERM "$job"
until_says "status 75: requeued" broken.out 120
stopped=$(sed -n 's/.*stopped as asked at step \([0-9]*\) of.*/\1/p' logs/me/broken/output.log)
[[ -n $stopped ]] || fail "the run does not say at which step it stopped"
echo "stopped at step $stopped of $steps with status 75, and requeued; it is $(state "$job")"
until_says "finished: step $steps" logs/me/broken/output.log 400
grep -q "going on from step $stopped" logs/me/broken/output.log || fail "it did not go on"
until_over "$job"

unbroken=$(submit unbroken)
until_says "finished: step $steps" logs/me/unbroken/output.log 400
until_over "$unbroken"
grep -h "announced" logs/me/unbroken/output*.log | tail -n 2 || true

# A script, and a shell, inside an allocation of two tasks that start no others: alone at once.
ask='from utils import cluster; print("a step of", cluster.find(5))'
sbatch --quiet --wait --ntasks=2 --output="$folder/script.out" --chdir="$here" \
  --wrap "$python -c '$ask'" || fail "the script in an allocation"
grep -q "a step of None" script.out || fail "a script without srun waits for others: $(cat script.out)"
(cd "$here" && salloc --quiet --ntasks=2 "$python" -c "$ask") >shell.out 2>&1 || true
(cd "$here" && salloc --quiet --ntasks=2 srun --ntasks=1 "$python" -c "$ask") >step.out 2>&1 || true
echo "inside an allocation of two tasks: script: $(cat script.out); shell: $(tail -n 1 shell.out);" \
  "a step of one: $(tail -n 1 step.out)"

(cd "$here" && "$python" - "$folder" "$steps" "$stopped" <<'PY'
import pathlib
import sys

sys.path[:0] = [".", "tests"]
from jobs import checkpoints, metrics

import numpy as np

folder, steps, stopped = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
broken, unbroken = (folder / "logs" / "me" / name for name in ("broken", "unbroken"))
assert metrics(broken) == metrics(unbroken), "the lines of metrics.jsonl differ"
one, other = checkpoints(broken), checkpoints(unbroken)
last = [key for key in other if key[0] == steps]
assert last and all(np.array_equal(one[key], other[key]) for key in last), "the weights differ"
print(f"bit-identical: {len(last)} arrays at step {steps}, {len(metrics(broken))} lines of metrics")
PY
) || fail "the broken and the unbroken run end differently"
echo "slurm.sh: passed ($(slurmd -V), 1 node, 2 tasks)"
