"""Presets of evaluators: what they set, what they refuse, the references and weights they read."""

import json
import pickle

import jax.numpy as jnp
import make
import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_writer import write_zip

import parts
from configs import default
from formats import weight_files
from metrics import (
    dinov2_weights,
    edm2_reference,
    evaluators,
    features,
    neighbours,
    scorer,
)
from metrics.reference import Reference, load_reference, save_reference
from utils import sharding

SHAPE = (4, 4, 3)
DIM = 6


def options(latents=True, **changes):
    fid = default.get_config().fid
    for name, value in {"device_batch_size": 8, **changes}.items():
        fid[name] = value
    return evaluators.fill(fid, latents)


# Presets ------------------------------------------------------------------------------------------


def test_a_preset_sets_what_is_not_given():
    adm = options(evaluator="adm")
    assert (adm.resize, adm.rounding, adm.labels) == ("tf1", "down", "random")
    assert adm.metrics == ("fid", "sfid", "inception_score", "precision_recall")
    assert evaluators.describe(adm) == "adm"
    changed = options(evaluator="adm", labels="balanced", metrics=("fid",))
    assert (changed.resize, changed.metrics) == ("tf1", ("fid",))
    assert evaluators.describe(changed) == "adm, but labels balanced"
    published = options()
    assert (published.resize, published.rounding, published.metrics) == (
        "half_pixel", "nearest", ("fid",),
    )  # fmt: skip
    edm2 = options(evaluator="edm2")
    assert (edm2.rounding, edm2.metrics) == ("down", ("fid", "fd_dinov2"))
    assert options(latents=False, evaluator="edm2").rounding == "nearest"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"evaluator": "adn"}, r"fid\.evaluator is one of meanflow \| adm \| edm2, not 'adn'"),
        ({"rounding": "up"}, r"fid\.rounding is one of nearest \| down, not 'up'"),
        ({"metrics": ("fid", "lpisp")}, r"fid\.metrics are of fid \| sfid"),
        ({"features": "pixels", "evaluator": "adm"}, "pixels has no other metric"),
    ],
)
def test_what_there_is_not_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        options(**changes)


def test_few_samples_are_named():
    tags = [evaluators.tag("fid", count) for count in (50_000, 10_000, 9_999, 5000, 2500, 64)]
    assert tags == ["fid", "fid", "fid@9.999k", "fid@5k", "fid@2.5k", "fid@64"]


# References ---------------------------------------------------------------------------------------


def network(resize):
    """Features that are a few pixels, under the names of the FID network's."""

    def apply(params, images):
        flat = images.reshape(len(images), -1).astype(jnp.float32)
        return {"pool": flat[:, :DIM], "spatial": flat[:, 6:10], "logits_no_bias": flat[:, :5] / 50}

    described = {"features": "pixels of a test", "resize": resize, "feature_weights_sha256": "ab"}
    return features.Features({}, apply, described)


def reference_of(path, fid):
    mesh = sharding.make_mesh(1)
    return Reference(fid, scorer.Scorer(network(fid.resize), mesh, fid, SHAPE))


def images(count, seed):
    return np.random.RandomState(seed).randint(0, 256, (count, *SHAPE)).astype(np.uint8)


def adm_file(path, **more):
    """A reference as ADM publishes them, in float32, with images."""
    flat = images(60, 1).reshape(60, -1).astype(np.float64)
    arrays = {}
    for names, part in ((("mu", "sigma"), flat[:, :DIM]), (("mu_s", "sigma_s"), flat[:, 6:10])):
        arrays |= dict(zip(names, (part.mean(0), np.cov(part, rowvar=False)), strict=True))
    arrays = {name: a.astype(np.float32) for name, a in arrays.items()} | {"arr_0": images(20, 2)}
    np.savez(path, **{name: a for name, a in (arrays | more).items() if a is not None})
    return path


