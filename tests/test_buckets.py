"""Data, runs and weights in a bucket, against servers on this machine; no address is a folder."""

import os
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import bucket
import numpy as np
import pytest
from jobs import CLASSES, SHAPE, STEPS_ALONE, Jobs, assert_equal_runs, write_records

import main
from run import best, checkpoint, layout, results
from run.metric_writer import MetricWriter
from scripts import export_checkpoint, prepare_dataset
from scripts.compare import __main__ as compare_command
from utils import buckets, dataset, files, mirrors

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def server():
    """Address of a server with an empty bucket, where the libraries find it."""
    with bucket.started() as url, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment(url).items():
            patch.setenv(name, value)
        yield url


@pytest.fixture
def root(server, request, tmp_path, monkeypatch):
    """A folder in the bucket of the test's own, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return files.path(f"gs://{bucket.BUCKET}/{request.node.name}")


def key(path):
    return str(path).removeprefix(f"gs://{bucket.BUCKET}/")


# Addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["s3://b/x", "az://b", "hf://a", "http://h/x", "gs:/b/x", "gs://"])
def test_no_path_is_made_of_any_other_address(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="gs://BUCKET"):
        files.path(name)
    assert prepare_dataset.main(["digits", f"--output={name}"]) == 1
    assert export_checkpoint.main([f"--from={tmp_path}", f"--to={name}"]) == 1
    with pytest.raises(SystemExit):
        compare_command.main([str(tmp_path), f"--html={name}"])
    lines = capsys.readouterr().err.splitlines()
    assert sum("gs://BUCKET" in line for line in lines) == 3, lines
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["dataset.root", "load_from", "fid.cache_ref", "dataset.vae"])
def test_options_refuse_other_addresses_before_anything_is_done(option, tmp_path, capsys):
    words = [f"--workdir={tmp_path / 'run'}", "--config=configs/load_config.py:digits"]
    assert main.main([*words, f"--config.{option}=s3://bucket/x"]) == 2
    assert f"{option} names a place that cannot be read" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_said_in_one_line(server, monkeypatch):
    with pytest.raises(OSError, match="gs://other/x: there is no such bucket"):
        files.check_writable(files.path("gs://other/x"))
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    buckets.filesystem.cache_clear()
    with pytest.raises(ValueError, match="pip install -r requirements-gcs.txt"):
        files.path("gs://bucket/x")


def test_a_bucket_that_does_not_answer_is_told_in_time(root, monkeypatch):
    monkeypatch.setattr(buckets, "ANSWER", 0.2)
    monkeypatch.setattr(type(root), "write_bytes", lambda *_: time.sleep(2))
    with pytest.raises(OSError, match="no answer within 0.2 s"):
        files.check_writable(root)


def test_what_cannot_be_asked_is_not_taken_for_missing(root, monkeypatch):
    """Else a run would begin anew over its checkpoints, and its log over what was written."""
    mirrors.add(root / "log")  # opened once, as etils opens its own

    async def refuse(*_, **__):
        raise aiohttp.ServerDisconnectedError

    monkeypatch.setattr(type(buckets.filesystem()).__mro__[1], "_info", refuse)  # of both
    asked = (
        lambda: layout.steps(root), lambda: files.names(root), lambda: root.exists(),
        lambda: mirrors._Mirror().add(root / "log"),
    )  # fmt: skip
    for ask in asked:
        with pytest.raises((OSError, aiohttp.ClientError)):
            ask()


@pytest.mark.parametrize(
    "words",
    [
        ["main.py", "--workdir=gs://bucket/run"],
        ["main.py", "--workdir={}/run", "--config.dataset.root=gs://bucket/set"],
        ["-m", "scripts.export_checkpoint", "--from=gs://bucket/run", "--to={}/exported"],
    ],
)
def test_access_that_is_denied_is_said_in_one_line(words, tmp_path, run_python):
    words = [word.format(tmp_path) for word in words]
    if words[0] == "main.py":
        words.append("--config=configs/load_config.py:digits")
    with bucket.through(lambda number: "403") as url:
        done = run_python(words, devices=1, env=bucket.environment(url), check=False)
    assert done.returncode == 1
    assert "access is denied (no right to it)" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "exported").exists()


# The verbs ------------------------------------------------------------------------------------


def test_files_in_a_bucket_are_whole_or_not_there(root):
    files.make_folder(root)
    with pytest.raises(KeyError), files.complete(root / "a") as unfinished:
        unfinished.write_text("half")
        raise KeyError
    assert files.names(root) == set()
    files.write_text(root / "a", "ä")
    with files.complete(root / "folder") as unfinished:
        unfinished.mkdir()
        (unfinished / "b").write_text("b")
    assert files.names(root) == {"a", "folder"} and files.size(root / "a") == 2
    assert files.move(root / "folder", root / "moved") == root / "moved"
    files.link(root / "moved", root / "again")
    assert files.names(root) == {"a", "moved", "again"}
    assert (root / "again" / "b").read_text() == "b"
    for name in ("a", "moved", "again", "never"):
        files.remove(root / name)
    assert files.names(root) == set()


def test_an_answer_that_is_lost_loses_no_object(monkeypatch):
    """The answer to the last piece of an upload may come for the second time as a 404."""
    with bucket.through() as url:
        for name, value in bucket.environment(url).items():
            monkeypatch.setenv(name, value)
        root = files.path(f"gs://{bucket.BUCKET}/lost")
        bucket.Proxy.fault = staticmethod(
            lambda number: "cut" if bucket.Proxy.counts.get("POST write", 0) % 2 else ""
        )
        for text in ("a", ""):
            (root / "small").write_text(text)
            assert (root / "small").read_text() == text
        assert bucket.Proxy.counts["POST write"] == 4  # one each, and once again
        bucket.Proxy.fault = staticmethod(lambda number: "")
        large = np.random.default_rng(0).bytes(6 << 20)
        (root / "large").write_bytes(large)
        with (root / "pieces").open("wb") as file:
            for start in range(0, len(large), 1 << 20):
                file.write(large[start : start + (1 << 20)])
        assert bucket.get(url, "lost/large") == bucket.get(url, "lost/pieces") == large


def test_an_upload_that_cannot_begin_leaves_nothing(root, monkeypatch):
    def refuse(self):
        raise OSError("no session")

    monkeypatch.setattr(type(buckets.filesystem().open(str(root), "wb")).__mro__[1],
                        "_initiate_upload", refuse)  # fmt: skip
    with pytest.raises(OSError, match="no session"), (root / "pieces").open("wb") as file:
        for _ in range(8):
            file.write(bytes(1 << 20))
    assert not (root / "pieces").exists()


def test_what_others_write_is_seen(server, root):
    """gcsfs keeps listings for ever: a folder read once would stand still, an object be cut."""
    bucket.put(server, key(root / "a"), b"1")
    assert files.names(root) == {"a"} and not (root / "b").exists()
    bucket.put(server, key(root / "a"), b"longer than before")
    bucket.put(server, key(root / "b"), b"2")
    assert files.names(root) == {"a", "b"} and (root / "b").exists()
    assert (root / "a").read_bytes() == b"longer than before"


def test_what_makes_a_folder_complete_is_written_last(root, monkeypatch):
    done, put = [], buckets.filesystem().put_file
    monkeypatch.setattr(buckets.filesystem(), "put_file", lambda a, b: (done.append(b), put(a, b)))
    with files.complete(root / "8") as unfinished:
        for name in ("commit_success.txt", "params/commit_success.txt", "params/x", "z"):
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / name).write_text(name)
    assert [name.rpartition("/8/")[2] for name in done] == [
        "params/x", "z", "params/commit_success.txt", "commit_success.txt"
    ]  # fmt: skip


def test_what_grows_is_put_into_the_bucket_and_fetched_again(server, root, monkeypatch):
    monkeypatch.setattr(mirrors, "EVERY", 0.05)
    mirror = mirrors._Mirror()
    bucket.put(server, key(root / "log"), b"before\n")
    local = mirror.add(root / "log")
    with local.open("a") as file:
        file.write("after\n")
    for _ in range(100):
        if bucket.get(server, key(root / "log")) == b"before\nafter\n":
            break
        time.sleep(0.05)
    assert bucket.get(server, key(root / "log")) == b"before\nafter\n"
    assert mirror.add(root / "log") == local
    mirror.finish()


def test_an_output_of_another_machine_stays_in_front(server, root, tmp_path):
    """launch.sh writes on the machine's own disk: a new one knows nothing of the start before."""
    bucket.put(server, key(root / "output.log"), b"first start\n")
    (tmp_path / "output.log").write_text("second start\n")
    mirror = mirrors._Mirror()
    mirror.add(root / "output.log", tmp_path / "output.log")
    mirror.put()
    assert bucket.get(server, key(root / "output.log")) == b"first start\nsecond start\n"
    mirror.finish()
    again = mirrors._Mirror()  # on the same machine the file holds all of it
    (tmp_path / "output.log").write_text("first start\nsecond start\nthird\n")
    again.add(root / "output.log", tmp_path / "output.log")
    again.put()
    assert bucket.get(server, key(root / "output.log")).splitlines()[2:] == [b"third"]
    again.finish()


