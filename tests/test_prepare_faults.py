"""Preparing datasets: what goes wrong, and what happens at the same time."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts import prepare_dataset
from scripts.prepare import shards
from utils import dataset

ROOT = Path(__file__).resolve().parent.parent


def test_a_full_disk_is_told_in_one_line(tmp_path):
    """The system refuses files of more than 20 kB."""
    command = f"ulimit -f 20; exec {sys.executable} -m scripts.prepare_dataset digits --output"
    done = subprocess.run(
        ["bash", "-c", f"{command} {tmp_path / 'data'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "cannot be written" in done.stderr
    assert not (tmp_path / "data").exists()


def test_of_two_processes_the_slower_takes_the_faster_ones_digits(tmp_path, monkeypatch, capsys):
    write = dataset.write_metadata
    output = tmp_path / "data"

    def slowly(root, *arguments):
        monkeypatch.setattr(dataset, "write_metadata", write)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        assert prepare_dataset.main(["digits", f"--output={output}"]) == 0
        write(root, *arguments)

    monkeypatch.setattr(dataset, "write_metadata", slowly)
    assert prepare_dataset.main(["digits", f"--output={output}"]) == 0
    assert "another process was faster" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    (output / "dataset_info.json").unlink()
    assert prepare_dataset.main(["digits", f"--output={output}"]) == 1
    assert "holds something else" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["device_batch_size", "records_per_shard", "workers"])
def test_zero_is_refused(tmp_path, option, capsys):
    with pytest.raises(SystemExit):
        prepare_dataset.main(["images", "--input=.", f"--output={tmp_path}", f"--{option}=0"])
    assert f"--{option}: a number above 0" in capsys.readouterr().err


ADDRESS = "--coordinator_address=localhost:1"
PEER = ["--num_processes=2", "--process_id=1"]


@pytest.mark.parametrize(
    "words, told",
    [
        ([ADDRESS], "needs --num_processes"),
        ([ADDRESS, *PEER, "--join_timeout=3"], "waited 3 s at localhost:1"),
        (["--coordinator_address=host", "--num_processes=2"], "expected HOST:PORT"),
    ],
)
def test_processes_that_do_not_come_together_are_told_in_one_line(tmp_path, words, told):
    command = [sys.executable, "-m", "scripts.prepare_dataset", "pt", f"--input={tmp_path}"]
    done = subprocess.run(
        [*command, f"--output={tmp_path / 'new'}", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode != 0 and told in done.stderr
    assert len([line for line in done.stderr.splitlines() if "rror" in line or told in line]) == 1


def test_a_stream_that_ends_early_makes_no_shard(tmp_path):
    example = {"image": np.zeros((2, 2, 3), np.uint8), "label": 0}
    names = {"train": ["a", "b"]}
    job = shards.Job(tmp_path, 2, "image", (2, 2, 3), 1, {"train": [0, 1]}, names, settings={})
    with pytest.raises(ValueError, match="1 examples came for 2 items"):
        shards.write(job, lambda items: [example])
    assert not list(tmp_path.glob("*array_record*")) and not dataset.is_dataset(tmp_path)


def test_pixels_do_not_wait_for_what_only_latents_and_statistics_need():
    modules = "scripts.prepare_dataset, scripts.prepare.images, scripts.prepare.preview"
    late = "'flax', 'grain', 'orbax', 'scipy.linalg', 'diffusers'"
    code = f"import sys, {modules}; print(sorted({{{late}}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