def test_adms_reference(tmp_path):
    fid = options(evaluator="adm", cache_ref=str(adm_file(tmp_path / "adm.npz")))
    generated, count = images(33, 3), 33
    for again in range(2):
        real = reference_of(tmp_path, fid)
        found, pool = real.score.read(generated.__getitem__, count, "images")
        results = real.compare(found, pool, count)
        (kept,) = tmp_path.glob("adm-features-tf1-ab-*.npy")  # computed once
        if not again:
            np.save(kept, np.load(kept)[:10])  # and read from there the second time
    assert set(results) == {
        "fid", "sfid", "inception_score", "inception_score_std", "precision", "recall",
    }  # fmt: skip
    by_hand = [
        a.reshape(len(a), -1)[:, :DIM].astype(np.float32) for a in (images(20, 2), generated)
    ]
    assert results["inception_score_std"] == 0  # one split of fewer than 5,000
    assert (results["precision"], results["recall"]) == neighbours.precision_recall(
        by_hand[0][:10], by_hand[1]
    )


def test_the_images_of_a_reference_are_known_by_their_contents(tmp_path):
    """A file that takes the place of another has features of its own, and its results too."""
    path, found = tmp_path / "adm.npz", []
    for seed in (2, 4):
        fid = options(evaluator="adm", cache_ref=str(adm_file(path, arr_0=images(20, seed))))
        real = reference_of(path, fid)
        expected = images(20, seed).reshape(20, -1)[:, :DIM]
        np.testing.assert_array_equal(real.pool(), expected)
        found.append(real.describe())
    assert found[0].pop("reference_arr_0") != found[1].pop("reference_arr_0")
    assert found[0] == found[1]  # their moments are the same
    fid = options(evaluator="adm", cache_ref=str(path), metrics=("fid",))
    assert "reference_arr_0" not in reference_of(path, fid).describe()  # FID does not see them


def test_sets_are_compared_by_kid_and_mind(tmp_path):
    metrics = ("kid_all", "mind")
    path = adm_file(tmp_path / "adm.npz")
    fid = options(evaluator="adm", cache_ref=str(path), metrics=metrics)
    real = reference_of(tmp_path, fid)
    same = real.compare(*real.score.read(images(20, 2).__getitem__, 20, "images"), 20)
    assert set(same) == {"kid_all", "mind"} and same["mind"] == 0
    other = real.compare(*real.score.read(images(33, 3).__getitem__, 33, "images"), 33)
    assert other["mind"] > 0 and np.isfinite(other["kid_all"])
    real = reference_of(tmp_path, options(evaluator="adm", cache_ref=str(path), metrics=("kid",)))
    with pytest.raises(ValueError, match="20 reference images are fewer than a subset of 1000"):
        real.statistics()
    with pytest.raises(ValueError, match=r"KID: 999 generated samples \(fid.num_samples\)"):
        parts.check(make.config("fid.metrics=kid", "fid.num_samples=999"))


def meanflow_file(path):
    np.savez(path, ref_mu=np.zeros(DIM), ref_sigma=np.eye(DIM))
    return path


def edm2_file(path):
    moments = {"mu": np.zeros(DIM), "sigma": np.eye(DIM)}
    path.write_bytes(pickle.dumps({"num_images": 5, "fid": moments}))
    return path


