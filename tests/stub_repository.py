"""A copy of the shell scripts, with stand-ins for pip, pytest, ruff and main.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "install.sh requirements.txt requirements-dev.txt requirements-gcs.txt scripts/launch.sh "
    "scripts/test.sh .ci/run"
).split()

# A Python that notes what pip, pytest and ruff are asked for instead of running them.
STUB = f"""#!/usr/bin/env bash
case "$*" in
  "-m pip --version") ;;
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  "-m pytest"*)
    printf '%s|' "$@" >>"$CALLS"; echo >>"$CALLS"
    exit "${{PIP_STATUS:-0}}" ;;
  "-m pip "* | "-m ruff"*)
    sleep "${{PIP_SECONDS:-0}}"
    echo "$*" >>"$CALLS"
    exit "${{PIP_STATUS:-0}}" ;;
  "-m compileall -qq -j 0 /"*) echo compileall >>"$CALLS.compiled" ;;
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
