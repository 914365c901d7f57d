"""launch.sh and test.sh, with a stand-in for pip and for main.py."""

import os
import pty
import shutil
import signal
import socket
import subprocess
import time

import pytest
from stub_repository import Repository


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


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


def test_hosts_of_a_slice_do_not_share_an_output(repository, tmp_path):
    """On a TPU machine the shell does not know which process of how many this is."""
    repository.main("")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "accel0").touch()
    machine = {"INSTALL_MACHINE": str(tmp_path)}
    done = repository.run("scripts/launch.sh", "job", **machine)
    assert done.returncode == 0, done.err
    assert repository.run("scripts/launch.sh", "job", SLURM_PROCID="2", **machine).returncode == 0
    names = sorted(path.name for path in (repository.folder / "logs").glob("*/job/output*"))
    assert names == ["output.2.log", f"output.{socket.gethostname()}.log"]


def test_the_log_is_complete_when_the_command_ends(repository):
    repository.program(
        repository.stubs / "tee", f'#!/bin/sh\nsleep 0.5\nexec {shutil.which("tee")} "$@"\n'
    )
    repository.main("")
    process = subprocess.run(
        ["bash", str(repository.folder / "scripts/launch.sh"), "job"],
        env=repository.env,
        stdout=subprocess.DEVNULL,
        timeout=60,
    )
    assert process.returncode == 0
    assert repository.log() == "hello from main\ntrouble\n"


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
    for name, value in (("LOG_DIR", "az://b/logs"), ("LOG_DIR", "gs:/b"), ("DATA_ROOT", "gs://")):
        done = repository.run("scripts/launch.sh", "job", **{name: value})
        assert done.returncode == 2 and f"{value}: of addresses only gs://BUCKET" in done.err
        assert not (repository.folder / "logs").exists()
    done = repository.run("scripts/launch.sh", "job", MAX_RESTARTS="many")
    assert done.returncode == 2 and "MAX_RESTARTS=many" in done.err
    done = repository.run("scripts/launch.sh", "job", PIP_STATUS="1")
    assert done.returncode == 1 and "pip could not install" in done.err
    assert not repository.runs()


@pytest.mark.parametrize("config", ["digits", "digits_unet"])
def test_digits_are_prepared_first(repository, config):
    prepare = repository.folder / "scripts" / "prepare_dataset.py"
    prepare.write_text("import sys\nprint('prepare', *sys.argv[1:])\n")
    (repository.folder / "configs").mkdir(exist_ok=True)
    (repository.folder / "configs" / f"{config}.yml").touch()
    repository.main("")
    assert repository.run("scripts/launch.sh", "job", config).returncode == 0
    assert repository.log().startswith("prepare digits --output data/digits\nhello from main\n")
    prepare.write_text("raise SystemExit(5)\n")
    assert repository.run("scripts/launch.sh", "job", config).returncode == 5
    assert len(repository.runs()) == 1
    # Of a config that there is not main.py tells, before anything is made.
    assert repository.run("scripts/launch.sh", "none", "digits_none").returncode == 0


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
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert repository.log().endswith("waiting\nsaved\n")
    assert len(repository.runs()) == 1


def test_a_second_ctrl_c_kills(repository):
    repository.main(WAITS.replace("0.3", "30"))
    process = repository.start("scripts/launch.sh", "job", MAX_RESTARTS="3")
    while process.stdout.readline() != "waiting\n":
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(2)  # two at once would count as one
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
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
        "-m|pytest|-n|3|--dist|loadfile|--no-loadscope-reorder|-k|a or b|",
    ]
    assert repository.run(".ci/run", "-x").returncode == 0
    assert repository.installed()[3:] == [
        "-m ruff check .",
        "-m ruff format --check .",
        "-m|pytest|-n|3|--dist|loadfile|--no-loadscope-reorder|-x|",
    ]
    assert repository.run("scripts/test.sh", PIP_STATUS="4").returncode == 4