# Copies ---------------------------------------------------------------------------------------


def test_copies_are_compared_and_mended(server, root, caplog):
    for name in ("train/a", "train/b", "val/c"):
        bucket.put(server, key(root / name), name.encode() * 100)
    local = files.local(root, wanted=lambda name: not name.startswith("val"))
    assert {p.name for p in local.rglob("*") if p.is_file()} == {"a", "b"}
    fetched, get = [], buckets.filesystem().get_file

    def noted(source, target):
        fetched.append(source.rpartition("/")[2])
        get(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets.filesystem(), "get_file", noted)
        files.local(root)
        assert fetched == ["c"]
        bucket.put(server, key(root / "train/b"), b"new")  # by another program
        (local / "train/a").write_bytes(b"cut")
        (local / "train/unfinished-a-1-2").write_bytes(b"of a process that was killed")
        assert files.local(root) == local
        assert sorted(fetched) == ["a", "b", "c"]
    assert files.names(local / "train") == {"a", "b"}
    assert (local / "train/b").read_bytes() == b"new"
    assert (local / "train/a").read_bytes() == b"train/a" * 100


def test_a_copy_that_does_not_arrive_whole_is_no_copy(server, root, monkeypatch):
    bucket.put(server, key(root / "a"), b"12345")
    monkeypatch.setattr(
        buckets.filesystem(), "get_file", lambda source, target: Path(target).write_bytes(b"12344")
    )
    with pytest.raises(OSError, match="did not arrive whole"):
        files.local(root)
    monkeypatch.undo()
    assert files.local(root / "a").read_bytes() == b"12345"


