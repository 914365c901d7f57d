"""Conditions that come with the data: what records say of them, and what networks make of them."""

import jax
import jax.numpy as jnp
import make
import numpy as np
import pytest

import parts
from models import network

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
    with pytest.raises(ValueError, match="UNet takes no condition that is a tokens"):
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
