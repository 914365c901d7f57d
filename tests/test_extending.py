"""The examples of docs/extending.md run as they stand there."""

import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import make
import numpy as np
import pytest

import parts
import train
from models import network
from run import weights
from utils import dataset
from utils.conditions import Condition

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def module(name, source):
    made = types.ModuleType(name)
    exec(compile(source, f"docs/extending.md: {name}", "exec"), vars(made))
    return made


@pytest.fixture(scope="module")
def convnet():
    return module("convnet", BLOCKS[0])


@pytest.fixture(scope="module")
def difference():
    return module("difference", BLOCKS[2])


def test_the_examples_are_short():
    assert len(BLOCKS) == 4
    assert all(len(block.splitlines()) < 60 for block in BLOCKS)
    assert len(BLOCKS[1].splitlines()) == len(BLOCKS[3].splitlines()) == 1


@pytest.fixture
def chosen(convnet, difference, monkeypatch):
    """`parts.py` with the two lines of the page."""
    names = {**vars(parts), "convnet": convnet, "difference": difference}
    names["OBJECTIVES"] = dict(parts.OBJECTIVES)
    for line in (BLOCKS[1], BLOCKS[3]):
        exec(line, names)
    for name in ("BACKBONES", "OBJECTIVES"):
        monkeypatch.setattr(parts, name, names[name])


@pytest.mark.parametrize("method", [pytest.param("meanflow", marks=pytest.mark.slow), "difference"])
def test_a_backbone_trains_and_samples(chosen, tmp_path, method):
    root, workdir = tmp_path / "records", tmp_path / "workdir"
    root.mkdir(), workdir.mkdir()
    images = np.random.RandomState(0).randint(0, 256, (16, 4, 4, 1)).astype(np.uint8)
    examples = [{"image": image, "label": i % 3} for i, image in enumerate(images)]
    dataset.write_shard(dataset.shard_path(root, "train", 0, 1), examples)
    dataset.write_metadata(root, "image", (4, 4, 1), np.uint8, 3, {"train": [16]})
    words = f"""
        dataset.root={root} dataset.image_size=4 dataset.num_classes=3 dataset.num_workers=1
        model.cls=ConvNet model.depth=1 model.hidden_size=8 model.num_heads=0 model.patch_size=0
        method.name={method} method.guidance_eq=none training.batch_size=8 training.num_steps=2
        training.log_per_step=1 training.sample_steps= fid.on_training=true
        fid.num_samples=8 fid.device_batch_size=30
    """.split()
    config = make.config(*words, name="digits")
    parts.check(config)
    state = train.train_job(config, workdir)
    assert state.params["Embed_0"]["embedding"].shape == (4, 8)
    assert (workdir / "samples" / "grid_00000002.png").exists()
    assert (workdir / "results.json").exists()
    found = weights.load(workdir, jax.eval_shape(lambda: state.params), config.dataset)
    jax.tree.map(np.testing.assert_array_equal, found.params, state.params)


def test_an_objective_without_jvp_agrees_with_the_one_with(convnet, difference):
    difference.STEP = 1e-3
    net = convnet.ConvNet(depth=1, hidden_size=8, num_classes=3)
    rng = np.random.RandomState(0)
    x = rng.randn(8, 4, 4, 1).astype(np.float32)
    y = np.arange(8) % 3
    one = make.method(guidance_eq="none", data_proportion=0.5, norm_p=0.5)
    other = difference.Difference(**vars(one))
    draws = one.draw(jax.random.key(0), x.shape)
    shapes = network.param_shapes(net, x.shape[1:])
    params = jax.tree.map(lambda s: 0.15 * rng.randn(*s.shape).astype(np.float32), shapes)

    def both(method):
        def value(params):
            return method.loss(network.function(net), params, x, {"y": y}, draws, {})

        (_, rows), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
        return rows, jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads)])

    (want, want_grad), (got, got_grad) = both(one), both(other)
    np.testing.assert_allclose(got["error"], want["error"], rtol=0.02)
    np.testing.assert_allclose(got["v_loss"], want["v_loss"], rtol=1e-5)
    assert jnp.linalg.norm(got_grad - want_grad) < 0.02 * jnp.linalg.norm(want_grad)


def test_a_backbone_takes_conditions_of_the_data(convnet):
    """Vectors and arrays, which count for nothing at the beginning; tokens are refused."""
    plain = convnet.ConvNet(depth=1, hidden_size=8, num_classes=3)
    given = Condition("low", (4, 4, 2)), Condition("state", (2,))
    net, (z, low, state) = plain.taking(given), np.random.RandomState(0).randn(3, 2, 4, 4, 1)
    c = {"t": np.ones(2), "h": np.ones(2), "y": np.arange(2), "state": state[:, 0, :2, 0]}
    c["low"] = np.concatenate([low, state], axis=-1)
    params = make.params(net, (4, 4, 1), 0.5)
    apply = jax.jit(lambda net, params, c: net.apply({"params": params}, z, c).u, static_argnums=0)
    u = apply(net, params, c)
    for name in ("low", "state"):
        assert np.abs(apply(net, params, c | {name: -c[name]}) - u).max((1, 2, 3)).min() > 1e-4
    fresh = network.init_params(net, jax.random.key(0), (4, 4, 1))
    assert not any(leaf.any() for leaf in jax.tree.leaves(fresh["conditions"]))
    with pytest.raises(ValueError, match="ConvNet takes no condition of the kind tokens, only"):
        plain.taking((Condition("text", (3, 5)),))