@pytest.mark.parametrize("stage", ["cache", "none", "folder"])
def test_records_in_a_bucket_are_those_of_a_folder(root, tmp_path, stage):
    here = write_records(tmp_path / "records")
    buckets.upload(here, root)
    ours = dataset.open_records(here)
    theirs = dataset.open_records(root, stage=str(tmp_path / "s") if stage == "folder" else stage)
    index = np.arange(ours.num_records)
    for name, array in ours.read(index).items():
        np.testing.assert_array_equal(theirs.read(index)[name], array)
    assert theirs.identity == ours.identity and str(theirs.root) == str(root)
    assert (tmp_path / "s").exists() == (stage == "folder")


def test_a_preparation_writes_into_a_bucket_and_goes_on(root, tmp_path, capsys):
    pixels = np.random.RandomState(0).randint(0, 256, (6, *SHAPE), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels)
    from PIL import Image

    for i, image in enumerate(pixels):
        (tmp_path / "set" / str(i % CLASSES)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(tmp_path / "set" / str(i % CLASSES) / f"{i}.png")
    words = ["images", f"--input={tmp_path / 'set'}", "--image_size=4", "--vae=none"]
    words += ["--records_per_shard=2", "--preview=2", "--workers=1"]
    assert prepare_dataset.main([*words, f"--output={root}", "--num_processes=2"]) == 0
    assert not dataset.is_dataset(root)
    assert prepare_dataset.main([*words, f"--output={root}"]) == 0
    assert prepare_dataset.main([*words, f"--output={tmp_path / 'here'}"]) == 0
    assert dataset.open_records(root).identity == dataset.open_records(tmp_path / "here").identity
    assert "preview.png" in files.names(root)
    assert prepare_dataset.main([*words, f"--output={root}", "--overwrite"]) == 1
    assert "names in a bucket cannot be changed" in capsys.readouterr().err


# Runs -----------------------------------------------------------------------------------------


def test_the_log_of_a_run_goes_on(server, root):
    writer = MetricWriter(root, resume_step=0)
    for step in (1, 2, 3):
        writer.scalars(step, {"loss": step})
    writer.close()
    with_half = bucket.get(server, key(root / layout.METRICS)) + b'{"step": 4, "lo'
    bucket.put(server, key(root / layout.METRICS), with_half)
    mirrors._mirror._known.clear()  # another process
    writer = MetricWriter(root, resume_step=2)
    writer.scalars(3, {"loss": 30})
    writer.close()
    lines, broken = layout.metric_lines(root)
    assert [line["loss"] for line in lines] == [1, 2, 30] and not broken
    assert sum("tfevents" in name for name in files.names(root)) == 2


def test_tensorboard_sees_what_comes_later(server, root, tmp_path):
    """With FSSPEC_GS as docs/pods.md has it; started before the later points are written."""
    writer = MetricWriter(root)
    writer.scalars(1, {"loss": 1})
    writer.flush()
    code = f"""
import sys
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
events = EventAccumulator({str(root)!r})
for _ in range(2):
    events.Reload()
    print(len(events.Tensors("loss")), flush=True)
    sys.stdin.readline()
"""
    setting = {"FSSPEC_GS": '{"use_listings_cache": false}'}
    reader = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | setting,
    )  # fmt: skip
    assert reader.stdout.readline() == "1\n"
    for step in range(2, 20):
        writer.scalars(step, {"loss": step})
    writer.close()
    out, _ = reader.communicate("\n\n", timeout=60)
    assert out == "19\n"


