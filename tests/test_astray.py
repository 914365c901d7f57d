"""Paths one level too high or too low, archives, files in the place of folders: said as such."""

import os
import shutil
import zipfile

import make
import numpy as np
import pytest
import torch_writer

import generator
from run import weights


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """home/logs/me/run is a run, home/other has nothing of ours."""
    home = tmp_path_factory.mktemp("home")
    make.run(home / "logs" / "me" / "run", *make.NETWORKS["DiT"], steps=(10, 20))
    (home / "other").mkdir()
    (home / "other" / "notes.txt").write_text("x")
    return home


def refused(path, kind=FileNotFoundError):
    with pytest.raises(kind) as error:
        weights.read(str(path))
    line = str(error.value)
    assert line.startswith(f"{path}: neither a run with checkpoints nor") and "\n" not in line
    return line


def test_a_folder_too_high_or_too_low_is_told(home):
    run = home / "logs" / "me" / "run"
    for below in (run / "checkpoints", run / "checkpoints" / "20" / "params"):
        assert refused(below).endswith(f"but a folder of {run}: give that folder")
    line = refused(run / "checkpoints" / "20")
    assert line.endswith(f"of {run}: give that folder, its checkpoint 20")
    for above in (run.parent, run.parent.parent):
        assert refused(above).endswith(f"but a folder; in it {run}: give one of them")
    for i in range(4):
        shutil.copytree(run, home / "many" / str(i), copy_function=os.link)
    assert refused(home / "many").endswith(f"{home / 'many' / '2'}, ...: give one of them")
    assert refused(home / "other").endswith("but a folder")
    (home / "empty").mkdir()
    assert refused(home / "empty").endswith("but an empty folder")
    with pytest.raises(FileNotFoundError, match="gone does not exist$"):
        generator.load(home / "gone")


def test_a_file_in_the_place_of_a_folder_is_told(home, tmp_path):
    run = home / "logs" / "me" / "run"
    (run / "metrics.jsonl").write_text("{}\n")
    assert refused(run / "metrics.jsonl").endswith(f"but a file of {run}: give that folder")
    with zipfile.ZipFile(tmp_path / "run.zip", "w") as archive:
        archive.writestr("run/checkpoints/20/config/metadata", "{}")
    assert refused(tmp_path / "run.zip").endswith("but a zip archive: unpack it")
    torch_writer.write_zip(tmp_path / "weights", {"a": np.zeros(3, np.float32)})
    assert "a file of PyTorch, which only init_from takes" in refused(tmp_path / "weights")
    (tmp_path / "model.safetensors").write_bytes(b"12345678{}")
    line = refused(tmp_path / "model.safetensors")
    assert line.endswith("a file without this project's config.json beside it")


def test_a_home_is_expanded(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    assert generator.load("~/logs/me/run", step=10).step == 10
