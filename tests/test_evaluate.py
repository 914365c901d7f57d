"""The evaluation of a published checkpoint from end to end: VAE, Inception, metrics, devices."""

import json
from functools import partial

import jax
import make
import numpy as np
import plain_score
import pytest
from inception_writer import random_weights, write_pth
from jobs import ALONE

import generator
import main
import parts
from formats import published_pmf
from metrics import distances, inception, inception_weights, neighbours
from metrics.reference import load_reference, save_reference
from utils import dataset
from utils import images as image_utils

SAMPLES = 11  # fill no batch evenly


@pytest.fixture(scope="module")
def weights(golden, tmp_path_factory):
    """A file of random Inception weights."""
    seed = json.loads((golden / "inception" / "expected.json").read_text())["weight_seed"]
    path = tmp_path_factory.mktemp("inception") / inception_weights.PTH_NAME
    write_pth(path, random_weights(golden / "inception").random_weights(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path.parent / "cache"))
        yield path


@pytest.fixture(scope="module")
def reference(golden, tmp_path_factory):
    """Reference statistics of the golden set."""
    with np.load(golden / "inception" / "sets.npz") as file:
        pools = [file[name] for name in file.files if name.startswith("ref") and "pool" in name]
        spatial = [file[name] for name in file.files if name.startswith("ref") and "spat" in name]
    path = tmp_path_factory.mktemp("reference") / "stats.npz"
    moments = [(a.mean(0), np.cov(a, rowvar=False)) for a in (*pools[:1], *spatial[:1])]
    save_reference(path, *moments[0], *moments[1], resize="half_pixel")
    return path


@pytest.fixture(scope="module")
def command(golden, weights, reference):
    """Options of the evaluation; the sizes come from the golden data."""
    model = json.loads((golden / "meanflow.json").read_text())["model"]
    published = golden / "released_checkpoint" / "orbax"
    options = {
        "eval_only": True,
        "load_from": published,
        "dataset.image_size": model["input_size"],
        "dataset.image_channels": model["in_channels"],
        "dataset.num_classes": model["num_classes"],
        "dataset.vae": golden / "vae" / "tiny",
        "model.cls": "DiT",
        **{f"model.{k}": model[k] for k in ("depth", "hidden_size", "num_heads", "patch_size")},
        "fid.cache_ref": reference,
        "fid.inception_weights": weights,
        "fid.num_samples": SAMPLES,
        "fid.metrics": "fid,sfid,inception_score",
    }
    words = [f"--config.{name}={value}" for name, value in options.items()]
    return ["--config=configs/load_config.py:default", *words, ALONE]


@pytest.fixture(scope="module")
def evaluation(command, tmp_path_factory):
    """The entry of results.json, and the images uint8 that were measured."""
    workdir, seen = tmp_path_factory.mktemp("one"), []
    in_bytes = image_utils.to_uint8

    def to_uint8(x, rounding):
        images = in_bytes(x, rounding)
        jax.debug.callback(lambda batch: seen.append(np.array(batch)), images, ordered=True)
        return images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_utils, "to_uint8", to_uint8)
        argv = [f"--workdir={workdir}", *command, "--config.fid.device_batch_size=4"]
        assert main.main(argv) == 0
    (result,) = json.loads((workdir / "results.json").read_text())
    return result, np.concatenate(seen)[:SAMPLES]


@pytest.fixture(scope="module")
def result(evaluation):
    return evaluation[0]


@pytest.fixture(scope="module")
def images(evaluation):
    return evaluation[1]


def test_the_result_says_what_it_depends_on(result, golden, reference):
    assert result["evaluator"] == "meanflow"
    assert result["features"] == "Inception 2015-12-05, half_pixel resize"
    assert len(result["feature_weights_sha256"]) == 64
    assert result["reference"] == str(reference)
    (checkpoint,) = (golden / "released_checkpoint" / "orbax").iterdir()
    assert result["checkpoint_step"] == int(checkpoint.name.removeprefix("checkpoint_"))
    assert (result["num_samples"], result["seed"], result["weights"]) == (SAMPLES, 0, "ema")
    assert (result["num_steps"], result["network_dtype"]) == (1, "float32")
    assert int(result["weights_checksum"], 16) > 0
    assert result["fid"] > 0 and result["sfid"] > 0 and result["inception_score"] >= 1


@pytest.mark.slow
def test_two_devices_give_the_same_number(result, command, tmp_path, run_python):
    argv = ["main.py", f"--workdir={tmp_path}", *command, "--config.fid.device_batch_size=3"]
    run_python(argv, devices=2, timeout=600)
    (found,) = json.loads((tmp_path / "results.json").read_text())
    assert found["vae_dtype"] == "float32"
    # Of other batches a few bytes lie on the other side of a rounding border, and one moves the FID
    # of so few images by up to 1e-4 of it, as measured on random bytes.
    for name in ("fid", "sfid", "inception_score"):
        assert found[name] == pytest.approx(result[name], rel=1e-3), name


def test_the_sampling_job_writes_the_images_that_are_measured(images, command, tmp_path):
    """But for values at a rounding border: float32 products round by the size of the batch."""
    argv = [f"--workdir={tmp_path}", *command, "--config.eval_only=False", "--config.sample_only"]
    argv += [f"--config.sampling.num_images={SAMPLES}", "--config.sampling.format=npz"]
    labels = expected_labels(SAMPLES, command)
    argv += [f"--config.sampling.labels={','.join(map(str, labels))}"]
    assert main.main(argv) == 0
    (samples,) = (tmp_path / "samples").glob("*/samples.npz")
    with np.load(samples) as file:
        apart = np.abs(file["arr_0"].astype(int) - images)
    # Values up to 1e-6 of the largest, 5, apart are 6e-4 of a level apart: so many cross a border.
    assert apart.max() <= 1 and np.mean(apart > 0) <= 1e-3


