"""install.sh: what it installs where, and that it does so once."""

import time
from pathlib import Path

import pytest
from stub_repository import STUB, Repository


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


def add_pci_device(repository, vendor, device):
    folder = Path(repository.env["INSTALL_MACHINE"]) / "sys/bus/pci/devices/0000:00:05.0"
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "device").write_text(f"{device}\n")


@pytest.mark.parametrize(
    "gpus, jax",
    [
        ("", "jax"),
        ("580.65.06, 9.0", "jax[cuda13]"),
        ("570.10, 9.0", "jax[cuda12]"),
        ("580.65.06, 9.0\n580.65.06, 7.0", "jax[cuda12]"),
        ("470.1, 8.0", "jax"),
        ("No devices were found", "jax"),
    ],
)
def test_the_jax_of_the_nvidia_driver(repository, gpus, jax):
    if gpus:
        repository.program(repository.stubs / "nvidia-smi", f"#!/bin/sh\necho '{gpus}'\n")
    done = repository.run("install.sh")
    assert done.returncode == 0, done.err
    assert done.out == f"{repository.environment}/bin/python\n"
    assert repository.installed() == [f"-r requirements.txt {jax}"]
    assert ("older than 525" in done.err) == gpus.startswith("470")


@pytest.mark.parametrize(
    "vendor, device, jax",
    [
        ("0x1ae0", "0x0063", "jax[tpu]"),
        ("0x1ae0", "0x0042", "jax"),  # the network card of a Google machine
        ("0x8086", "0x0063", "jax"),
    ],
)
def test_the_jax_of_a_tpu(repository, vendor, device, jax):
    add_pci_device(repository, vendor, device)
    assert repository.run("install.sh").returncode == 0
    buckets = ["-r requirements-gcs.txt"] * (jax == "jax[tpu]")
    assert repository.installed() == [f"-r requirements.txt {jax}", *buckets]


@pytest.mark.parametrize("name", ["LOG_DIR", "DATA_ROOT", "OUTPUT_DIR"])
def test_what_buckets_need_comes_where_one_is_named(repository, name):
    repository.run("install.sh", **{name: "folder"})
    assert repository.installed() == ["-r requirements.txt jax"]
    for _ in range(2):
        assert repository.run("install.sh", **{name: "gs://bucket/x"}).returncode == 0
    assert repository.installed()[1:] == ["-r requirements-gcs.txt"]


def test_the_second_installation_does_nothing(repository):
    assert repository.run("install.sh", "--dev").returncode == 0
    assert repository.installed() == ["-r requirements.txt jax", "-r requirements-dev.txt"]
    start = time.monotonic()
    done = repository.run("install.sh", "--dev")
    assert time.monotonic() - start < 10
    assert (done.returncode, done.err) == (0, "")
    assert len(repository.installed()) == 2
    # What pip leaves uncompiled is compiled, once for each call of it.
    compiled = repository.calls.with_suffix(".compiled").read_text()
    assert compiled.split() == ["compileall"] * 2
    # Without an accelerator of its own a machine is content with any jax, but not the reverse.
    repository.run("install.sh", JAX_KIND="cuda13")
    repository.run("install.sh")
    assert repository.installed()[2:] == ["-r requirements.txt jax[cuda13]"]
    with (repository.folder / "requirements.txt").open("a") as file:
        file.write("another\n")
    repository.run("install.sh")
    assert len(repository.installed()) == 4


def test_two_installations_at_once_install_once(repository):
    both = [repository.start("install.sh", PIP_SECONDS="0.5") for _ in range(2)]
    assert [process.communicate(timeout=60) and process.returncode for process in both] == [0, 0]
    assert len(repository.installed()) == 1


def test_a_failed_installation_is_told_and_tried_again(repository):
    done = repository.run("install.sh", PIP_STATUS="1")
    assert done.returncode == 1 and done.out == ""
    assert "pip could not install jax and the requirements" in done.err.splitlines()[-1]
    assert repository.run("install.sh").returncode == 0
    assert len(repository.installed()) == 2


def test_an_environment_is_made_where_none_is_active(repository):
    repository.program(repository.stubs / "python3", STUB)
    done = repository.run("install.sh", VIRTUAL_ENV=None)
    assert done.out == f"{repository.folder}/.venv/bin/python\n", done.err
    assert len(repository.installed()) == 1
    conda = repository.run("install.sh", VIRTUAL_ENV=None, CONDA_PREFIX=str(repository.environment))
    assert conda.out == f"{repository.environment}/bin/python\n"


def test_what_a_machine_lacks_is_told_in_one_line(repository):
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        repository.program(repository.stubs / name, "#!/bin/sh\nexit 1\n")
    done = repository.run("install.sh", VIRTUAL_ENV=None)
    assert done.returncode == 1
    assert done.err.startswith("install.sh: Python 3.11 or newer is needed")
    repository.program(repository.stubs / "python3.11", STUB)
    done = repository.run("install.sh", VIRTUAL_ENV=None, ENSUREPIP_STATUS="1")
    assert done.returncode == 1 and "apt install python3-venv" in done.err
    repository.program(repository.environment / "bin" / "python", "#!/bin/sh\nexit 1\n")
    done = repository.run("install.sh")
    assert done.returncode == 1 and "older than Python 3.11" in done.err
    assert repository.run("install.sh", "--fast").returncode == 1
    assert not repository.installed()