REFUSED = {
    "ADM's file, half-pixel": (adm_file, {}, "made with tf1 resize, fid.resize is half_pixel"),
    "EDM2's file, half-pixel": (edm2_file, {}, "made with tf1 resize"),
    "MeanFlow's file": (meanflow_file, {"evaluator": "adm"}, "holds no mu_s and sigma_s for sfid"),
    "MeanFlow's file, FID": (
        meanflow_file, {"evaluator": "adm", "metrics": ("fid",)}, "made with half_pixel resize",
    ),
    "no images": (
        lambda path: adm_file(path, arr_0=None), {"evaluator": "adm"}, "needs reference images",
    ),
    "images of another size": (
        lambda path: adm_file(path, arr_0=np.zeros((9, 8, 8, 3), np.uint8)), {"evaluator": "adm"},
        r"images of \(8, 8, 3\), those generated are \(4, 4, 3\)",
    ),
    "images that are none": (
        lambda path: adm_file(path, arr_0=np.zeros((9, 8))), {"evaluator": "adm"},
        r"arr_0 is float64 \(9, 8\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("make, changes, message", REFUSED.values(), ids=REFUSED)
def test_a_reference_of_another_evaluator_is_refused(tmp_path, make, changes, message):
    path = tmp_path / "reference.npz"
    make(path)
    with pytest.raises(ValueError, match=message) as caught:
        reference_of(tmp_path, options(cache_ref=str(path), **changes))
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return json.loads, ("{}",)


def test_a_pickle_that_asks_for_more_is_refused(tmp_path):
    for name, content in {
        "evil": {"fid": Evil()},
        "scalar": {"num_images": np.float64(3), "fid": {"mu": np.zeros(2), "sigma": np.eye(2)}},
        "text": "hello",
    }.items():
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=f"{name}.pkl: (refused|not EDM2's)") as caught:
            load_reference(path)
        assert "\n" not in str(caught.value)
    for name, asked in (("evil", "json.loads"), ("scalar", "numpy.*multiarray.scalar")):
        with pytest.raises(ValueError, match=f"asks for {asked}"):
            edm2_reference.load(tmp_path / f"{name}.pkl")


def test_statistics_of_dinov2_go_round(tmp_path):
    mu, sigma = np.arange(3.0), np.eye(3)
    save_reference(tmp_path / "a.npz", mu_dinov2=mu, sigma_dinov2=sigma, dinov2_resize="edm2")
    read = load_reference(tmp_path / "a.npz")
    assert read["mu"] is None and read["dinov2_resize"] == "edm2"
    np.testing.assert_array_equal(read["sigma_dinov2"], sigma)


# Weights of DINOv2 --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(golden):
    with np.load(golden / "eval.npz") as file:
        prefix = "dinov2/params/"
        return {k.removeprefix(prefix): file[k] for k in file.files if k.startswith(prefix)}


def huggingface(arrays):
    """The same weights by the names of Hugging Face's port."""
    found = {}
    for name, value in arrays.items():
        for old, new in (
            ("pos_embed", "position_embeddings"),
            ("patch_embed.proj", "patch_embeddings.projection"),
            ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1"),
            ("attn.proj", "attention.output.dense"), ("blocks.", "encoder.layer."),
        ):  # fmt: skip
            name = name.replace(old, new)
        if name.startswith("norm."):
            name = f"layer{name}"
        elif not name.startswith("encoder"):
            name = f"embeddings.{name}"
        if "attn.qkv" in name:
            for part, third in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                found[name.replace("attn.qkv", f"attention.attention.{part}")] = third
        else:
            found[name] = value
    return found


def test_both_forms_of_the_weights_are_the_same(tmp_path, published, monkeypatch):
    write_zip(tmp_path / "a.pth", published)
    save_file(huggingface(published), tmp_path / "a.safetensors")
    monkeypatch.setenv("DINOV2_WEIGHTS", str(tmp_path / "a.safetensors"))
    trees = [dinov2_weights.load(tmp_path / "a.pth"), dinov2_weights.load()]
    digests = [weight_files.digest(tree) for tree in trees]
    assert digests[0] == digests[1]
    assert dinov2_weights.name(trees[0]).startswith("DINOv2 of width")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"register_tokens": np.zeros((1, 4, 32), np.float32)}, "with registers"),
        ({"norm.bias": None}, r"missing: norm\.bias"),
        ({"head.weight": np.zeros(3, np.float32)}, r"left over: head\.weight"),
        ({"blocks.0.ls1.gamma": np.zeros(7, np.float32)}, r"blocks\.0\.ls1\.gamma \(7,\) instead"),
        ({"pos_embed": None}, "missing or misshapen: pos_embed"),
        (
            {"norm.bias": np.full(32, np.nan, np.float32)},
            "norm.bias has values that are not finite",
        ),
    ],
)
def test_other_weights_are_refused_by_name(tmp_path, published, change, message):
    arrays = {name: value for name, value in (published | change).items() if value is not None}
    if "norm.bias" in arrays:  # as long as this set's
        arrays["norm.bias"] = np.resize(arrays["norm.bias"], published["norm.bias"].shape)
    write_zip(tmp_path / "b.pth", arrays)
    with pytest.raises(ValueError, match=message) as caught:
        dinov2_weights.load(tmp_path / "b.pth")
    assert "b.pth" in str(caught.value) and "\n" not in str(caught.value)


def test_no_weights_of_dinov2(tmp_path, monkeypatch):
    monkeypatch.delenv("DINOV2_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"dinov2_vitl14_pretrain\.pth .* DINOV2_WEIGHTS"):
        dinov2_weights.load()
