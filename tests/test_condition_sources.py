"""Conditions on their way: from people's files into records, from records and files to samples."""

import io
import re
import tarfile
import types

import jax
import make
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from test_conditions import batch, write
from test_demo import Model
from test_demo import gradio as gradio  # a fixture

import evaluate
import generator
import parts
import sample
from run import config as run_config
from run import weights
from scripts import demo, prepare_dataset
from utils import conditions, dataset, files

COUNT = 5
DRAW = np.random.RandomState(3)
PICTURES = DRAW.randint(0, 256, (COUNT, 8, 8)).astype(np.uint8)
HALVES = DRAW.randint(0, 256, (COUNT, 8, 8)).astype(np.uint8)
VECTORS = DRAW.normal(size=(COUNT, 3))


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def in_folders(root):
    for name, contents, ending in (
        ("image", map(png, PICTURES), "png"), ("low", map(png, HALVES), "bmp"),
        ("text", map(npy, VECTORS), "npy"),
    ):  # fmt: skip
        (root / name / "deep").mkdir(parents=True)
        for i, content in enumerate(contents):
            (root / name / "deep" / f"{i}.{ending}").write_bytes(content)
    places = f"low={root / 'low'},text={root / 'text'}"
    return ["images", "--input", root / "image", "--labels=none", "--conditions", places]


def in_columns(root):
    table = pa.table({
        "image": [png(a) for a in PICTURES], "edge": [{"bytes": png(a)} for a in HALVES],
        "embedding": VECTORS.tolist(), "label": list(range(COUNT)),
    })  # fmt: skip
    root.mkdir()
    parquet.write_table(table, root / "train.parquet", row_group_size=2)
    words = ["--image_key=image", "--conditions=low=edge,text=embedding"]
    return ["huggingface", "--input", root, *words]


def in_members(root):
    root.mkdir()
    with tarfile.open(root / "0.tar", "w") as archive:
        for i in range(COUNT):
            for ending, content in {
                "jpg": png(PICTURES[i]), "edge.png": png(HALVES[i]), "cls": str(i).encode(),
                "text.npy": npy(VECTORS[i]),
            }.items():  # fmt: skip
                member = tarfile.TarInfo(f"{i:03d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return ["webdataset", "--input", root, "--conditions=low=edge.png,text=text.npy"]


def prepared(root, words):
    output = root / "records"
    words = [*map(str, words), "--output", str(output), "--preview=0"]
    assert prepare_dataset.main(words) == 0
    return dataset.open_records(output)


@pytest.mark.parametrize("write_set", [in_folders, in_columns, in_members])
def test_conditions_lie_beside_the_samples_that_they_are_of(write_set, tmp_path):
    words = [*write_set(tmp_path / "set"), "--image_size=8", "--vae=none"]
    records = prepared(tmp_path, words)
    assert {k: (s, str(d)) for k, (s, d) in records.features.items()} == {
        "low": ((8, 8, 1), "uint8"), "text": ((3,), "float32")
    }  # fmt: skip
    found = records.holding(("low", "text")).read(np.arange(COUNT))
    np.testing.assert_array_equal(found["image"][..., 0], PICTURES)
    np.testing.assert_array_equal(found["low"][..., 0], HALVES)
    np.testing.assert_array_equal(found["text"], VECTORS.astype(np.float32))


@pytest.mark.parametrize("one_file", [True, False])
def test_conditions_of_arrays_of_latents(one_file, tmp_path):
    latents = DRAW.normal(size=(COUNT, 4, 4, 6)).astype(np.float32)
    low = DRAW.normal(size=(COUNT, 4, 4, 2)).astype(np.float16)
    arrays = {"latents": latents, "labels": np.arange(COUNT), "low": low}
    root = tmp_path / "set"
    root.mkdir()
    if one_file:
        np.savez(root / "train.npz", **arrays)
    else:
        for name, array in arrays.items():
            np.save(root / f"{name}.npy", array)
    how = ["--content=samples", "--layout=nhwc", "--conditions=low"]
    records = prepared(tmp_path, ["arrays", "--input", root, *how])
    found = records.holding(("low",)).read(np.arange(COUNT))
    np.testing.assert_array_equal(found["moments"][..., :6], latents)
    np.testing.assert_array_equal(found["low"], low)


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda root: (root / "low" / "deep" / "3.bmp").unlink(), "holds no file deep/3 beside"),
        (lambda root: np.save(root / "text" / "deep" / "4.npy", np.zeros(4)),
         r"4.npy: text is float32 \(4,\), that of the first record float32 \(3,\)"),
        (lambda root: np.save(root / "text" / "deep" / "2.npy", np.zeros(3, np.int32)),
         r"2.npy: text is int32 \(3,\), that of the first record float32"),
        (lambda root: np.save(root / "text" / "deep" / "1.npy", np.full(3, np.nan)),
         "1.npy: not finite"),
        (lambda root: (root / "low" / "deep" / "1.bmp").write_bytes(b"nothing"),
         "cannot read the image .*1.bmp"),
    ],
)  # fmt: skip
def test_a_condition_that_is_none_is_told_by_its_record(change, line, tmp_path, capsys):
    words = in_folders(tmp_path / "set")
    change(tmp_path / "set")
    words = [*map(str, words), "--image_size=8", "--vae=none", "--output", str(tmp_path / "out")]
    assert prepare_dataset.main(words) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and re.search(line, error), error


