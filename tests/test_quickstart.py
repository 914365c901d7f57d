"""The jobs as a user starts them: train, go on, evaluate, sample, and what is refused."""

import json

import numpy as np
import pytest
from jobs import ALONE
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import main
from metrics import distances, reference
from run import results as stored
from scripts import evaluate_images, prepare_dataset

TINY = [
    "--config.model.depth=1",
    "--config.model.hidden_size=32",
    "--config.training.batch_size=32",
    "--config.training.num_steps=30",
    "--config.training.log_per_step=10",
    "--config.training.sample_steps=",
    "--config.training.learning_rate=0.01",
    "--config.fid.num_samples=100",
    "--config.fid.device_batch_size=24",
]
EVAL = ["--config.eval_only", "--config.fid.weights=ema,params", "--config.sampling.num_steps=1,2"]


def arguments(workdir, *options):
    config = "--config=configs/load_config.py:digits"
    return [f"--workdir={workdir}", config, *TINY, *options, ALONE]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    assert prepare_dataset.main(["digits", "--output", str(root / "digits")]) in (0, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_ROOT", str(root))
        yield root


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_root):
    """The workdir of a short run that has come to its end."""
    workdir = tmp_path_factory.mktemp("run")
    assert main.main(arguments(workdir)) == 0
    return workdir


