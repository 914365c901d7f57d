"""Metrics of samples beside their truth, and metrics of one's own in a run."""

import json
import types

import jobs
import numpy as np
import pytest

import generator
import sample
from metrics import evaluators, own, pairs
from models import frozen
from run import results
from scripts import evaluate_images, prepare_dataset

RNG = np.random.default_rng(1)
TRUTH = RNG.integers(0, 256, (3, 12, 9, 1), np.uint8)
SAMPLES = np.clip(TRUTH + RNG.normal(0, 20, TRUTH.shape), 0, 255).astype(np.uint8)
MODULE = '''
"""Numbers of one's own: how bright samples of the last class are, and how many there are."""

import numpy as np

def spread(samples, conditions, truth):
    np.savez("{path}", samples=samples, **conditions)
    assert truth is None
    last = samples[conditions["label"] == 2]
    return {{"mean": last.mean(), "count": len(last)}}

spread.higher_is_better = True

def nothing(samples, conditions, truth):
    return float("nan")
'''


def plain_ssim(a, b, reach):
    """SSIM of two pictures by its definition: all windows of 7 x 7, deviations of n - 1."""
    windows = [np.lib.stride_tricks.sliding_window_view(x.astype(float), (7, 7)) for x in (a, b)]
    (x, y), n = (w.reshape(-1, 49) for w in windows), 49
    mx, my, c1, c2 = x.mean(1), y.mean(1), (0.01 * reach) ** 2, (0.03 * reach) ** 2
    vx, vy, vxy = x.var(1, ddof=1), y.var(1, ddof=1), ((x.T - mx) * (y.T - my)).sum(0) / (n - 1)
    return np.mean((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))


def test_psnr_and_ssim():
    errors = ((SAMPLES.astype(float) - TRUTH) ** 2).mean(axis=(1, 2, 3))
    expected = np.mean(10 * np.log10(255**2 / errors))
    np.testing.assert_allclose(pairs.psnr(SAMPLES, TRUTH), expected)
    assert pairs.psnr(TRUTH, TRUTH) == pairs.MOST
    by_hand = [plain_ssim(*pair, 255) for pair in zip(SAMPLES[..., 0], TRUTH[..., 0], strict=True)]
    np.testing.assert_allclose(pairs.ssim(SAMPLES, TRUTH), np.mean(by_hand), rtol=1e-9)
    assert pairs.ssim(TRUTH, TRUTH) == pytest.approx(1)


def test_pairs_of_values():
    """Their range is that of the truth; signals are compared along their length."""
    truth = RNG.standard_normal((4, 1, 30, 2)).astype(np.float32)
    samples, reach = truth + np.float32(0.1), truth.max() - truth.min()
    expected = 20 * np.log10(reach / 0.1)
    np.testing.assert_allclose(pairs.psnr(samples, truth), expected, rtol=1e-4)
    assert 0.5 < pairs.ssim(samples, truth) < 1 and pairs.ssim(truth, truth) == pytest.approx(1)


def test_lpips_goes_through_its_network_in_parts(monkeypatch):
    seen = []

    def apply(params, a, b):
        seen.append(a.shape)
        return abs(a - b).mean(axis=(1, 2, 3)) * params

    network = frozen.Frozen(apply, lambda: 2.0, None)
    monkeypatch.setattr(pairs, "AT_ONCE", 2)
    found = pairs.measure(["lpips"], SAMPLES, {}, TRUTH, network)
    expected = 2 * np.abs(SAMPLES.astype(float) - TRUTH).mean() / 127.5
    assert found == {"lpips": pytest.approx(expected, rel=1e-5)}
    assert seen == [(2, 12, 9, 3), (1, 12, 9, 3)]


@pytest.mark.parametrize(
    "metrics, shape, values, truth, line",
    [
        (["fid", "psnr"], (8, 8, 1), False, False, "psnr compares pairs"),
        (["ssim"], (4, 8, 1), False, True, "ssim needs 7 pixels"),
        (["lpips"], (8, 8, 3), False, True, "lpips is of images of 16"),
        (["lpips"], (32, 32, 3), True, True, "lpips is of images of 16"),
        (["no_module_of_this_name:f"], (8, 8, 1), False, True, "no_module_of_this_name"),
        (["json:no_function"], (8, 8, 1), False, True, "no such function of a module"),
    ],
)
def test_what_does_not_fit_is_refused(metrics, shape, values, truth, line):
    with pytest.raises(ValueError, match=line):
        pairs.check(metrics, shape, values, truth, frozen.FROZEN["lpips"])


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "numbers_of_a_test.py"
    file.write_text(MODULE.format(path=tmp_path / "seen.npz"))
    return file.stem