# Of images that are drawn ---------------------------------------------------------------------

GIVEN = ["dataset.conditions=low,text,state", "dataset.kept_conditions=low"]
GIVEN += ["dataset.condition_shapes=uint8:4x4x1,float32:3x5,float32:2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of a run with conditions, its config, raw records, their folder)."""
    folder, raw = tmp_path_factory.mktemp("run"), batch(12)
    config, _ = make.run(folder / "run", *make.NETWORKS["flow"], *GIVEN)
    return folder / "run", config, raw, write(folder / "records", raw)


@pytest.fixture(scope="module")
def model(run):
    return generator.load(run[0])


def rows(raw, n=4):
    return {name: raw[name][:n] for name in ("low", "text", "text_mask", "state")}


def test_the_generator_draws_by_conditions(run, model):
    raw = run[2]
    plain = model.sample(raw["label"][:4], conditions=rows(raw), output="float")
    for name in ("low", "text", "state"):
        other = rows(raw) | {name: raw[name][4:8]}
        drawn = model.sample(raw["label"][:4], conditions=other, output="float")
        assert np.abs(drawn - plain).max((1, 2, 3)).min() > 1e-5, name
    one = model.sample(raw["label"][:4], conditions=rows(raw) | {"state": raw["state"][1]})
    same = model.sample([raw["label"][1]], model.noise(4)[1:2], conditions=rows(raw, 2) | {
        name: raw[name][1:2] for name in rows(raw)
    })  # fmt: skip
    np.testing.assert_array_equal(one[1], same[0])
    function = jax.jit(model.function())
    z, given = model.noise(4), rows(raw)
    drawn = function(model.params, z, raw["label"][:4], conditions=given)
    np.testing.assert_allclose(drawn, plain, atol=1e-5)


def test_what_is_left_out_is_dropped(run, model):
    """It is as if all were dropped for guidance, whatever the other rows hold."""
    raw, (made, config) = run[2], (model.parts, run[1])
    drawn = model.sample([3] * 4, conditions={"low": raw["low"][:4]}, output="float")
    given = {"y": np.arange(4), **made.codec.conditions_of(raw | rows(raw, 12))}
    given = jax.tree.map(lambda a: a[:4], made.method.unconditional(given))
    setting = sample.settings(config.sampling)[0]
    index, params = np.arange(4), model.params
    x = jax.jit(lambda p, g: sample.generate(made, 0, p, index, g, setting))(params, given)
    np.testing.assert_allclose(drawn, x, atol=1e-5)


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda c: c.pop("low"), "low .uint8:4x4x1. is needed"),
        (lambda c: c.update(mask=c["low"]), "mask is none of those of the network: low, text"),
        (lambda c: c.update(low=c["low"][:, :2]), r"low \(4, 2, 4, 1\) instead of \(4, 4, 4, 1\)"),
        (lambda c: c.update(state=np.full(2, np.inf)), "state is not finite"),
        (lambda c: c.update(state=np.array(["a", "b"])), "state is of <U1, not of numbers"),
        (lambda c: c.update(low=c["low"].astype(int) + 9), "low: int64 up to .* is uint8"),
        (
            lambda c: c.update(text_mask=c["text_mask"] * 0.5),
            "text_mask is float64 .* true or false",
        ),
    ],
)
def test_conditions_that_do_not_fit_are_refused(change, line, run, model):
    given = rows(run[2])
    change(given)
    with pytest.raises(ValueError, match=line):
        model.sample(run[2]["label"][:4], conditions=given)