@pytest.fixture(scope="module")
def features_of(weights):
    """The features of images, all in one piece."""
    return jax.jit(partial(inception.features, inception_weights.load(weights)))


def test_the_score_is_that_of_the_images_by_hand(result, images, features_of, reference):
    """Two-pass float64 moments.

    The covariance of so few images has no variance in most directions; there the root of what
    float32 leaves in the job's sums counts. Random errors of that size, 2^-24 of the sums of
    |c_i c_j|, move this FID by 5e-5 of it; four times that is allowed.
    """
    features = features_of(images)
    pool = np.asarray(features["pool"], np.float64)
    known = load_reference(reference)
    expected = distances.frechet_distance(
        pool.mean(0), np.cov(pool, rowvar=False), known["mu"], known["sigma"]
    )
    assert result["fid"] == pytest.approx(expected, rel=2e-4)
    score, _ = plain_score.inception_score(np.asarray(features["logits_no_bias"]))
    assert result["inception_score"] == pytest.approx(score, rel=1e-4)


def test_precision_and_recall_are_those_of_the_images_by_hand(
    images, command, features_of, tmp_path
):
    """Against the images of a dataset: here half of the samples, the others of noise."""
    noise = np.random.RandomState(0).randint(0, 256, images[1::2].shape, np.uint8)
    real = np.concatenate([images[::2], noise])
    root = tmp_path / "data"
    root.mkdir()
    examples = ({"image": image, "label": 0} for image in real)
    count = dataset.write_shard(dataset.shard_path(root, "train", 0, 1), examples)
    dataset.write_metadata(root, "image", real.shape[1:], np.uint8, 1, {"train": [count]})
    argv = [
        f"--workdir={tmp_path}",
        *command,
        "--config.fid.cache_ref=",
        f"--config.dataset.root={root}",
        "--config.fid.device_batch_size=4",
    ]
    assert main.main([*argv, "--config.fid.metrics=fid,precision_recall"]) == 0
    (found,) = json.loads((tmp_path / "results.json").read_text())
    pools = [np.asarray(features_of(x)["pool"]) for x in (real, images)]
    expected = neighbours.precision_recall(*pools)
    assert 0 < expected[1] < 1  # else it would say little
    assert (found["precision"], found["recall"]) == pytest.approx(expected)


@pytest.mark.slow
def test_pixels_are_measured_as_they_are(weights, reference, features_of, tmp_path):
    """Pixel MeanFlow without an autoencoder: the FID of what a generator draws."""
    sizes = "depth=2 aux_head_depth=1 hidden_size=16 num_heads=2 patch_size=4"
    words = ["model.cls=pmfDiT", *(f"model.{word}" for word in sizes.split()), "method.name=pixel"]
    words += ["dataset.image_size=16", "dataset.image_channels=3", "dataset.num_classes=3"]
    words += ["dataset.vae=none", "sampling.omega=2", "sampling.t_min=0.2"]
    config = make.config(*words, "training.ema_val=", "training.ema_half_life=500")
    params = make.params(parts.make(config).module, parts.image_shape(config.dataset), 0.2)
    published_pmf.export(params, {"500": params}, 7, tmp_path)
    measured = [f"fid.{word}" for word in (f"cache_ref={reference}", f"inception_weights={weights}",
                f"num_samples={SAMPLES}", "labels=balanced", "device_batch_size=4")]  # fmt: skip
    argv = ["--config=configs/load_config.py:default", f"--workdir={tmp_path / 'run'}", ALONE]
    options = [f"load_from={tmp_path}", "eval_only=True", *words, *measured]
    assert main.main([*argv, *(f"--config.{word}" for word in options)]) == 0
    (result,) = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (result["labels"], result["omega"], result["t_min"]) == ("balanced", 2.0, 0.2)
    images = generator.load(tmp_path, *words, config="default").sample(np.arange(SAMPLES) % 3)
    pool = np.asarray(features_of(images)["pool"], np.float64)
    known = load_reference(reference)
    moments = pool.mean(0), np.cov(pool, rowvar=False)
    expected = distances.frechet_distance(*moments, known["mu"], known["sigma"])
    assert result["fid"] == pytest.approx(expected, rel=1e-3)


def expected_labels(count, command):
    import sample

    (classes,) = (int(w.split("=")[1]) for w in command if "dataset.num_classes" in w)
    return np.asarray(sample.draw_labels(0, np.arange(count), classes, "random"))


REFUSED = {  # the options, the exit status and what the line names
    "another resize": (["--config.fid.resize=tf1"], 1, "fid.resize is tf1"),
    "precision without images": (["--config.fid.metrics=precision_recall"], 1, "precision_recall"),
    "no weights": (["--config.fid.inception_weights=nowhere.pth"], 1, "nowhere.pth"),
    "no vae": (["--config.dataset.vae=nowhere"], 1, "nowhere"),
    "no statistics": (["--config.fid.cache_ref=nowhere.npz"], 1, "nowhere.npz"),
    "pixel statistics": (["--config.fid.features=pixels"], 2, "fid.metrics"),
}


@pytest.mark.parametrize("options, status, named", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(command, tmp_path, capsys, options, status, named):
    assert main.main([f"--workdir={tmp_path}", *command, *options]) == status
    err = capsys.readouterr().err
    assert err.startswith("error: ") and named in err and "Traceback" not in err
