"""install.sh, launch.sh and test.sh, with a stand-in for pip and for main.py."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "install.sh requirements.txt requirements-dev.txt scripts/launch.sh scripts/test.sh .ci/run"
).split()

# A Python that notes what pip, pytest and ruff are asked for instead of running them.
STUB = f"""#!/usr/bin/env bash
case "$*" in
  "-m pip --version") ;;
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  "-m pip "* | "-m pytest"* | "-m ruff"*)
    sleep "${{PIP_SECONDS:-0}}"
    echo "$*" >>"$CALLS"
    exit "${{PIP_STATUS:-0}}" ;;
  *ensurepip*) exit "${{ENSUREPIP_STATUS:-0}}" ;;
  --version) echo Python 3.11.0 ;;
  *) exec {sys.executable} "$@" ;;
esac
"""

MAIN = """
import json, os, pathlib, signal, sys, time
here = pathlib.Path("runs.txt")
runs = len(here.read_text().splitlines()) if here.exists() else 0
with here.open("a") as file:
    file.write(json.dumps([os.environ["DATA_ROOT"], *sys.argv[1:]]) + "\\n")
print("hello from main", flush=True)
print("trouble", file=sys.stderr, flush=True)
"""


class Repository:
    """A copy of the scripts in an empty folder, with an active environment that is a stand-in."""

    def __init__(self, folder):
        self.folder, self.calls = folder / "repo", folder / "calls"
        for name in COPIED:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.folder / name)
        self.environment = folder / "environment"
        self.program(self.environment / "bin" / "python", STUB)
        self.stubs = folder / "stubs"
        self.program(self.stubs / "nvidia-smi", "#!/bin/sh\nexit 9\n")
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        (folder / "machine").mkdir()
        self.env = {
            "PATH": f"{self.stubs}:{os.environ['PATH']}",
            "HOME": str(folder),
            "VIRTUAL_ENV": str(self.environment),
            "CALLS": str(self.calls),
            "INSTALL_MACHINE": str(folder / "machine"),
            "RESTART_DELAY": "0",
            "USER": "me",
        }

    def program(self, path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def main(self, text):
        (self.folder / "main.py").write_text(MAIN + text)

    def start(self, script, *arguments, cwd=None, **env):
        env = {name: value for name, value in {**self.env, **env}.items() if value is not None}
        return subprocess.Popen(
            ["bash", str(self.folder / script), *arguments],
            cwd=cwd or self.elsewhere,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script, *arguments, **options):
        process = self.start(script, *arguments, **options)
        process.out, process.err = process.communicate(timeout=60)
        return process

    def installed(self):
        """What pip was asked to install, call by call."""
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [line.split("--disable-pip-version-check ")[-1] for line in calls]

    def runs(self):
        path = self.folder / "runs.txt"
        return path.read_text().splitlines() if path.exists() else []

    def log(self, job="job", name="output.log"):
        return (self.folder / "logs" / "me" / job / name).read_text()


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


def make_tpu(repository, device):
    folder = Path(repository.env["INSTALL_MACHINE"]) / "sys/bus/pci/devices/0000:00:05.0"
    folder.mkdir(parents=True)
    (folder / "vendor").write_text("0x1ae0\n")
    (folder / "device").write_text(f"{device}\n")


# install.sh ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("device, jax", [("0x0063", "jax[tpu]"), ("0x0042", "jax")])
def test_the_jax_of_a_tpu(repository, device, jax):
    make_tpu(repository, device)  # the second is the network card of a Google machine
    assert repository.run("install.sh").returncode == 0
    assert repository.installed() == [f"-r requirements.txt {jax}"]


def test_the_second_installation_does_nothing(repository):
    assert repository.run("install.sh", "--dev").returncode == 0
    assert repository.installed() == ["-r requirements.txt jax", "-r requirements-dev.txt"]
    start = time.monotonic()
    done = repository.run("install.sh", "--dev")
    assert time.monotonic() - start < 3
    assert (done.returncode, done.err) == (0, "")
    assert len(repository.installed()) == 2
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


# launch.sh -------------------------------------------------------------------------------------


def test_a_job_with_the_defaults(repository):
    repository.main("sys.exit(3)")
    done = repository.run("scripts/launch.sh", "job")
    assert done.returncode == 3
    assert repository.runs() == [
        '["data", "--workdir=logs/me/job", "--config=configs/load_config.py:run_b4"]'
    ]
    assert repository.log() == "hello from main\ntrouble\n" == done.out
    assert repository.installed() == ["-r requirements.txt jax"]
    repository.run("scripts/launch.sh", "job")
    assert repository.log() == "hello from main\ntrouble\n" * 2


def test_a_job_with_everything_said(repository):
    repository.main("")
    words = ["--config.a.b=x y", "--process_id=1"]
    done = repository.run(
        "scripts/launch.sh", "job.1-a", "exp", *words, DATA_ROOT="sets", LOG_DIR="my logs"
    )
    assert done.returncode == 0, done.err
    here = repository.elsewhere
    assert repository.runs() == [
        f'["{here}/sets", "--workdir={here}/my logs/me/job.1-a", '
        '"--config=configs/load_config.py:exp", "--config.a.b=x y", "--process_id=1"]'
    ]
    assert (here / "my logs/me/job.1-a/output.1.log").read_text().startswith("hello")
    repository.run("scripts/launch.sh", "job", "--eval", LOG_DIR="gs://bucket/logs")
    assert '"--workdir=gs://bucket/logs/me/job", "--config=' in repository.runs()[1]
    assert repository.log().startswith("hello")


def test_a_container_without_a_user(repository):
    repository.main("")
    assert repository.run("scripts/launch.sh", "job", USER=None).returncode == 0
    assert len(list((repository.folder / "logs").glob("*/job/output.log"))) == 1


@pytest.mark.parametrize("job", [(), ("",), ("a/b",), ("a b",), ("..",), ("--config.x=1",)])
def test_a_wrong_job_name_starts_nothing(repository, job):
    repository.main("")
    done = repository.run("scripts/launch.sh", *job)
    assert done.returncode == 2
    assert done.err.startswith("launch.sh: ") and "usage: " in done.err
    assert len(done.err.splitlines()) == 1
    assert not repository.runs() and not repository.installed()
    assert not (repository.folder / "logs").exists()


def test_wrong_settings_start_nothing(repository):
    repository.main("")
    (repository.elsewhere / "file").touch()
    done = repository.run("scripts/launch.sh", "job", LOG_DIR="file")
    assert done.returncode == 2 and "cannot write to" in done.err
    done = repository.run("scripts/launch.sh", "job", MAX_RESTARTS="many")
    assert done.returncode == 2 and "MAX_RESTARTS=many" in done.err
    done = repository.run("scripts/launch.sh", "job", PIP_STATUS="1")
    assert done.returncode == 1 and "pip could not install" in done.err
    assert not repository.runs()


def test_digits_are_prepared_first(repository):
    prepare = repository.folder / "scripts" / "prepare_dataset.py"
    prepare.write_text("import sys\nprint('prepare', *sys.argv[1:])\n")
    repository.main("")
    assert repository.run("scripts/launch.sh", "job", "digits").returncode == 0
    assert repository.log().startswith("prepare digits --output data/digits\nhello from main\n")
    prepare.write_text("raise SystemExit(5)\n")
    assert repository.run("scripts/launch.sh", "job", "digits").returncode == 5
    assert len(repository.runs()) == 1


@pytest.mark.parametrize(
    "restarts, end, status, runs",
    [
        ("2", "sys.exit(75 if runs < 2 else 0)", 0, 3),
        ("1", "sys.exit(75 if runs < 2 else 0)", 75, 2),
        ("0", "sys.exit(75)", 75, 1),
        ("3", "sys.exit(1)", 1, 1),
        ("3", "sys.exit(2)", 2, 1),
        ("1", "os.kill(os.getpid(), signal.SIGKILL) if not runs else None", 0, 2),
    ],
)
def test_restarts(repository, restarts, end, status, runs):
    repository.main(end)
    done = repository.run("scripts/launch.sh", "job", MAX_RESTARTS=restarts)
    assert done.returncode == status
    assert len(repository.runs()) == runs
    assert repository.log().count("launch.sh: exit status") == runs - 1


WAITS = """
def leave(*_):
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
print("waiting", flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("everyone, sent", [(False, "TERM"), (True, "INT"), (True, "TERM")])
def test_a_signal_reaches_the_job_which_saves(repository, everyone, sent):
    repository.main(WAITS)
    process = repository.start("scripts/launch.sh", "job", MAX_RESTARTS="3")
    while process.stdout.readline() != "waiting\n":
        assert process.poll() is None
    number = getattr(signal, f"SIG{sent}")
    if everyone:  # Ctrl-C, or a scheduler that signals every process
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert repository.log().endswith("waiting\nsaved\n")
    assert len(repository.runs()) == 1


def test_a_second_ctrl_c_kills(repository):
    repository.main(WAITS.replace("0.3", "30"))
    process = repository.start("scripts/launch.sh", "job", MAX_RESTARTS="3")
    while process.stdout.readline() != "waiting\n":
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 137
    assert len(repository.runs()) == 1


def test_progress_lines_replace_each_other_on_a_terminal(repository):
    repository.main("print('step 1/2  x'); print('step 2/2  y'); print('done')")
    terminal, other_end = pty.openpty()
    process = subprocess.Popen(
        ["bash", str(repository.folder / "scripts/launch.sh"), "job"],
        env={**repository.env, "TERM": "dumb"},
        stdout=other_end,
        stderr=subprocess.DEVNULL,
    )
    assert process.wait(timeout=60) == 0
    os.close(other_end)
    shown = b""
    try:
        while piece := os.read(terminal, 4096):
            shown += piece
    except OSError:  # how a closed terminal ends on Linux
        pass
    os.close(terminal)
    assert shown.endswith(b"trouble\r\n\rstep 1/2  x\x1b[K\rstep 2/2  y\x1b[K\r\ndone\r\n")
    assert repository.log().endswith("trouble\nstep 1/2  x\nstep 2/2  y\ndone\n")


# test.sh and .ci/run ---------------------------------------------------------------------------


def test_the_test_command_passes_its_arguments_on(repository):
    assert repository.run("scripts/test.sh", "-k", "a or b").returncode == 0
    assert repository.installed() == [
        "-r requirements.txt jax",
        "-r requirements-dev.txt",
        "-m pytest -k a or b",
    ]
    assert repository.run(".ci/run", "-x").returncode == 0
    assert repository.installed()[3:] == [
        "-m ruff check .",
        "-m ruff format --check .",
        "-m pytest -x",
    ]
    assert repository.run("scripts/test.sh", PIP_STATUS="4").returncode == 4