def test_a_sampling_job_writes_conditions_and_truth_beside(run, tmp_path):
    """Each with the label and the truth of its record; from a file with what the file says."""
    folder, config, raw, root = run
    made = parts.make(config)
    params = weights.choose(weights.read(folder), "ema")
    renderer = sample.Renderer(made, parts.load_autoencoder(config.dataset, "float32"), 0, 4)
    np.savez(
        tmp_path / "c.npz", label=raw["label"][:6], **{k: a[:6] for k, a in rows(raw, 12).items()}
    )
    setting = sample.settings(config.sampling)[0]
    for name, words in {
        "records": [f"dataset.root={root}"], "file": [f"sampling.conditions={tmp_path / 'c.npz'}"]
    }.items():  # fmt: skip
        options = make.config(
            *make.PIXELS, *make.NETWORKS["flow"], *GIVEN, *words, "sampling.num_images=6"
        )
        source = conditions.source(made.codec.given, options.dataset, options.sampling)
        sample.run(renderer, params, options.sampling, 3, tmp_path / name, setting, source)
        found = sorted(path.name for path in (tmp_path / name).glob("00000*"))
        assert len(found) == 6 * (3 if name == "records" else 2)
        kind = source(np.arange(6))
        for i in range(6):
            assert f"{i:06d}_class{kind['label'][i]}.png" in found
            shown = np.asarray(Image.open(tmp_path / name / f"{i:06d}_low.png"))
            np.testing.assert_array_equal(shown, kind["low"][i, ..., 0])
            if name == "records":
                shown = np.asarray(Image.open(tmp_path / name / f"{i:06d}_truth.png"))
                np.testing.assert_array_equal(shown, kind["image"][i, ..., 0])
        assert (tmp_path / name / "pairs.png").exists()


def test_an_evaluation_draws_by_every_record_in_an_order_by_chance(run):
    folder, config, raw, root = run
    config = make.config(*make.PIXELS, *make.NETWORKS["flow"], *GIVEN, f"dataset.root={root}")
    made, params = parts.make(config), weights.choose(weights.read(folder), "ema")
    source = conditions.source(made.codec.given, config.dataset, config.sampling)
    order = source.places
    assert sorted(order) == list(range(12)) and order.tolist() != list(range(12))
    np.testing.assert_array_equal(source(np.arange(12, 20))["low"], raw["low"][order[:8]])
    score = types.SimpleNamespace(
        batch_size=4, options=types.SimpleNamespace(labels="data", metrics=())
    )
    ours = evaluate.Evaluator(
        made,
        parts.load_autoencoder(config.dataset, "float32"),
        score,
        config.sampling,
        None,
        source,
    )
    setting = sample.settings(config.sampling)[0]
    x = ours.draw(params, np.int32(4), setting, ours.conditions(4))
    theirs = {name: array[order[4:8]] for name, array in raw.items()}
    given = {"y": theirs["label"], **made.codec.conditions_of(theirs)}
    draw = jax.jit(lambda p, g: sample.generate(made, 0, p, np.arange(4, 8), g, setting))
    np.testing.assert_allclose(x, draw(params, given), atol=1e-5)


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda c: c.pop("low"), "holds no low, only"),
        (lambda c: c.update(low=c["low"][:3]), "not a row for each image: 3 of low"),
        (
            lambda c: c.update(state=c["state"][:, :1]),
            r"state: float32 \(12, 1\) instead of .* Nx2",
        ),
        (lambda c: c["state"].__setitem__(5, np.nan), "state: row 5 is not finite"),
        (lambda c: c.update(low=c["low"] + 9.0), "low: float64 up to .* is uint8"),
        (lambda c: c.update(text_mask=c["text_mask"][:, :2]), r"text_mask is bool \(12, 2\)"),
    ],
)
def test_a_file_of_conditions_that_does_not_fit_is_refused(change, line, model, tmp_path):
    arrays = {k: np.array(a) for k, a in rows(batch(12), 12).items()}
    change(arrays)
    np.savez(tmp_path / "c.npz", **arrays)
    with pytest.raises(ValueError, match=line):
        conditions.of_file(files.path(tmp_path / "c.npz"), model.conditions)


