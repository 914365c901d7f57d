"""The other processes of a job: what the environment announces, and what keeps them apart."""

import contextlib
import errno
import logging
import os
import re
import socket
import threading
import warnings
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
OPEN_MPI_4 = "OMPI_MCA_orte_hnp_uri"
PORTS = 61440  # the first of those from which jax, too, chooses that of process 0
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
    """Returns the `Job` of the environment; None where there is none, or it does not say all.

    What is announced and cannot be read is no reason not to run: it is said in a line, unless the
    user has `described` the job.
    """
    name = "the environment"
    try:
        if "OMPI_COMM_WORLD_SIZE" in os.environ and OPEN_MPI_4 not in os.environ:
            name = NAMES["OmpiCluster"]
            return _open_mpi_5(os.environ, name)
        with warnings.catch_warnings():  # jax gives one in every pod that lacks a package
            warnings.simplefilter("ignore")
            for kind in ClusterEnv._cluster_types:
                name = NAMES.get(kind.__name__, kind.__name__)
                if not kind.opt_in_only_method and kind.is_env_present():
                    break
            else:
                name = "torchrun or its like (WORLD_SIZE, RANK, MASTER_ADDR)"
                return _by_torch_names(os.environ, name)
        slurm = kind.__name__ == "SlurmCluster"
        if slurm and os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
            return None  # a shell inside an allocation, which counts the tasks of others
        named = os.environ.get("JAX_COORDINATOR_ADDRESS")
        detected = ClusterEnv.auto_detect_unset_distributed_params(
            named, None, None, None, kind.name or None, timeout
        )
        address, count, index, devices = detected
        if slurm:
            devices = gpus_of_task(os.environ)
        elif kind.__name__ == "OmpiCluster":
            devices = _gpus_of_rank(os.environ)
        return Job(str(address), int(count), int(index), own_devices(devices), name)
    except Exception as error:  # of each environment its own
        if described:
            return None
        logging.warning(
            "%s does not say which processes belong to this job (%s: %s): this one runs alone",
            name, type(error).__name__, files.first_line(error),
        )  # fmt: skip
        return None


def own_devices(devices):
    """Numbers this process's GPUs; None for all, or where jax's own variable names them."""
    return None if "JAX_LOCAL_DEVICE_IDS" in os.environ else devices


def gpus_of_task(environ):
    """Numbers the GPUs of a task of SLURM among those that it sees; None: all of them.

    A task whose GPUs are its own (`--gpus-per-task`, `--gpu-bind`) sees no others.
    """
    if "SLURM_GPUS_PER_TASK" in environ or "gpu" in environ.get("SLURM_TRES_PER_TASK", ""):
        return None
    there = int(environ.get("SLURM_GPUS_ON_NODE") or 0)
    return share(environ, _tasks_on_node(environ), int(environ["SLURM_LOCALID"]), there)


def share(environ, tasks, number, there=0):
    """Numbers the GPUs of process `number` of the `tasks` on this machine; None: all.

    Those that a process sees are shared evenly, in order. One that sees a single GPU, or is alone,
    takes what it sees; where nothing tells how many there are, there is one for each.
    """
    seen = environ.get("CUDA_VISIBLE_DEVICES") or environ.get("ROCR_VISIBLE_DEVICES")
    count = len(seen.split(",")) if seen else there
    if tasks == 1 or count == 1:
        return None
    each = count // tasks
    if count % tasks:
        logging.warning("%d processes share %d GPUs: %d idle", tasks, count, count % tasks)
    return list(range(number * each, (number + 1) * each)) if each else [number]


def _tasks_on_node(environ):
    """Reads the tasks of the step on this node, from a text like "2(x3),1"."""
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS")
    text = next(environ[name] for name in names if environ.get(name))
    counts = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    node = int(environ.get("SLURM_NODEID") or 0)
    return counts[node] if node < len(counts) else counts[-1]


def _open_mpi_5(environ, name):
    """Returns the job of an `mpirun` of Open MPI 5, which names its host in PMIX_NAMESPACE.

    As jax does for version 4: process 0 is taken to run where mpirun does, and the port to follow
    from what tells one mpirun from another.
    """
    launcher = re.fullmatch(r"\D+?-(.+)-(\d+)@\d+", environ["PMIX_NAMESPACE"])
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        address = f"{launcher[1]}:{PORTS + int(launcher[2]) % (65536 - PORTS)}"
    count, index = environ["OMPI_COMM_WORLD_SIZE"], environ["OMPI_COMM_WORLD_RANK"]
    return Job(address, int(count), int(index), own_devices(_gpus_of_rank(environ)), name)


def _gpus_of_rank(environ):
    tasks, number = environ["OMPI_COMM_WORLD_LOCAL_SIZE"], environ["OMPI_COMM_WORLD_LOCAL_RANK"]
    return share(environ, int(tasks), int(number))


def _by_torch_names(environ, name):
    """Returns the job of WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT; None without them."""
    if not {"WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        return None
    tasks, number = environ.get("LOCAL_WORLD_SIZE", 1), environ.get("LOCAL_RANK", 0)
    devices = share(environ, int(tasks), int(number))
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    address = address or f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
    count, index = int(environ["WORLD_SIZE"]), int(environ["RANK"])
    return Job(address, count, index, own_devices(devices), name)


def announcement(job, timeout):
    """Says at once what a job is that the user has not described."""
    return (
        f"{job.name} announced {job.count} processes, and this one as number {job.index}: waiting "
        f"up to {timeout} s for the others at {job.address}{alone(job)}"
    )


def alone(job):
    """Says how to run without the others."""
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
    """Lets processes reach each other directly, where gRPC would ask a proxy for the way."""
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
