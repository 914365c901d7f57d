"""Joining others: what an environment announces, what keeps processes apart, being alone."""

import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jax._src.clusters import ClusterEnv
from jobs import free_port

from utils import cluster, processes

ROOT = Path(__file__).resolve().parent.parent
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
PROXY = {name: "http://127.0.0.1:9" for name in ("http_proxy", "HTTPS_PROXY", "grpc_proxy")}
JOIN = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
logging.getLogger("jax").setLevel(logging.WARNING)
from utils import processes
numbers = [int(word) if word.isdigit() else word for word in sys.argv[1:]]
processes.join(*numbers, timeout=TIMEOUT)
import jax
print("joined", jax.process_count(), flush=True)
processes.leave()
"""


def start(*words, timeout=60, **env):
    return subprocess.Popen(
        [sys.executable, "-c", JOIN.replace("TIMEOUT", str(timeout)), *words],
        cwd=ROOT, env={**os.environ, **env}, stdout=-1, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_proxies_do_not_keep_processes_apart():
    address = f"{socket.gethostname()}:{free_port()}"
    pair = [start(address, "2", str(i), **PROXY) for i in range(2)]
    for process in pair:
        assert process.communicate(timeout=90)[0] == "joined 2\n"


def test_a_shell_inside_an_allocation_says_at_once_who_announced_what():
    began = time.monotonic()
    process = start(timeout=300, **SLURM)
    line = process.stdout.readline()
    process.kill()
    process.communicate()
    assert time.monotonic() - began < 60
    for words in ("SLURM", "announced 2 processes", "as number 0", "--num_processes=1", "srun"):
        assert words in line


@pytest.mark.parametrize(
    "variables",
    [
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},  # an interactive step, of two tasks elsewhere
        SLURM | {"SLURM_NTASKS": "1"},
        {"JAX_COORDINATOR_ADDRESS": "localhost:1"},  # left behind by another job
    ],
)
def test_what_announces_no_others_joins_none(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    processes.join()
    assert processes.jax.process_count() == 1


def test_one_process_alone_is_alone_wherever_it_is(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    processes.join(num_processes=1)
    processes.join(None, 1, 0)
    assert processes.jax.process_count() == 1


@pytest.mark.parametrize("variables", [{"SLURM_PROCID": ""}, {"SLURM_JOB_ID": "a"}])
def test_an_environment_that_cannot_be_read_is_no_reason_not_to_run(monkeypatch, caplog, variables):
    for name, value in (SLURM | variables).items():
        monkeypatch.setenv(name, value)
    processes.join()
    assert "SLURM" in caplog.text and "does not say which processes" in caplog.text
    assert "this one runs alone" in caplog.text


def test_a_detection_that_raises_is_told_once_and_not_of_who_described_the_job(monkeypatch, caplog):
    def broken(cls):
        raise RuntimeError("Service token file does not exist.\nsecond line")

    kind = next(kind for kind in ClusterEnv._cluster_types if kind.__name__ == "K8sCluster")
    monkeypatch.setattr(kind, "is_env_present", classmethod(broken))
    assert cluster.find(1) is None
    (record,) = caplog.records
    assert "Kubernetes" in record.getMessage() and "second line" not in record.getMessage()
    assert record.levelno == logging.WARNING
    assert cluster.find(1, described=True) is None and len(caplog.records) == 1


def test_a_port_in_use_is_said():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} of .* is in use"):
            processes.join(f"localhost:{port}", 2, 0)
        # The others do not listen there.
        cluster.check_port(cluster.Job(f"localhost:{port}", 2, 1, None, ""))
    cluster.check_port(cluster.Job(f"localhost:{port}", 2, 0, None, ""))


@pytest.mark.parametrize("address", ["host", "host:", ":1", "host:port", "host:99999", "host:0"])
def test_an_address_without_a_port_is_refused(address):
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        cluster.check_flags(address, 2, 0)


def test_proxies_come_back(monkeypatch):
    for name, value in PROXY.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("no_proxy", "localhost")
    with pytest.raises(KeyError), cluster.without_proxies():
        assert not PROXY.keys() & os.environ.keys() and os.environ["no_proxy"] == "localhost"
        raise KeyError
    assert PROXY.items() <= os.environ.items()
