"""Fixtures that all tests share; runs before any test imports jax."""

import gc
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

# The tests run on one CPU device, whatever the machine and the user's settings: their golden
# numbers hold in float32 on a CPU. Tests of several devices start processes of their own.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("JAX_NUM_CPU_DEVICES", None)
# Tests compile much and compute little: without LLVM's optimisations they take half the time.
flags = ["--xla_backend_optimization_level=0"]
if version("jaxlib") < "0.11":  # later ones have lost this form of loops, which is sooner compiled
    flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
# The user's own flags stand behind, so that they count: `--xla_cpu_max_isa=AVX2` and the like.
own = os.environ.get("XLA_FLAGS", "").split()
flags += [flag for flag in own if flag not in flags and "host_platform_device_count" not in flag]
os.environ["XLA_FLAGS"] = " ".join(flags)
# Threads of numpy's products wait by turning: beside another process they are 14 times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Programs inherit which signals are ignored: as in a terminal, whatever has started the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_finish(session):
    """What is imported stays: the collector of cycles need not search it while jax traces."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    """What one program that tests start has compiled, the others find again, of all workers.

    The tests themselves compile hardly anything twice, and writing it down takes longer.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden data: MEANFLOW_GOLDEN, else tests/golden."""
    return Path(os.environ.get("MEANFLOW_GOLDEN") or ROOT / "tests" / "golden")


@pytest.fixture(scope="session")
def run_python():
    """Function that runs Python in a process of its own, in the project's folder.

    `run_python(code, devices=8)` runs a piece of source text, `run_python(["main.py", "--x=1"])`
    a command line; `devices` is the number of CPU devices that jax sees. Returns the
    CompletedProcess with text output; a failure fails the test unless check=False.
    """

    def run(code, devices=8, timeout=300, env=None, check=True):
        arguments = ["-c", code] if isinstance(code, str) else [str(word) for word in code]
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode != 0:
            pytest.fail(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run