def test_the_demo_offers_conditions(run, gradio):
    model = Model(3, "method.name=flow")
    model.conditions = generator.load(run[0]).conditions
    taken, plain = [], model.sample
    model.sample = lambda *a, conditions, **k: taken.append(conditions) or plain(*a, **k)
    demo.page(gradio, model, demo.controls(model, 2), "mine")
    assert [type(part).__name__ for part in gradio.inputs[-3:]] == [
        "ImageEditor",
        "Textbox",
        "Textbox",
    ]
    painted = np.zeros((64, 128), np.uint8)
    painted[:, 64:] = 255
    gradio.draw("1", 0, 1, 1.0, {"composite": painted}, "", "0.5, 2")
    (given,) = taken
    assert given.keys() == {"low", "state"} and given["low"].dtype == np.uint8
    np.testing.assert_array_equal(given["low"][..., 0], np.repeat([[0, 0, 255, 255]], 4, axis=0))
    np.testing.assert_array_equal(given["state"], np.float32([0.5, 2]))
    with pytest.raises(gradio.Error, match="state: 2 numbers"):
        gradio.draw("1", 0, 1, 1.0, None, "", "1 2 3")


def test_image_conditions_beside_latents_are_encoded_like_them(golden, tmp_path):
    """Their mean, that of the mirrored picture too; and training reads what it asks for."""
    vae = golden / "vae" / "tiny"
    words = [*in_folders(tmp_path / "set"), "--image_size=16", f"--vae={vae}", "--flip=True"]
    low = [word.replace("/low", "/image") for word in map(str, words)]  # the pictures themselves
    records = prepared(tmp_path, low)
    views = ("low_latent", "low_latent_flipped")
    assert sorted(records.features) == [*views, "text"]
    found = records.holding(views).read(np.arange(COUNT))
    c = found["low_latent"].shape[-1]
    np.testing.assert_allclose(found["low_latent"], found["moments"][..., :c], atol=1e-5)
    mirrored = found["moments_flipped"][..., :c]
    np.testing.assert_allclose(found["low_latent_flipped"], mirrored, atol=1e-5)
    assert np.abs(found["low_latent_flipped"] - found["low_latent"]).max() > 1e-3
    h, w, _ = records.shape[:3]
    options = [f"dataset.root={records.root}", f"dataset.image_size={h}", f"dataset.vae={vae}"]
    options += [f"dataset.image_channels={c}", "dataset.num_classes=0", "dataset.use_flip=true"]
    options += ["method.guidance_eq=none", "dataset.conditions=low", *make.NETWORKS["DiT"]]
    config = run_config.settle(make.config(*options, "training.batch_size=4"), tmp_path, {})
    assert config.dataset.condition_shapes == (f"latent:{h}x{w}x{c}",)
    batch = parts.open_records(config.dataset, 4).read(np.arange(3))
    assert {*views, "moments", "moments_flipped", "label"} == batch.keys()
    x, given = parts.make(config).codec.encode(batch, jax.random.key(0))
    assert given["low"].shape == x.shape
