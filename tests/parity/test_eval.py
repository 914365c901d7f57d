"""Numbers equal to the field's evaluators: DINOv2, KID, MIND, precision, averages of weights."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import plain_score
import pytest
from PIL import Image

from metrics import (
    dinov2,
    dinov2_weights,
    distances,
    edm2_reference,
    evaluators,
    kernels,
    neighbours,
)
from metrics import reference as references
from utils import averages

pytestmark = pytest.mark.parity

# The cases are known when tests are collected, before fixtures are.
GOLDEN = pathlib.Path(
    os.environ.get("MEANFLOW_GOLDEN") or pathlib.Path(__file__).parents[1] / "golden"
)
EXPECTED = json.loads((GOLDEN / "eval.json").read_text())
with np.load(GOLDEN / "eval.npz") as file:
    ARRAYS = {name: file[name] for name in file.files}


def below(prefix):
    """The arrays whose names begin with PREFIX/, without it."""
    prefix = f"{prefix}/"
    return {k.removeprefix(prefix): v for k, v in ARRAYS.items() if k.startswith(prefix)}


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(request.param)


# DINOv2 ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params():
    return dinov2_weights.convert(below("dinov2/params"), "golden")


def test_position_tables(params):
    for name, offset in (("original", dinov2.POSITION_OFFSET), ("huggingface", 0.0)):
        found = dinov2.positions(params["positions"][1:], offset=offset)
        np.testing.assert_allclose(found, ARRAYS[f"dinov2/position/{name}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", EXPECTED["dinov2"]["sizes"])
def test_dinov2(params, size):
    arrays, heads = below(f"dinov2/{size}"), EXPECTED["dinov2"]["heads"]
    images = arrays["images"]
    apply = jax.jit(dinov2.features, static_argnums=(2, 3, 4))
    for name, atol in (("edm2", 5e-3), ("edm2_pil", 0), ("torch_fidelity", 2e-4)):
        rows = np.asarray(dinov2.resized(images, name))[:, ARRAYS["dinov2/rows"]]
        np.testing.assert_allclose(rows, arrays[f"{name}/resized"], rtol=0, atol=atol)
        found = apply(params, images, name, heads)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, arrays[f"{name}/features"], rtol=0, atol=2e-5)
    ported = apply(params, images, "edm2", heads, 0.0)
    np.testing.assert_allclose(ported, arrays["edm2/features_huggingface"], rtol=0, atol=2e-5)
    by_pillow = [
        np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC))
        for image in images
    ]
    np.testing.assert_array_equal(dinov2.resized(images, "edm2_pil"), by_pillow)


def test_the_sizes_of_dinov2_are_those_of_the_golden_network(params):
    expected = EXPECTED["dinov2"]
    depth, width, mlp = params["blocks"]["fc1"]["kernel"].shape
    assert (depth, width, mlp) == (
        expected["depth"], expected["width"], expected["width"] * expected["mlp_ratio"],
    )  # fmt: skip
    assert len(params["positions"]) == expected["table_grid"] ** 2 + 1
    assert (dinov2.PATCH, dinov2.SIZE) == (expected["patch"], expected["input_size"])
    assert (list(dinov2.MEAN), list(dinov2.STD)) == (expected["mean"], expected["std"])


# KID, MIND ---------------------------------------------------------------------------------------


def test_kid(dtype):
    atol = 1e-9 if dtype == np.float64 else 1e-6
    generated, reference = (ARRAYS[f"kid/{k}"].astype(dtype) for k in ("generated", "reference"))
    for package in ("torch_fidelity", "clean_fid"):
        arrays, expected = below(f"kid/{package}"), EXPECTED["kid"][package]
        rows = zip(arrays["index_generated"], arrays["index_reference"], strict=True)
        values = kernels.kid_values(generated, reference, rows)
        np.testing.assert_allclose(values, arrays["values"], rtol=0, atol=atol)
        np.testing.assert_allclose(
            (values.mean(), values.std()), (expected["mean"], expected["std"]), rtol=0, atol=atol
        )
    own = EXPECTED["kid"]["torch_fidelity"]
    found = kernels.kid(generated, reference, own["subsets"], own["subset_size"], own["seed"])
    np.testing.assert_allclose(found, (own["mean"], own["std"]), rtol=0, atol=atol)
    whole = kernels.kid_all(generated, reference, rows=len(reference) // 2)
    np.testing.assert_allclose(whole, EXPECTED["kid"]["all"], rtol=0, atol=atol)


def test_the_subsets_of_kid_are_torch_fidelitys():
    sizes = (len(ARRAYS["kid/generated"]), len(ARRAYS["kid/reference"]))
    own, arrays = EXPECTED["kid"]["torch_fidelity"], below("kid/torch_fidelity")
    rows = kernels.subset_rows(*sizes, own["subsets"], own["subset_size"], own["seed"])
    first, second = zip(*rows, strict=True)
    np.testing.assert_array_equal(first, arrays["index_generated"])
    np.testing.assert_array_equal(second, arrays["index_reference"])


def test_mind(dtype):
    sets = [
        ARRAYS[f"kid/{name}"][ARRAYS[f"mind/index_{name}"]].astype(dtype)
        for name in ("generated", "reference")
    ]
    found = kernels.mind(*sets, ARRAYS["mind/directions"].astype(dtype))
    rtol = 1e-9 if dtype == np.float64 else 1e-6
    np.testing.assert_allclose(found, EXPECTED["mind"]["value"], rtol=rtol)
    np.testing.assert_allclose(found, EXPECTED["mind"]["value_torch_fidelity"], rtol=1e-6)
    assert EXPECTED["mind"]["alpha"] == 3 * sets[0].shape[1]


# Precision and recall ----------------------------------------------------------------------------

SETS = below("precision_recall")
K = EXPECTED["precision_recall"]["k"]


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_who_lies_within_a_ball(half):
    found = neighbours.flags(SETS["reference"], SETS["generated"], K, half=half)
    for name, inside in zip(("generated", "reference"), found, strict=True):
        expected = SETS[f"{'adm_float16/' if half else ''}inside_{name}"]
        assert np.sum(inside != expected) <= (2 if half else 0)


def test_radii():
    with jax.enable_x64(True):
        for name in ("reference", "generated"):
            features = jnp.asarray(SETS[name].astype(np.float64))
            radii = np.sqrt(neighbours.radii(features, K))
            np.testing.assert_allclose(radii, SETS[f"radii_{name}"], rtol=1e-5)
    for name in ("reference", "generated"):  # here the squares, to a step of float16
        squares = neighbours.radii(jnp.asarray(SETS[name]), K, half=True)
        expected = SETS[f"adm_float16/radii_{name}"]
        np.testing.assert_allclose(squares, expected, rtol=2**-9)
        assert np.mean(squares != expected) < 0.02


def test_precision_and_recall():
    expected = EXPECTED["precision_recall"]
    reference, generated = SETS["reference"], SETS["generated"]
    members = 2 / np.array([len(generated), len(reference)])

    def close(found, case, atol):
        wanted = np.array([case["precision"], case["recall"]])
        assert (np.abs(found - wanted) <= atol + 1e-7).all(), (found, case)

    for name in ("float64", "strict", "torch_fidelity", "prdc", "adm_float32"):
        found = neighbours.precision_recall(reference, generated, K)
        close(np.array(found), expected["cases"][name], 0)
    equal = neighbours.precision_recall(reference, generated[: len(reference)], K)
    close(np.array(equal), expected["cases"]["equal_sizes"], 0)
    for scale, cases in (
        (1, [expected["cases"]["adm_float16"], expected["cases"]["adm_tensorflow"]]),
        (expected["overflow"]["scale"], [expected["overflow"]]),
    ):
        sets = (np.float32(scale) * reference, np.float32(scale) * generated)
        found = np.array(neighbours.precision_recall(*sets, K, half=True))
        for case in cases:
            close(found, case, members)


# Inception score, Frechet distance ---------------------------------------------------------------


def test_inception_score():
    logits, expected = ARRAYS["inception_score/logits"], EXPECTED["inception_score"]
    permutation = ARRAYS["inception_score/ten_splits_shuffled/permutation"]
    size = expected["split_size"]["split_size"]
    found = {
        "split_size": plain_score.inception_score(logits, split_size=size),
        "ten_splits": plain_score.inception_score(logits, expected["ten_splits"]["splits"]),
        "ten_splits_shuffled": plain_score.inception_score(
            logits[permutation], expected["ten_splits_shuffled"]["splits"]
        ),
    }
    for name, values in found.items():
        wanted = (expected[name]["mean"], expected[name]["std"])
        np.testing.assert_allclose(values, wanted, rtol=1e-6)
    starts = range(0, len(logits), size)
    scores = [plain_score.inception_score(logits[i : i + size], 1)[0] for i in starts]
    np.testing.assert_allclose(scores, ARRAYS["inception_score/split_size/scores"], rtol=1e-6)


def test_the_splits_of_a_preset(monkeypatch):
    """The stream gathers the same splits: by size for ADM, ten elsewhere."""
    logits, expected = ARRAYS["inception_score/logits"], EXPECTED["inception_score"]
    adm = evaluators.PRESETS["adm"]
    size = expected["split_size"]["split_size"]
    monkeypatch.setitem(evaluators.PRESETS, "adm", adm._replace(split_size=size))
    count = len(logits)
    for evaluator, name in (("adm", "split_size"), ("meanflow", "ten_splits")):
        acc = distances.init_scores(evaluators.splits(evaluator, count), logits.shape[1])
        index = np.arange(count + 3)  # the last batch is filled up
        rows = np.concatenate([logits, logits[:3]])
        split = evaluators.split_of(evaluator, index, count)
        acc = distances.add_scores(acc, rows, split, (index < count).astype(np.float32))
        mean, std = distances.finish_scores(acc)  # of sums in float32
        # The deviation of scores moves by no more than they: small, it does so by a larger share.
        atol = 1e-6 * expected[name]["mean"]
        np.testing.assert_allclose(mean, expected[name]["mean"], rtol=0, atol=atol)
        np.testing.assert_allclose(std, expected[name]["std"], rtol=0, atol=atol)


@pytest.mark.parametrize("case", EXPECTED["frechet"]["cases"])
def test_frechet_distance(case):
    expected = EXPECTED["frechet"]["cases"][case]
    moments = []
    for name in ("generated", "reference"):
        features = ARRAYS[f"frechet/{case}/{name}"].astype(np.float64)
        moments.append((features.mean(0), np.cov(features, rowvar=False)))
    found = distances.frechet_distance(*moments[0], *moments[1])
    np.testing.assert_allclose(found, expected["exact"], rtol=1e-9)
    for package in ("torch_fidelity", "pytorch_fid", "clean_fid", "edm2"):
        np.testing.assert_allclose(found, expected[package], rtol=1e-6)
    assert abs(distances.frechet_distance(*moments[0], *moments[0])) < 1e-10


# EDM2's reference --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pickle", "pickle_numpy2"])
def test_edm2_reference(tmp_path, name):
    path = tmp_path / "img.pkl"
    path.write_bytes(ARRAYS[f"edm2_reference/{name}"].tobytes())
    moments, count = edm2_reference.load(path)
    assert count == EXPECTED["edm2_reference"]["num_images"]
    read = references.load_reference(path)
    assert (read["resize"], read["dinov2_resize"]) == ("tf1", "edm2")
    for metric, names in references.MOMENTS.items():
        if metric in moments:
            for value, array, key in zip(moments[metric], ("mu", "sigma"), names, strict=True):
                expected = ARRAYS[f"edm2_reference/{metric}/{array}"]
                np.testing.assert_array_equal(value, expected)
                np.testing.assert_array_equal(read[key], expected)
    # converted to an npz of our own, it reads the same
    references.save_reference(
        tmp_path / "img.npz", **{k: v for k, v in read.items() if v is not None}
    )
    again = references.load_reference(tmp_path / "img.npz")
    # the npz does not say that it was EDM2's, but all that the numbers depend on
    assert again.pop("said")["resize"] == read.pop("said")["resize"]
    assert all(np.array_equal(again[key], value) for key, value in read.items())


# Averages of weights -----------------------------------------------------------------------------

EMA = below("posthoc_ema")


def test_exponents():
    for sigma, gamma in zip(EMA["sigma"], EMA["gamma"], strict=True):
        np.testing.assert_allclose(averages.sigma_to_gamma(sigma), gamma, rtol=1e-12)
        variance = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))
        np.testing.assert_allclose(variance, sigma**2, rtol=1e-12)


def average(sigmas, dtype):
    """The averages after every step: (T, len(sigmas), P)."""
    gammas = jnp.array([averages.sigma_to_gamma(sigma) for sigma in sigmas], dtype)

    def step(ema, row):
        t, params = row
        ema = averages.update(ema, params, averages.update_weight(t, gammas)[:, None])
        return ema, ema

    params = jnp.asarray(EMA["params"], dtype)
    times = jnp.arange(1, len(params) + 1)
    start = jnp.full((len(sigmas), params.shape[1]), 7.0, dtype)  # forgotten at the first step
    return np.asarray(jax.lax.scan(step, start, (times, params))[1])


def test_averages(dtype):
    atol = 1e-12 if dtype == np.float64 else 1e-5
    tracked = average(EXPECTED["posthoc_ema"]["tracked"], dtype)
    np.testing.assert_allclose(tracked[EMA["times"] - 1], EMA["snapshots"], rtol=0, atol=atol)
    for name, case in EXPECTED["posthoc_ema"]["cases"].items():
        direct = average(case["targets"], dtype)[case["time"] - 1]
        np.testing.assert_allclose(direct, EMA[f"{name}/direct"], rtol=0, atol=atol)


@pytest.mark.parametrize("name", EXPECTED["posthoc_ema"]["cases"])
def test_reconstruction(name):
    case = EXPECTED["posthoc_ema"]["cases"][name]
    times, sigmas = EMA[f"{name}/input_times"], EMA[f"{name}/input_sigmas"]
    by_input = {
        (time, sigma): EMA["snapshots"][i, j]
        for i, time in enumerate(EMA["times"])
        for j, sigma in enumerate(EXPECTED["posthoc_ema"]["tracked"])
    }
    snapshots = np.stack([by_input[key] for key in zip(times, sigmas, strict=True)])
    for i, target in enumerate(case["targets"]):
        found = averages.coefficients(times, sigmas, case["time"], target)
        np.testing.assert_allclose(found, EMA[f"{name}/coefficients"][i], rtol=0, atol=1e-10)
        np.testing.assert_allclose(
            found @ snapshots, EMA[f"{name}/reconstructed"][i], rtol=0, atol=1e-12
        )
