"""Limits of the system are told as what they are; what is overwritten stays until then."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jobs import write_records
from test_folders import folder, prepare, read

from run import checkpoint
from scripts import prepare_dataset
from scripts.prepare import shards
from utils import dataset, files, record_files

ROOT = Path(__file__).resolve().parent.parent

# 60 shards, and 40 files may be open; then none.
FEW_FILES = """
import os, resource, sys
import numpy as np
from utils import dataset
dataset.open_records(sys.argv[1])  # brings the modules
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 200))
dataset.open_records(sys.argv[1])
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
records = dataset.open_records(sys.argv[1])
print(records.read(np.arange(records.num_records))["label"].tolist())
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) - 1, 40))
try:
    for i in range(60):
        records.read(np.arange(i, i + 1))
except OSError as error:
    print(error)
"""


def test_more_shards_than_files_may_be_open(tmp_path):
    folder(tmp_path / "set", a=30, b=30)
    assert prepare(tmp_path / "set", tmp_path / "out", "--records_per_shard=1") == 0
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    raised, labels, refused = done.stdout.splitlines()
    assert int(raised) == 200  # the limit that a process may raise is raised
    assert labels == str([0] * 30 + [1] * 30)
    assert "-of-00060 cannot be read: Too many open files" in refused
    assert "may have" in refused and "damaged" not in refused and "delete" not in refused


def test_readers_are_shared_closed_and_opened_again(tmp_path):
    root = write_records(tmp_path / "set")
    records = dataset.open_records(root)
    records = dataclasses.replace(records, readers=record_files.Readers(records.shard_paths, 1))
    first = records.readers.get(0)
    assert records.readers.get(0) is first
    np.testing.assert_array_equal(
        records.read(np.arange(40))["label"], records.read(np.arange(39, -1, -1))["label"][::-1]
    )
    assert list(records.readers._open) == [0]
    assert first.num_records() == 20  # still held by us


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files (this process may"),
        (RuntimeError("open() failed: Permission denied; opening /x"), "Permission denied"),
        (ValueError("INTERNAL: Stale file handle [tensorstore_spec='...']"), "Stale file handle"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (MemoryError(), "the memory is full"),
        (ValueError("Invalid data: crc32c mismatch"), ""),
        (OSError("cannot identify image file"), ""),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), ""),
    ],
)
def test_what_the_system_says_is_known_from_damage(tmp_path, error, reason):
    assert files.system_reason(error).startswith(reason)
    assert bool(files.system_reason(error)) == bool(reason)
    try:
        raise ValueError("of the library") from error
    except ValueError as outer:
        assert files.system_reason(outer).startswith(reason)
    kind = OSError if reason else ValueError
    with pytest.raises(kind) as told, files.reading("a.npz", "damaged"):
        raise error
    assert str(told.value).startswith("a.npz") and ("damaged" in str(told.value)) == (not reason)
    with pytest.raises(OSError if reason else checkpoint.DamagedError):
        with checkpoint._damage(tmp_path, 1):
            raise error
    found = record_files.unreadable(tmp_path / "shard", error)
    assert isinstance(found, kind) and ("delete" in str(found)) == (not reason)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become someone else")
def test_no_permission_is_no_damage(tmp_path):
    root = write_records(tmp_path / "set")
    for path in (*tmp_path.parents, tmp_path, root):
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)
    dataset.open_records(root)
    dataset.shard_path(root, "train", 1, 2).chmod(0)
    os.seteuid(12345)
    try:
        with pytest.raises(OSError, match="00001-of-00002 cannot be read: Permission denied"):
            dataset.open_records(root)
    finally:
        os.seteuid(0)


def test_a_full_disk_is_told_by_name_and_leaves_nothing(tmp_path):
    path = tmp_path / "samples.npz"
    path.write_text("before")
    with pytest.raises(OSError, match=r"samples\.npz cannot be written: No space left.*make room"):
        with files.complete(path) as unfinished:
            unfinished.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [p.name for p in tmp_path.iterdir()] == ["samples.npz"] and path.read_text() == "before"
    with pytest.raises(OSError, match="other.npz"):  # another file's trouble keeps its name
        with files.complete(path):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), "other.npz")


# Overwriting -----------------------------------------------------------------------------------


def contents(output):
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


def test_what_is_overwritten_stays_until_the_new_one_is_whole(tmp_path, capsys):
    source, output = folder(tmp_path / "set", a=3, b=2), tmp_path / "out"
    assert prepare(source, output, "--records_per_shard=2") == 0
    (output / "mine.txt").write_text("not ours")
    before = contents(output)
    (source / "b" / "im9.png").write_text("no picture")
    assert prepare(source, output, "--overwrite", "--records_per_shard=1") == 1
    assert contents_of_files(output) == before
    assert read(output)[1] == [0, 0, 0, 1, 1]
    (source / "b" / "im9.png").unlink()
    folder(source, c=1)
    assert prepare(source, output, "--overwrite", "--records_per_shard=1") == 0
    assert read(output)[1] == [0, 0, 0, 1, 1, 2]
    assert (output / "mine.txt").exists() and not list(output.glob("unfinished*"))
    fresh = tmp_path / "fresh"
    assert prepare(source, fresh, "--records_per_shard=1") == 0
    assert contents(fresh) == {k: v for k, v in contents(output).items() if k != "mine.txt"}


def contents_of_files(output):
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.is_file()}


@pytest.mark.parametrize("after", range(1, 9))
def test_cut_off_while_taking_its_place_it_is_never_mixed(tmp_path, after):
    """Killed after so many of the renames and removals, the same command or one without
    --overwrite ends with the whole new dataset, or with one of the old plan."""
    source, output = folder(tmp_path / "set", a=3), tmp_path / "out"
    assert prepare(source, output, "--records_per_shard=2") == 0
    old = contents(output)
    take = shards._take_place
    with pytest.MonkeyPatch.context() as patch:

        def cut(output):
            left = iter(range(after))

            def dying(real):
                def act(*arguments, **more):
                    if next(left, None) is None:
                        raise KeyboardInterrupt
                    return real(*arguments, **more)

                return act

            patch.setattr(os, "replace", dying(os.replace))
            patch.setattr(Path, "unlink", dying(Path.unlink))
            return take(output)

        patch.setattr(shards, "_take_place", cut)
        prepare(source, output, "--overwrite", "--records_per_shard=1")
    if there := [path.name[-5:] for path in output.glob("records-*")]:
        size = json.loads((output / shards.PLAN).read_text())["records_per_shard"]
        assert set(there) == {"00002" if size == 2 else "00003"}
    if not dataset.is_dataset(output):
        plan = (output / shards.PLAN).exists()
        size = 2 if plan and '"records_per_shard": 2' in (output / shards.PLAN).read_text() else 1
        assert prepare(source, output, f"--records_per_shard={size}") == 0
    found = contents_of_files(output)
    fresh = tmp_path / "fresh"
    assert prepare(source, fresh, "--records_per_shard=1") == 0
    found = {k: v for k, v in found.items() if not k.startswith("unfinished")}
    assert found in (old, contents(fresh))


def test_overwriting_other_kinds_of_sets(tmp_path):
    """The digits, which have no plan, are replaced too where that is asked for."""
    assert prepare_dataset.main(["digits", f"--output={tmp_path / 'out'}"]) == 0
    source = folder(tmp_path / "set", a=2)
    assert prepare(source, tmp_path / "out") == 1
    assert prepare(source, tmp_path / "out", "--overwrite") == 0
    assert read(tmp_path / "out")[1] == [0, 0]