def test_a_metric_of_ones_own_in_a_run(tmp_path, module):
    """It gets the very samples and labels; results.json, the log and keep_best have its numbers."""
    name = f"{module}:spread"
    words = {"fid.metrics": f"fid,{name}", "training.num_steps": 4, "fid.labels": "random",
             "training.keep_best": f"{name}.mean", "fid.num_samples": 21}  # fmt: skip
    jobs.Jobs(tmp_path).run_here(tmp_path / "run", words)
    result = jobs.results(tmp_path / "run")[-1]
    with np.load(tmp_path / "seen.npz") as file:
        samples, labels = file["samples"], file["label"]
    assert list(results.numbers(result)) == ["fid", f"{name}.mean", f"{name}.count"]
    assert result[f"{name}.mean"] == samples[labels == 2].mean() and len(samples) == 21
    assert result[f"{name}.count"] == (labels == 2).sum()
    np.testing.assert_array_equal(labels, sample.draw_labels(0, np.arange(21), 3, "random"))
    ours = generator.load(tmp_path / "run").sample(labels)
    assert (ours != samples).mean() < 0.01  # but for rounding
    tag = f"{name}.mean@21/ema_1step"
    logged = [line for line in jobs.metrics(tmp_path / "run") if tag in line]
    assert logged
    kept = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    values = [line[tag] for line in logged]
    assert kept["value"] == max(values)
    assert evaluators.rises(f"{name}.mean") and not evaluators.rises(f"{module}:nothing")


def test_alone_it_needs_no_network_and_no_reference(tmp_path, module):
    options = types.SimpleNamespace(metrics=(f"{module}:spread",))
    assert evaluators.of_features(options.metrics) == []
    words = {"fid.metrics": f"{module}:spread", "fid.features": "inception",
             "training.num_steps": 4}  # fmt: skip
    jobs.Jobs(tmp_path).run_here(tmp_path / "run", words)
    result = jobs.results(tmp_path / "run")[-1]
    assert "fid" not in result and "reference" not in result and f"{module}:spread.mean" in result


def test_a_number_that_is_none_is_refused(module):
    with pytest.raises(ValueError, match="nothing is no finite number"):
        own.numbers(f"{module}:nothing", SAMPLES, {}, None)


TWINS = """
import numpy as np

def kept(samples, conditions, truth):
    np.savez("{path}", samples=samples, truth=truth, **conditions)
    return 0.0
"""


def test_pairs_in_a_run(tmp_path, monkeypatch):
    """Each sample is compared with the very record whose condition it was drawn by."""
    rows = RNG.integers(0, 256, (40, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "pairs.npz", image=rows, label=np.arange(40) % 3, twin=255 - rows)
    argv = ["values", f"--input={tmp_path / 'pairs.npz'}", f"--output={tmp_path / 'made'}"]
    assert prepare_dataset.main([*argv, "--preview=0"]) == 0
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "twins_of_a_test.py").write_text(TWINS.format(path=tmp_path / "seen.npz"))
    words = {"dataset.root": tmp_path / "made", "dataset.image_size": 8, "fid.num_samples": 30,
             "dataset.conditions": "twin", "dataset.kept_conditions": "twin",
             "fid.metrics": "psnr,ssim,twins_of_a_test:kept", "training.num_steps": 2,
             "training.keep_best": "psnr"}  # fmt: skip
    jobs.Jobs(tmp_path).run_here(tmp_path / "run", words)
    result = jobs.results(tmp_path / "run")[-1]
    with np.load(tmp_path / "seen.npz") as file:
        seen = dict(file)
    np.testing.assert_array_equal(255 - seen["truth"], seen["twin"])
    place = [int(np.flatnonzero((rows == image).all(axis=(1, 2, 3)))[0]) for image in seen["truth"]]
    assert len({*place}) == 30 and (np.array(place) % 3 == seen["label"]).all()
    assert result["psnr"] == pytest.approx(pairs.psnr(seen["samples"], seen["truth"]))
    assert 3 < result["psnr"] < 20 and -1 < result["ssim"] < 1
    model = generator.load(tmp_path / "run")
    ours = model.sample(seen["label"], conditions={"twin": seen["twin"]})
    assert (ours != seen["samples"]).mean() < 0.01  # but for rounding


def test_images_of_others_have_no_truth(tmp_path, capsys):
    np.savez(tmp_path / "images.npz", arr_0=SAMPLES)
    argv = [f"--images={tmp_path / 'images.npz'}", "--config=configs/load_config.py:digits"]
    assert evaluate_images.main([*argv, "--config.fid.metrics=fid,ssim"]) == 1
    assert "fid.metrics: ssim asks what images were drawn by" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["far", None, np.ones(3)])
def test_what_is_no_number_is_refused_by_name(value, module, monkeypatch):
    monkeypatch.setattr(own, "load", lambda name: lambda *_: {"far": value})
    with pytest.raises(ValueError, match=f"{module}:spread.far is no finite number: "):
        own.numbers(f"{module}:spread", SAMPLES, {}, None)
