"""Runs on file systems that cannot rename folders, as buckets are mounted by default."""

import errno
import os
from pathlib import Path

import pytest
from jobs import STEPS_ALONE, Jobs, checkpoints, metrics

from run import best, checkpoint, layout, workdirs
from utils import files


@pytest.fixture
def mount(tmp_path, monkeypatch):
    """A folder below which folders that hold something cannot be renamed, as gcsfuse answers."""
    root = tmp_path / "mount"
    root.mkdir()

    def refusing(rename):
        def wrapped(source, target, **more):
            path = Path(source)
            if root in path.parents and path.is_dir() and any(path.iterdir()):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), source, None, target)
            return rename(source, target, **more)

        return wrapped

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    return root


def test_a_run_where_folders_cannot_be_renamed(mount, tmp_path, caplog):
    jobs = Jobs(tmp_path / "jobs")
    options = STEPS_ALONE | {"training.checkpoint_per_step": 6, "training.num_steps": 9}
    jobs.run_here(tmp_path / "whole", options)
    assert not (tmp_path / "whole" / layout.NO_RENAMES).exists() and not caplog.text
    jobs.run_here(mount / "run", options | {"training.num_steps": 6})
    assert "folders cannot be renamed there" in caplog.text and "ulimit" not in caplog.text
    cut = layout.folder(mount / "run") / "8"  # what a run leaves that is killed while it saves
    cut.mkdir()
    (cut / "params").write_text("half")
    assert layout.steps(mount / "run") == [6]
    jobs.run_here(mount / "run", options)
    one, other = checkpoints(tmp_path / "whole"), checkpoints(mount / "run")
    assert one.keys() == other.keys() and layout.steps(mount / "run") == [6, 9]
    assert all(str(one[key]) == str(other[key]) for key in one)
    assert metrics(tmp_path / "whole") == metrics(mount / "run")
    best.keep_best(mount / "run", 9, "fid", 1.0)
    assert layout.steps(mount / "run" / layout.BEST) == [9]
    assert checkpoint.set_aside(mount / "run", 9).name == "damaged-9"
    assert layout.steps(mount / "run") == [6]


def test_folders_appear_whole_without_renames(mount):
    with files.complete(mount / "a") as unfinished:
        (unfinished / "b" / "c").mkdir(parents=True)
        (unfinished / "b" / "d").write_text("d")
    assert files.names(mount) == {"a"} and (mount / "a" / "b" / "c").is_dir()
    assert (mount / "a" / "b" / "d").read_text() == "d"


def test_a_note_is_made_once_and_only_where_it_is_needed(mount, tmp_path, caplog):
    workdirs.note_renames(tmp_path)
    assert files.names(tmp_path) == {"mount"}
    workdirs.note_renames(mount)
    workdirs.note_renames(mount)
    assert files.names(mount) == {layout.NO_RENAMES} and len(caplog.records) == 1


def test_output_log_is_that_of_process_0(tmp_path, monkeypatch):
    for host in ("a", "b"):
        (tmp_path / f"output.{host}.log").write_text(host)
        monkeypatch.setenv("MEANFLOW_OUTPUT", str(tmp_path / f"output.{host}.log"))
        workdirs.follow_output(tmp_path)
        assert (tmp_path / "output.log").read_text() == host
    (tmp_path / "output.log").unlink()
    (tmp_path / "output.log").write_text("of before")
    workdirs.follow_output(tmp_path)
    assert (tmp_path / "output.log").read_text() == "of before"