def test_a_run_leaves_everything_behind(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    losses = [line["raw_loss/all"] for line in lines if "raw_loss/all" in line]
    assert [line["step"] for line in lines if "loss" in line] == [10, 20, 30]
    assert losses[-1] < losses[0]
    assert lines[-1]["fid@100/ema_1step"] > 0
    assert [path.name for path in (finished / "checkpoints").iterdir() if path.name.isdigit()] == [
        "30"
    ]
    grid = Image.open(finished / "samples" / "grid_00000030.png")
    assert grid.size == (360, 360) and grid.mode == "L"  # ten classes, ten columns, framed
    (result,) = json.loads((finished / "results.json").read_text())
    assert result["evaluator"] == "meanflow, but features pixels" and result["num_samples"] == 100
    assert list(finished.glob("events*"))


def test_the_same_command_says_that_it_is_finished(finished, caplog):
    before = (finished / "metrics.jsonl").read_text()
    with caplog.at_level("INFO"):
        assert main.main(arguments(finished)) == 0
    assert "finished: step 30 of 30" in caplog.text
    assert (finished / "metrics.jsonl").read_text() == before


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("evaluated")
    assert main.main(arguments(workdir, *EVAL, f"--config.load_from={finished}")) == 0
    results = json.loads((workdir / "results.json").read_text())
    (line,) = (workdir / "evaluation" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 30} | stored.scalars(results)
    return results


def test_evaluation_gives_a_table(evaluated, finished):
    header, *lines = stored.table(evaluated).splitlines()
    assert header.split() == ["weights", "sampler", "steps", "fid"]
    assert [line.split() for line in lines] == [
        [r["weights"], "ode", str(r["num_steps"]), f"{r['fid']:.4f}"]
        for r in sorted(evaluated, key=lambda r: r["fid"])
    ]
    keys = [(result["weights"], result["num_steps"]) for result in evaluated]
    assert keys == [("ema", 1), ("ema", 2), ("params", 1), ("params", 2)]
    assert len({result["fid"] for result in evaluated}) == 4
    (trained,) = json.loads((finished / "results.json").read_text())
    assert evaluated[0]["fid"] == pytest.approx(trained["fid"], rel=1e-6)
    assert evaluated[0]["checkpoint_step"] == 30


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_the_number_of_devices_does_not_change_the_result(
    finished, evaluated, tmp_path, run_python, devices
):
    """Nor does the batch size: 100 samples fill neither 24 nor 8 x 6 images evenly."""
    options = [*EVAL, f"--config.load_from={finished}", f"--config.fid.device_batch_size={devices}"]
    run_python(["main.py", *arguments(tmp_path, *options)], devices=devices)
    found = json.loads((tmp_path / "results.json").read_text())
    for a, b in zip(found, evaluated, strict=True):
        assert a["fid"] == pytest.approx(b["fid"], rel=1e-5)


@pytest.mark.slow
def test_several_cpu_devices_never_wait_for_each_other_for_ever(data_root, tmp_path, run_python):
    """In long rows of steps and of batches, of which the host asks for no result."""
    options = ["--config.training.num_steps=400", "--config.training.log_per_step=400"]
    options += ["--config.training.checkpoint_per_epoch=100", "--config.fid.num_samples=1600"]
    options += ["--config.training.sample_per_epoch=100", "--config.fid.device_batch_size=2"]
    run_python(["main.py", *arguments(tmp_path, *options)], devices=2)


def test_evaluation_needs_no_data_where_there_is_a_reference(finished, evaluated, tmp_path):
    images = load_digits().images.reshape(-1, 64)
    pixels = np.round(images * 255 / 16) / 255
    stats = tmp_path / "stats.npz"
    reference.save_reference(stats, pixels.mean(0), np.cov(pixels, rowvar=False))
    options = ["--config.eval_only", f"--config.load_from={finished}"]
    options += [f"--config.fid.cache_ref={stats}", "--config.dataset.root=nowhere"]
    assert main.main(arguments(tmp_path, *options)) == 0
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert result["fid"] == pytest.approx(evaluated[0]["fid"], rel=1e-5)


def test_sampling_draws_the_classes_asked_for(finished, tmp_path, capsys):
    options = ["--config.sample_only", f"--config.load_from={finished}"]
    options += ["--config.sampling.labels=3,1,4", "--config.sampling.num_images=7"]
    assert main.main(arguments(tmp_path, *options)) == 0
    folder = tmp_path / "samples" / "step_30"
    names = sorted(path.name for path in folder.glob("0*.png"))
    assert names == [f"{i:06d}_class{label}.png" for i, label in enumerate([3, 1, 4, 3, 1, 4, 3])]
    assert Image.open(folder / names[0]).size == (8, 8)
    assert main.main(arguments(tmp_path, *options, "--config.sampling.format=npz")) == 0
    with np.load(folder / "samples.npz") as file:
        assert file["arr_0"].shape == (7, 8, 8, 1) and file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_1"], [3, 1, 4, 3, 1, 4, 3])
        np.testing.assert_array_equal(
            file["arr_0"][0], np.array(Image.open(folder / names[0]))[..., None]
        )
    scored = ["--config=configs/load_config.py:digits", f"--images={folder / 'samples.npz'}"]
    capsys.readouterr()
    assert evaluate_images.main(scored) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["num_samples"] == 7
    # So is the folder of the job's pictures, its grid left out, and with statistics without data.
    scored[1] = f"--images={folder}"
    assert evaluate_images.main(scored) == 0
    assert json.loads(capsys.readouterr().out)["fid"] == pytest.approx(result["fid"])
    stats = tmp_path / "stats.npz"
    reference.save_reference(stats, np.zeros(64), np.eye(64))
    scored += [f"--config.fid.cache_ref={stats}", "--config.dataset.root=YOUR_DATA_ROOT"]
    assert evaluate_images.main(scored) == 0
    Image.new("RGB", (8, 8)).save(folder / "colour.png")
    assert evaluate_images.main(scored) == 1
    said = capsys.readouterr().err  # all are colour then, and the statistics are not of such
    assert "describes 64 features, pixels in [0, 1] has 192" in said


BAD = {
    "missing dataset": (["--config.dataset.root=nowhere"], "nowhere"),
    "another image size": (["--config.dataset.image_size=16"], "image_size"),
    "other classes": (["--config.dataset.num_classes=5"], "num_classes"),
    "latents expected": (["--config.dataset.vae=mse", "--config.fid.on_training=false"], "key"),
    "a batch larger than the data": (["--config.training.batch_size=4000"], "batch_size"),
    "no checkpoint": (["--config.eval_only", "--config.load_from=nowhere"], "nowhere"),
    "no such class": (["--config.sample_only", "--config.sampling.labels=11"], "sampling.labels"),
    "an unknown option": (["--config.training.batchsize=4"], "training.batch_size"),
}


@pytest.mark.parametrize("options, named", BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_line(data_root, tmp_path, capsys, options, named):
    workdir = tmp_path / "run"
    status = main.main(arguments(workdir, *options))
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status in (1, 2) and len(lines) == 1 and named in lines[0], err
    assert "Traceback" not in err
    assert not list(workdir.glob("checkpoints/*"))


def test_weights_of_another_model_are_refused(finished, tmp_path, capsys):
    options = ["--config.eval_only", f"--config.load_from={finished}"]
    options += ["--config.model.hidden_size=64"]
    assert main.main(arguments(tmp_path, *options)) == 2
    err = capsys.readouterr().err
    assert "belong to model.hidden_size 32, not 64" in err and "(33, 32)" not in err


def test_a_workdir_that_cannot_be_written_is_refused(data_root, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main.main(arguments(tmp_path / "file" / "run")) == 1
    assert "--workdir" in capsys.readouterr().err


def test_a_batch_that_devices_cannot_share_is_refused(data_root, tmp_path, run_python):
    argv = ["main.py", *arguments(tmp_path / "run", "--config.training.batch_size=12")]
    done = run_python(argv, devices=8, check=False)
    assert done.returncode == 1 and "error: training.batch_size: 12 rows" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("half_precision", [False, True])
def test_the_figures_of_the_quickstart(data_root, tmp_path, half_precision):
    """One-step samples: Frechet distance at most 0.6, at least 97 % read as their class."""
    argv = [f"--workdir={tmp_path}", "--config=configs/load_config.py:digits"]
    argv += [f"--config.training.half_precision={half_precision}"]
    assert main.main(argv) == 0
    argv += ["--config.sample_only", "--config.sampling.num_images=2000"]
    assert main.main([*argv, "--config.sampling.format=npz"]) == 0
    digits = load_digits()
    reader = LogisticRegression(max_iter=2000).fit(digits.data / 16, digits.target)
    (samples,) = (tmp_path / "samples").glob("*/samples.npz")
    with np.load(samples) as file:
        pixels, labels = file["arr_0"].reshape(-1, 64) / 255, file["arr_1"]
    real = digits.data / 16
    distance = distances.frechet_distance(
        pixels.mean(0), np.cov(pixels, rowvar=False), real.mean(0), np.cov(real, rowvar=False)
    )
    accuracy = reader.score(pixels, labels)
    print(f"half_precision {half_precision}: distance {distance:.4f}, accuracy {accuracy:.4f}")
    assert distance <= 0.6 and accuracy >= 0.97
