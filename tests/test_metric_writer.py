"""Metrics are on disk at once, and a resumed run shows neither gaps nor doubled points."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata

from run.metric_writer import MetricWriter, progress_line
from utils import files


def read_jsonl(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_events(workdir):
    """What TensorBoard's own reader makes of the folder."""
    events = EventAccumulator(str(workdir), {"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def points(workdir, name="loss"):
    return [(event.step, event.value) for event in read_events(workdir).Scalars(name)]


def test_scalars_are_on_disk_without_a_close(tmp_path):
    writer = MetricWriter(tmp_path / "new")
    writer.scalars(np.int64(10), {"loss": np.float32(0.5), "raw_loss/r=t": 1, "raw_loss/r<t": 2.0})
    writer.scalars(20, {"loss": float("nan")})
    assert read_jsonl(tmp_path / "new") == [
        {"step": 10, "loss": 0.5, "raw_loss/r=t": 1.0, "raw_loss/r<t": 2.0},
        {"step": 20, "loss": None},
    ]
    assert points(tmp_path / "new", "raw_loss/r=t") == [(10, 1.0)]
    assert points(tmp_path / "new", "raw_loss/r<t") == [(10, 2.0)]
    (first, second) = points(tmp_path / "new")
    assert first == (10, 0.5) and second[0] == 20 and np.isnan(second[1])


def test_a_resumed_run_takes_back_what_came_after(tmp_path):
    # Killed at 50 and resumed from 30, killed at 50 and resumed from 40; never closed.
    for resume_step, steps in ((0, (10, 20, 30, 40, 50)), (30, (40, 50)), (40, (50, 60))):
        writer = MetricWriter(tmp_path, resume_step=resume_step)
        for step in steps:
            writer.scalars(step, {"loss": step + resume_step})
    want = [(10, 10), (20, 20), (30, 30), (40, 70), (50, 90), (60, 100)]
    assert [(line["step"], line["loss"]) for line in read_jsonl(tmp_path)] == want
    assert points(tmp_path) == want


def test_a_run_resumed_from_its_start(tmp_path):
    for _ in range(3):  # killed before its first checkpoint
        writer = MetricWriter(tmp_path, resume_step=0)
        writer.scalars(1, {"loss": 1})
        writer.scalars(2, {"loss": 2})
    assert points(tmp_path) == [(1, 1), (2, 2)]
    assert len(read_jsonl(tmp_path)) == 2


def test_restarts_within_a_second_keep_their_files(tmp_path):
    for step in range(20):
        MetricWriter(tmp_path, resume_step=step).scalars(step + 1, {"loss": step})
    assert points(tmp_path) == [(step + 1, step) for step in range(20)]


def test_half_written_files_are_tolerated(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.scalars(10, {"loss": 1})
    writer.scalars(20, {"loss": 2})
    (events,) = tmp_path.glob("events*")
    events.write_bytes(events.read_bytes()[:-5])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    writer = MetricWriter(tmp_path, resume_step=20)
    writer.scalars(30, {"loss": 3})
    assert [line["step"] for line in read_jsonl(tmp_path)] == [10, 20, 30]
    assert [step for step, _ in points(tmp_path)] == [10, 30]
    assert not list(tmp_path.glob("unfinished-*"))


def test_without_a_resume_step_nothing_is_taken_back(tmp_path):
    MetricWriter(tmp_path).scalars(10, {"loss": 1})
    MetricWriter(tmp_path).scalars(20, {"loss": 2})
    MetricWriter(tmp_path).scalars(10, {"loss": 3})
    assert [line["step"] for line in read_jsonl(tmp_path)] == [10, 20, 10]
    assert points(tmp_path) == [(10, 1), (20, 2), (10, 3)]


def test_a_failing_cut_leaves_the_old_file(tmp_path, monkeypatch):
    MetricWriter(tmp_path).scalars(10, {"loss": 1})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", no_space)
    with pytest.raises(OSError, match="No space"):
        MetricWriter(tmp_path, resume_step=0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_images_and_texts(tmp_path):
    writer = MetricWriter(tmp_path)
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    writer.image(5, "samples", image)
    writer.image(5, "grey", image[..., :1])
    writer.text("config", "a: 1\n<b>: *2*")
    writer.hparams({"training.batch_size": 8, "sampling.num_steps": (1, 2), "load_from": None})
    writer.close()
    events = read_events(tmp_path)
    (shown,) = events.Images("samples")
    assert shown.step == 5
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(shown.encoded_image_string))), image
    )
    (grey,) = events.Images("grey")
    assert np.asarray(Image.open(io.BytesIO(grey.encoded_image_string))).shape == (2, 3, 3)
    (text,) = events.Tensors("config/text_summary")
    assert text.tensor_proto.string_val[0] == b"    a: 1\n    <b>: *2*\n"
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = hparams_metadata.parse_session_start_info_plugin_data(content).hparams
    assert hparams["training.batch_size"].number_value == 8
    assert hparams["sampling.num_steps"].string_value == "(1, 2)"
    assert hparams["load_from"].string_value == "None"
    with pytest.raises(ValueError, match="samples: expected uint8"):
        MetricWriter(tmp_path).image(5, "samples", image / 255.0)


def test_a_writer_that_is_not_enabled_does_nothing(tmp_path, capsys):
    writer = MetricWriter(tmp_path / "none", enabled=False)
    writer.scalars(1, {"loss": 1})
    writer.image(1, "samples", None)
    writer.text("config", "a")
    writer.hparams({"a": 1})
    writer.progress(1, 2, 3, {})
    writer.flush()
    writer.close()
    assert not (tmp_path / "none").exists()
    assert capsys.readouterr().out == ""


def test_closing_twice_and_after(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.close()
    writer.close()


def test_progress_line():
    metrics = {"raw_loss/r<t": 3.14159, "loss": 0.5, "grad_norm": 7, "raw_loss/r=t": 2}
    assert progress_line(250, 1000, 12.345, metrics) == (
        "step 250/1000 (25 %)  12.3 steps/s  0:01:01 left  "
        "loss 0.5  raw_loss/r=t 2  raw_loss/r<t 3.142"
    )
    assert "3 days, 0:00:01 left" in progress_line(0, 3 * 86400 + 1, 1.0, {})
    assert progress_line(5, 5, 0.0, {"loss": float("nan")}) == (
        "step 5/5 (100 %)  0 steps/s  loss nan"
    )


def test_progress_in_a_file_and_on_a_terminal(tmp_path, capsys, monkeypatch):
    writer = MetricWriter(tmp_path)
    writer.progress(1, 4, 1.0, {})
    writer.progress(2, 4, 1.0, {})
    assert capsys.readouterr().out == (
        "step 1/4 (25 %)  1 steps/s  0:00:03 left\nstep 2/4 (50 %)  1 steps/s  0:00:02 left\n"
    )

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "15")
    writer.progress(3, 4, 1.0, {})
    writer.progress(4, 4, 1.0, {})
    writer.close()
    assert terminal.getvalue() == "\rstep 3/4 (75 %\033[K\rstep 4/4 (100 \033[K\n"
