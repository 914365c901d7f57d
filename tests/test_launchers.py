"""Ways of starting several processes by the variables that each sets (table: docs/pods.md)."""

import os
import re
import warnings
from pathlib import Path

import pytest
import yaml

from utils import cluster, signals

ROOT = Path(__file__).resolve().parent.parent

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip
OPEN_MPI_4 = OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.1.0.1:34911"}
OPEN_MPI_5 = OPEN_MPI | {"PMIX_NAMESPACE": "prterun-login-node-7556@1"}
TORCH = {
    "WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1",
    "MASTER_ADDR": "first", "MASTER_PORT": "29500",
}  # fmt: skip
GPUS = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """No variable of any launcher is set."""
    words = ("SLURM_", "OMPI_", "PMIX_", "JAX_COORDINATOR", "JAX_LOCAL", "CUDA_VIS", "KUBERNETES")
    for name in list(os.environ):
        if name.startswith((*words, "MASTER_", "RANK", "WORLD_", "LOCAL_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "variables, address, index, devices",
    [
        # SLURM: tasks of one node see the same GPUs and share them ...
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, "node1:61447", 3, [1]),
        (SLURM | GPUS, "node1:61447", 3, [2, 3]),
        (SLURM | {"SLURM_GPUS_ON_NODE": "2"}, "node1:61447", 3, [1]),
        # ... one that is alone on its node takes them all ...
        (SLURM | GPUS | {"SLURM_STEP_TASKS_PER_NODE": "3,1"}, "node1:61447", 3, None),
        # ... and one that is bound to its own takes these.
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, "node1:61447", 3, None),
        (SLURM | GPUS | {"SLURM_GPUS_PER_TASK": "4"}, "node1:61447", 3, None),
        (SLURM | GPUS | {"SLURM_TRES_PER_TASK": "cpu:1,gres/gpu:4"}, "node1:61447", 3, None),
        # What jax itself reads goes first, for names that do not resolve and for GPUs.
        (SLURM | GPUS | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:99"}, "10.0.0.1:99", 3, [2, 3]),
        (SLURM | GPUS | {"JAX_LOCAL_DEVICE_IDS": "3"}, "node1:61447", 3, None),
        (OPEN_MPI_4 | GPUS, "10.96.0.1:62624", 3, [2, 3]),
        (OPEN_MPI_5 | GPUS, "login-node:64900", 3, [2, 3]),
        (OPEN_MPI_5, "login-node:64900", 3, [1]),
        (OPEN_MPI_5 | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:99"}, "10.0.0.1:99", 3, [1]),
        (SLURM | OPEN_MPI_5, "login-node:64900", 3, [1]),  # mpirun in an allocation
        (TORCH | GPUS, "first:29500", 3, [2, 3]),
        (TORCH | GPUS | {"LOCAL_WORLD_SIZE": "1"}, "first:29500", 3, None),
    ],
)
def test_what_a_launcher_sets_is_read(monkeypatch, variables, address, index, devices):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    job = cluster.find(1)
    assert (job.address, job.count, job.index, job.local_devices) == (address, 4, index, devices)


def test_gpus_that_nobody_takes_are_told(monkeypatch, caplog):
    assert cluster.share({"CUDA_VISIBLE_DEVICES": "0,1,2"}, 2, 1) == [1]
    assert "2 processes share 3 GPUs: 1 idle" in caplog.text


def test_a_pod_of_kubernetes_shows_no_warning_of_a_package(monkeypatch, caplog):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert cluster.find(1) is None
    assert not seen and not caplog.text


def test_an_mpirun_that_names_no_host_is_told(monkeypatch, caplog):
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    assert cluster.find(1) is None
    assert "Open MPI" in caplog.text and "this one runs alone" in caplog.text


def test_what_keepers_of_jobs_are_told_is_what_a_run_ends_with():
    """docs/pods.md: status 75 begins again, 1 and 2 do not; the saving has more than 30 s."""
    page = (ROOT / "docs" / "pods.md").read_text()
    (xpk,) = re.findall(r"^xpk workload create .*?\n```", page, re.M | re.S)
    assert f"--restart-on-exit-codes={signals.RESTART} " in xpk and "scripts/launch.sh b4" in xpk
    jobset, sky = map(yaml.safe_load, re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S))
    assert sky["resources"]["job_recovery"]["recover_on_exit_codes"] == [signals.RESTART]
    assert jobset["kind"] == "JobSet"
    (of_jobs,) = jobset["spec"]["failurePolicy"]["rules"]
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    (of_pods,) = job["podFailurePolicy"]["rules"]
    assert (
        of_jobs["onJobFailureReasons"] == ["PodFailurePolicy"] and of_jobs["action"] == "FailJobSet"
    )
    assert of_pods == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [1, 2]}}
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 30 and pod["restartPolicy"] == "Never"
    assert pod["containers"][0]["args"] == ["b4", "run_b4"]  # behind the image's launch.sh
    assert '"scripts/launch.sh"' in (ROOT / "Dockerfile").read_text()
