"""The other processes of a job: what the environment announces, and what keeps them apart."""

import contextlib
import errno
import logging
import os
import socket
import threading
from typing import NamedTuple

# What jax calls its detection of TPU slices, SLURM, Open MPI and Kubernetes is not public.
from jax._src.clusters import ClusterEnv

from utils import files

NAMES = {
    "SlurmCluster": "SLURM (SLURM_NTASKS, SLURM_PROCID)",
    "OmpiCluster": "Open MPI (OMPI_COMM_WORLD_SIZE)",
    "K8sCluster": "Kubernetes (KUBERNETES_SERVICE_HOST)",
    "GceTpuCluster": "the TPU slice",
    "GkeTpuCluster": "the TPU slice",
}
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")


class Job(NamedTuple):
    """This process among others."""

    address: str  # HOST:PORT of process 0
    count: int
    index: int
    local_devices: list | None  # numbers of the GPUs that are this process's; None: all
    name: str  # of the environment that announced it; empty where the user did


def check_flags(coordinator_address, num_processes, process_id):
    """Raises ValueError where the three do not describe a process among others, or one alone."""
    if num_processes == 1 and process_id in (None, 0):
        return
    given = [x is not None for x in (coordinator_address, num_processes, process_id)]
    if any(given) and not all(given):
        raise ValueError(
            "--coordinator_address, --num_processes and --process_id go together; give all three, "
            "or none on a TPU slice, SLURM or a single machine, or --num_processes=1 to run alone"
        )
    if all(given):
        host, colon, port = coordinator_address.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"--coordinator_address {coordinator_address}: expected HOST:PORT")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"--process_id {process_id} is not in 0..{num_processes - 1}")


def find(timeout, described=False):
    """The `Job` that the environment announces; None where there is none, or it does not say all.

    What is announced and cannot be read is no reason not to run: it is said in a line, unless the
    user has `described` the job.
    """
    name = "the environment"
    try:
        for kind in ClusterEnv._cluster_types:
            name = NAMES.get(kind.__name__, kind.__name__)
            if not kind.opt_in_only_method and kind.is_env_present():
                break
        else:
            return None
        if kind.__name__ == "SlurmCluster" and os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
            return None  # a shell inside an allocation, which counts the tasks of others
        found = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, kind.name or None, timeout
        )
        address, count, index, local_devices = found
        return Job(str(address), int(count), int(index), local_devices, name)
    except Exception as error:  # of each environment its own
        if described:
            return None
        logging.warning(
            "%s does not say which processes belong to this job (%s: %s): this one runs alone",
            name, type(error).__name__, files.first_line(error),
        )  # fmt: skip
        return None


def announcement(job, timeout):
    """What is said at once about a job that the user has not described."""
    return (
        f"{job.name} announced {job.count} processes, and this one as number {job.index}: waiting "
        f"up to {timeout} s for the others at {job.address}{alone(job)}"
    )


def alone(job):
    """How to run without the others."""
    started = "; srun starts them all" if job.name == NAMES["SlurmCluster"] else ""
    return f"{started}; --num_processes=1 runs this one alone"


def check_port(job):
    """Raises ValueError where another program has the port on which process 0 is to listen."""
    if job.index != 0:
        return
    port = int(job.address.rpartition(":")[2])
    for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        with contextlib.suppress(OSError), socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
                reason = "in use" if error.errno == errno.EADDRINUSE else "not for us"
                raise ValueError(
                    f"port {port} of {socket.gethostname()}, where process 0 is to listen, is "
                    f"{reason} ({error.strerror}): take another one in --coordinator_address "
                    "(JAX_COORDINATOR_PORT, where the address is found), or end what has it"
                ) from error


@contextlib.contextmanager
def without_proxies():
    """Processes of a job reach each other directly, where gRPC would ask a proxy for the way."""
    known = {
        name: os.environ.pop(name) for name in list(os.environ) if name.lower() in PROXIES
    }  # fmt: skip
    try:
        yield
    finally:
        os.environ.update(known)


@contextlib.contextmanager
def alarm(timeout, line, ring):
    """Calls `ring(line)` from another thread where the block takes more than `timeout` seconds."""
    timer = threading.Timer(timeout, ring, (line,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