def test_results_best_and_damage_in_a_bucket(root, tmp_path):
    results.save(root, {"fid": 2.0, "weights": "ema"})
    results.save(root, {"fid": 1.0, "weights": "ema"})
    assert [r["fid"] for r in results.load(root)] == [1.0]
    with checkpoint.Checkpointer(root) as writer:
        for step in (1, 2):
            writer.write(step, {"params": {"w": np.full(3, step, np.float32)}}, {"data": {}})
    assert layout.steps(root) == [1, 2]
    best.keep_best(root, 1, "fid", 2.0)
    best.keep_best(root, 2, "fid", 1.0)
    assert layout.steps(root / layout.BEST) == [2]
    files.remove(layout.folder(root) / "2" / layout.COMMITTED)
    assert layout.steps(root) == [1]  # one that was cut off does not count
    assert checkpoint.set_aside(root, 1).name == "damaged-1" and layout.steps(root) == []


def test_a_run_from_bucket_to_bucket_is_that_of_folders(root, tmp_path, monkeypatch):
    jobs = Jobs(tmp_path / "jobs")
    buckets.upload(jobs.records, root / "records")
    options = STEPS_ALONE | {"training.checkpoint_per_step": 6, "training.num_steps": 9}
    jobs.run_here(tmp_path / "whole", options)
    there = options | {"dataset.root": root / "records", "training.profile_steps": "3,4"}
    output = tmp_path / "output.log"
    output.write_text("said\n")
    monkeypatch.setenv("MEANFLOW_OUTPUT", str(output))
    for steps in (6, 9):
        jobs.run_here(root / "run", there | {"training.num_steps": steps})
    assert (root / "run" / "output.log").read_text() == "said\n"
    copy = files.local(root / "run")
    for folder in (copy, tmp_path / "whole"):
        (folder / "results.json").write_text("[]")
    assert_equal_runs(tmp_path / "whole", copy)
    names = {"config.yml", "requirements.lock", "metrics.jsonl", "checkpoints"}
    assert names <= files.names(root / "run") and ".lock" not in files.names(root / "run")
    assert not Path(ROOT, "gs:").exists()
    assert any(path.name.endswith(".xplane.pb") for path in (copy / "profile").rglob("*"))
    exported = export_checkpoint.export(root / "run", f"{root}/exported", form="safetensors")
    assert files.names(exported) >= {"config.json", "model.safetensors"}
    with pytest.raises(FileExistsError, match="there already"):
        export_checkpoint.export(root / "run", f"{root}/exported", form="safetensors")
    published = export_checkpoint.export(root / "run", root / "published", form="orbax")
    assert files.is_remote(published) and files.names(published) == {"checkpoint"}
    back = export_checkpoint.export(published, tmp_path / "back", form="msgpack")
    same = export_checkpoint.export(tmp_path / "whole", tmp_path / "same", form="msgpack")
    assert back.read_bytes() == same.read_bytes()
    assert compare_command.main([f"{root}/run", f"--html={root}/page.html"]) == 0
    assert files.size(root / "page.html") > 1000
