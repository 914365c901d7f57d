"""Conditions that come with the data: what records say of them, and what networks make of them."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import make
import numpy as np
import pytest
import test_devices
from jobs import Jobs, assert_equal_runs
from test_devices import flatten

import parts
import sample
import train
from benchmarks import costs
from methods.sampler import sample_times
from models import codec, network
from run import config as run_config
from utils import conditions, dataset, iterator

SHAPES = {"low": "uint8:4x4x1", "text": "float32:3x5", "state": "float32:2"}
CONDITIONS = [
    "dataset.conditions=low,text,state",
    f"dataset.condition_shapes={','.join(SHAPES.values())}",
]
PMF = [
    *make.NETWORKS["imfDiT"][:-3],
    "model.cls=pmfDiT",
    "model.hidden_size=16",
    "method.name=pixel",
]
NETWORKS = {name: make.NETWORKS[name] for name in ("DiT", "imfDiT", "flow")} | {"pmfDiT": PMF}


def made(cls, *words, given=CONDITIONS):
    """The parts of a network with all kinds of conditions."""
    return parts.make(
        make.config(*make.PIXELS, *NETWORKS.get(cls, make.NETWORKS.get(cls)), *given, *words)
    )


def batch(count=8, seed=0):
    """Raw records."""
    draw = np.random.RandomState(seed)
    return {
        "image": draw.randint(0, 256, (count, 4, 4, 1)).astype(np.uint8),
        "label": draw.randint(0, 3, count).astype(np.int32),
        "low": draw.randint(0, 256, (count, 4, 4, 1)).astype(np.uint8),
        "text": draw.normal(size=(count, 3, 5)).astype(np.float32),
        "text_mask": np.arange(3) < draw.randint(1, 4, (count, 1)),
        "state": draw.normal(size=(count, 2)).astype(np.float32),
    }


def passed(model, params, raw, null=(), dtype=None):
    """u of the network for noise and conditions of raw records, those of `null` dropped."""
    given = model.codec.conditions_of(raw)
    given["null"] = {
        name: jnp.full(len(raw["label"]), name in null) for name in given.get("null", {})
    }
    z = jax.random.normal(jax.random.key(0), (len(raw["label"]), *model.image_shape))
    t = jnp.linspace(0.2, 0.9, len(z))
    c = {"t": t, "h": t / 2, "y": jnp.asarray(raw["label"]), **given}
    return np.asarray(jax.jit(model.net)(params, (z, c))[0].u)


@pytest.mark.parametrize("cls", NETWORKS)
def test_a_network_heeds_each_condition_by_row(cls):
    """Another value changes its rows alone; what is dropped or no true token does not count."""
    model = made(cls)
    params, raw, other = make.params(model.module, model.image_shape, 0.3), batch(), batch(seed=1)
    plain = passed(model, params, raw)
    for name in SHAPES:
        mixed = np.array(raw[name])
        mixed[::2] = other[name][::2]
        changed = np.abs(passed(model, params, raw | {name: mixed}) - plain).max((1, 2, 3)) > 1e-4
        assert changed.tolist() == [True, False] * 4, name
        without = [passed(model, params, raw | {name: a}, {name}) for a in (raw[name], mixed)]
        np.testing.assert_array_equal(*without)
        assert np.abs(without[0] - plain).max() > 1e-3
    garbage = np.where(raw["text_mask"][..., None], raw["text"], 1e3)
    np.testing.assert_array_equal(passed(model, params, raw | {"text": garbage}), plain)


def test_a_u_net_takes_vectors_and_arrays_and_no_tokens():
    given = ["dataset.conditions=low,state", "dataset.condition_shapes=uint8:4x4x1,float32:2"]
    model = made("UNet", given=given)
    params, raw, other = make.params(model.module, model.image_shape, 0.3), batch(), batch(seed=1)
    plain = passed(model, params, raw)
    for name in ("low", "state"):
        assert np.abs(passed(model, params, raw | {name: other[name]}) - plain).max() > 1e-4, name
    with pytest.raises(ValueError, match="UNet takes no condition of the kind tokens"):
        made("UNet")


@pytest.mark.parametrize("cls", [*NETWORKS, "UNet"])
def test_weights_of_a_network_without_conditions_give_its_outputs_exactly(cls, tmp_path):
    words = [*make.PIXELS, *NETWORKS.get(cls, make.NETWORKS["UNet"])]
    _, params = make.run(tmp_path, *words[len(make.PIXELS) :])
    given = ["dataset.conditions=low,state", "dataset.condition_shapes=uint8:4x4x1,float32:2"]
    config = make.config(*words, *given, f"init_from={tmp_path}")
    before, now = parts.make(make.config(*words)), parts.make(config)
    fresh = network.init_params(now.module, jax.random.key(1), now.image_shape)
    params, line = make.begin(config, now.module, jax.device_get(fresh))
    assert "new: conditions/" in line
    without = {name: tree for name, tree in params.items() if name != "conditions"}
    outputs = [passed(m, p, batch()) for m, p in ((before, without), (now, params))]
    np.testing.assert_array_equal(*outputs)


def test_no_condition_is_the_network_as_it_was():
    """Its parameters by name, and its program."""
    plain = parts.make(make.config(*make.PIXELS, *make.NETWORKS["DiT"]))
    assert plain.module.given == () and "conditions" not in plain.param_shapes()
    given = plain.codec.encode({k: batch()[k] for k in ("image", "label")}, jax.random.key(0))[1]
    assert list(given) == ["y"]


# What is read ---------------------------------------------------------------------------------


def write(root, raw, split="train", **tensors):
    """A dataset of raw records; returns its folder."""
    tensors = {
        name: (rows.shape[1:], rows.dtype)
        for name, rows in raw.items()
        if name not in ("image", "label")
    } | tensors
    examples = [{name: rows[i] for name, rows in raw.items()} for i in range(len(raw["label"]))]
    root.mkdir(parents=True, exist_ok=True)
    count = dataset.write_shard(dataset.shard_path(root, split, 0, 1), examples)
    dataset.write_metadata(
        root, "image", (4, 4, 1), np.uint8, 3, {split: [count]}, conditions=tensors
    )
    return root


def settled(root, tmp_path, *words):
    config = make.config(
        *make.PIXELS, *make.NETWORKS["DiT"], f"dataset.root={root}", "training.batch_size=8", *words
    )
    return run_config.settle(config, tmp_path, {})


def test_records_carry_conditions_and_only_those_that_are_asked_for(tmp_path):
    raw = batch(16)
    root = write(tmp_path / "data", raw)
    config = settled(root, tmp_path, "dataset.conditions=text,low", "dataset.kept_conditions=low")
    assert config.dataset.condition_shapes == ("float32:3x5", "uint8:4x4x1")
    records = parts.open_records(config.dataset, 8)
    found = records.read(np.array([5, 2]))
    assert found.keys() == {"image", "label", "text", "text_mask", "low"}
    for name, rows in found.items():
        np.testing.assert_array_equal(rows, raw[name][[5, 2]])
    plain = parts.open_records(settled(root, tmp_path).dataset, 8)
    assert plain.read(np.arange(2)).keys() == {"image", "label"}
    assert plain.identity["sample"] == records.identity["sample"]
    assert "conditions" in records.identity and "conditions" not in plain.identity


@pytest.mark.parametrize(
    "words, line",
    [
        ("conditions=low,mask", "holds no mask; beside sample and label it holds low, state, text"),
        ("conditions=low,low", "'low' is there twice"),
        ("conditions=y condition_shapes=float32:3", "a name of the program's own"),
        ("conditions=low kept_conditions=text", "text is none of dataset.conditions"),
        ("conditions=low condition_shapes=uint8:4x4x3", "as uint8:4x4x1, the config asks for"),
        ("conditions=low condition_shapes=4by4", "is not as uint8:8x8x1"),
        ("conditions=low condition_shapes=uint8:8x8x1", "arrays of the sample's size 4x4"),
    ],
)
def test_conditions_that_cannot_be_meant_are_refused(words, line, tmp_path):
    root = write(tmp_path / "data", batch(8))
    with pytest.raises(ValueError, match=line):
        config = settled(root, tmp_path, *(f"dataset.{word}" for word in words.split()))
        parts.open_records(config.dataset, 8)


def test_a_mask_of_another_number_of_tokens_is_refused(tmp_path):
    root = write(tmp_path / "data", batch(8) | {"text_mask": np.ones((8, 2), bool)})
    with pytest.raises(ValueError, match=r"text_mask \(2,\) beside text float32:3x"):
        parts.open_records(settled(root, tmp_path, "dataset.conditions=text").dataset, 8)


def test_a_mirrored_image_has_mirrored_conditions():
    model = made("DiT", "dataset.use_flip=true")
    raw = batch(32)
    raw["low"] = raw["image"]
    x, given = model.codec.encode(raw, jax.random.key(0))
    np.testing.assert_array_equal(x, given["low"])
    assert not np.array_equal(x, raw["image"] / np.float32(127.5) - 1)  # some are mirrored
    np.testing.assert_array_equal(given["text"], raw["text"])


def test_latents_of_a_condition_are_normalised_and_mirrored_like_the_sample():
    one = conditions.Condition("low", (4, 4, 2), "latent")
    ours = codec.Codec(codec.normalisation((1.0, 2.0), (2.0, 4.0), 2), flip=True, given=(one,))
    draw = np.random.RandomState(0)
    mean, mirrored = draw.normal(size=(2, 16, 4, 4, 2)).astype(np.float32)
    moments, flipped = (np.concatenate([a, 0 * a], axis=-1) for a in (mean, mirrored))
    raw = {"moments": moments, "moments_flipped": flipped, "label": np.zeros(16, np.int32)}
    raw |= {"low_latent": mean, "low_latent_flipped": mirrored}
    x, given = ours.encode(raw, jax.random.key(0))
    np.testing.assert_allclose(x, given["low"], atol=1e-6)
    np.testing.assert_allclose(ours.conditions_of(raw)["low"], (mean - [1, 2]) / [2, 4], atol=1e-6)


# Guidance -------------------------------------------------------------------------------------


def test_conditions_are_dropped_with_the_label_or_kept():
    model = made("DiT", "dataset.kept_conditions=low")
    given = {"y": jnp.arange(4), **model.codec.conditions_of(batch(4))}
    assert given["null"].keys() == {"text", "state"}
    dropped = model.method.dropped(given, jnp.array([True, False, True, False]))
    assert dropped["y"].tolist() == [3, 1, 3, 3]
    assert {k: v.tolist() for k, v in dropped["null"].items()} == dict.fromkeys(
        ("text", "state"), [True, False, True, False]
    )
    assert all(rows.all() for rows in model.method.unconditional(given)["null"].values())
    np.testing.assert_array_equal(dropped["low"], given["low"])


def test_a_condition_that_is_dropped_is_enough_for_guidance():
    words = [*make.PIXELS, *make.NETWORKS["DiT"], "dataset.num_classes=0"]
    with pytest.raises(ValueError, match="without classes there is no guidance"):
        parts.make(make.config(*words))
    parts.make(make.config(*words, *CONDITIONS))
    with pytest.raises(ValueError, match="without classes there is no guidance"):
        parts.make(make.config(*words, *CONDITIONS, "dataset.kept_conditions=low,text,state"))


@pytest.mark.parametrize("name", parts.OBJECTIVES)
def test_every_objective_gives_conditions_to_every_pass(name):
    """With guidance: all rows of all passes have them, and none asks for a rank."""
    cls = {"improved": "imfDiT", "pixel": "pmfDiT", "lagrangian": "DiT"}.get(name, "DiT")
    words = [f"method.name={name}", "dataset.kept_conditions=low"]
    words += ["method.data_proportion=0"] if name == "consistency" else []
    model, seen = made(cls, *words), []
    x, given = jax.eval_shape(model.codec.encode, batch(16), jax.random.key(0))
    draws = jax.eval_shape(lambda: model.method.draw(jax.random.key(1), x.shape, 0))
    params = {"a": jax.ShapeDtypeStruct((), jnp.float32)}

    def net(params, *batches, **how):
        for z, c in batches:
            assert {n: c[n].shape[1:] for n in SHAPES} == {n: given[n].shape[1:] for n in SHAPES}
            assert len(c["low"]) == len(c["null"]["text"]) == len(c["text_mask"]) == len(z)
            assert c["null"].keys() == {"text", "state"}
        seen.extend(batches)
        return tuple(network.Velocity(z * params["a"], z) for z, c in batches)

    def loss(params, x, given, draws):
        return model.method.loss(net, params, x, given, draws, {"ema_params": params})[0]

    assert jax.eval_shape(loss, params, x, given, draws).shape == () and seen


# Training -------------------------------------------------------------------------------------


def gradient(model, params, raw, chosen=None):
    """The gradient of the loss, flat, with the draws of one key."""
    x, given = model.codec.encode(raw, jax.random.key(0))
    draws = model.method.draw(jax.random.key(1), x.shape, 0)

    def loss(params):
        return model.method.loss(
            model.net, model.gather(params), x, given, draws, {"ema_params": params}
        )[0]

    grads = jax.jit(jax.grad(loss))(params)
    return flatten(grads if chosen is None else grads[chosen])


@pytest.mark.parametrize("cls", ["DiT", pytest.param("imfDiT", marks=pytest.mark.slow)])
def test_half_precision_points_the_same_way(cls):
    full, half = made(cls), made(cls, "training.half_precision=true")
    params, raw = make.params(full.module, full.image_shape), batch(16)
    for chosen in (None, "conditions"):
        a, b = (gradient(model, params, raw, chosen) for model in (full, half))
        assert 0.9995 < a @ b / np.linalg.norm(a) / np.linalg.norm(b) < 1, chosen


def test_what_is_learned_follows_each_condition_of_its_row(tmp_path):
    """Columns of images say what their conditions do, if these are not shuffled or dropped."""
    draw = np.random.RandomState(0)

    def raw(count):
        said = draw.uniform(-1, 1, (count, 3)).astype(np.float32)
        image = np.zeros((count, 4, 4, 1), np.float32)
        image[:, :, :3, 0] = said[:, None]
        low = np.repeat(said[:, :1], 16, axis=1).reshape(count, 4, 4, 1)
        text = np.broadcast_to(said[:, 1, None, None], (count, 3, 5))
        state = np.stack([said[:, 2], 0 * said[:, 2]], axis=1)
        images = [np.round(127.5 * (a + 1)).astype(np.uint8) for a in (image, low)]
        return said, {
            "image": images[0],
            "label": np.zeros(count, np.int32),
            "low": images[1],
            "text": np.array(text),
            "state": state,
        }

    root = write(tmp_path / "data", raw(256)[1])
    words = [
        "dataset.conditions=low,text,state",
        "method.name=flow",
        "method.class_dropout_prob=0",
        "training.batch_size=32",
    ]
    words += ["training.learning_rate=0.01", "model.hidden_size=32", "training.lr_schedule=cosine"]
    config = settled(root, tmp_path, *words)
    model = parts.make(config)
    recipe, _ = train.make_recipe(config.training, model, 250)
    state = jax.jit(lambda key: train.init_state(recipe, model.module, model.image_shape, key))(
        jax.random.key(0)
    )
    step = jax.jit(lambda state, batch: train.train_step(recipe, jax.random.key(1), state, batch))
    records = parts.open_records(config.dataset, 32)
    with contextlib.closing(iterator.RecordIterator(records, 32, 0, num_workers=0)) as batches:
        for _ in range(250):
            state = step(state, next(batches))
    said, other = raw(64)
    given = {"y": jnp.zeros(64, jnp.int32), **model.codec.conditions_of(other)}
    setting = sample.Setting("heun", sample_times(4))
    x = jax.jit(lambda p: sample.generate(model, 0, p, np.arange(64), given, setting))(state.params)
    for i, name in enumerate(("low", "text", "state")):
        assert np.corrcoef(np.asarray(x)[:, :, i, 0].mean(axis=1), said[:, i])[0, 1] > 0.9, name


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path, run_python):
    given = tuple(
        conditions.Condition(n, s)
        for n, s in (("low", (8, 8, 1)), ("text", (3, 5)), ("state", (2,)))
    )
    one = test_devices.numbers(1, given)
    code = f"""
import sys
sys.path.insert(0, "tests")
import numpy as np, test_devices
from utils.conditions import Condition
np.savez(r"{tmp_path}/8.npz", **test_devices.numbers(2, {given!r}))
"""
    run_python(code, devices=8)
    found = np.load(tmp_path / "8.npz")
    np.testing.assert_allclose(found["losses"], one["losses"], rtol=1e-5)
    assert np.linalg.norm(found["grads"] - one["grads"]) <= 1e-5 * np.linalg.norm(one["grads"])
    difference = np.abs(found["images"].astype(int) - one["images"])
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


@pytest.mark.slow
def test_the_flops_of_a_step_grow_by_what_a_condition_adds():
    """XLA's count of DiT-B/4: the targets of image and text."""

    def flops(*words):
        config = make.config(*words, name="run_b4")
        model = parts.make(config)
        recipe = costs.countable(train.make_recipe(config.training, model, 10)[0], model)
        step = partial(train.train_step, recipe, jax.random.key(0))
        arguments = costs.state_shapes(model, recipe), costs.batch_shapes(config)
        return costs.counted_flops(step, *arguments), model.step_flops(config.training.batch_size)

    plain, ours = flops()
    for words, most in (
        (["dataset.conditions=low", "dataset.condition_shapes=latent:32x32x4"], 1.01),
        (["dataset.conditions=text", "dataset.condition_shapes=float32:77x768"], 141 / 64 * 1.05),
    ):
        counted, told = flops(*words)
        assert 1 < counted / plain <= most
        np.testing.assert_allclose(told / ours, counted / plain, rtol=0.01)


@pytest.mark.slow
def test_a_run_with_conditions_that_is_killed_goes_on_bit_for_bit(tmp_path):
    jobs = Jobs(tmp_path)
    options = {
        "dataset.root": write(tmp_path / "pairs", batch(40)), "dataset.use_flip": True,
        "dataset.conditions": "low,text,state", "dataset.kept_conditions": "low",
        "method.guidance_eq": "cfg", "training.num_steps": 12, "training.sample_steps": "1,2",
        "training.checkpoint_per_epoch": 1,
    }  # fmt: skip
    whole, killed = jobs.killed(options)
    assert_equal_runs(whole, killed)
    pictures = [(run / "samples" / "steps_00000012.png").read_bytes() for run in (whole, killed)]
    assert pictures[0] == pictures[1]
