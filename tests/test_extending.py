"""The examples of docs/extending.md run as they stand there."""

import inspect
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sample
import train
from configs import load_config
from models import meanflow
from utils import dataset

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def module(name, source):
    made = types.ModuleType(name)
    exec(compile(source, f"docs/extending.md: {name}", "exec"), vars(made))
    return made


@pytest.fixture(scope="module")
def convnet():
    return module("convnet", BLOCKS[0])


def test_the_examples_are_short():
    assert len(BLOCKS) == 3
    assert all(len(block.splitlines()) < 60 for block in BLOCKS)


def test_a_backbone_trains_and_samples(convnet, monkeypatch, tmp_path):
    source = inspect.getsource(sample.make_net)
    changed = source.replace("    return dit.build(", BLOCKS[1] + "    return dit.build(")
    assert changed != source
    names = {**vars(sample), "convnet": convnet}
    exec(changed, names)
    monkeypatch.setattr(sample, "make_net", names["make_net"])

    root, workdir = tmp_path / "records", tmp_path / "workdir"
    root.mkdir(), workdir.mkdir()
    images = np.random.RandomState(0).randint(0, 256, (16, 4, 4, 1)).astype(np.uint8)
    examples = [{"image": image, "label": i % 3} for i, image in enumerate(images)]
    dataset.write_shard(dataset.shard_path(root, "train", 0, 1), examples)
    dataset.write_metadata(root, "image", (4, 4, 1), np.uint8, 3, {"train": [16]})
    words = f"""
        dataset.root={root} dataset.image_size=4 dataset.num_classes=3 dataset.num_workers=1
        model.cls=ConvNet model.depth=1 model.hidden_size=8 training.batch_size=8
        training.num_steps=2 training.log_per_step=1 fid.num_samples=8 fid.device_batch_size=30
    """.split()
    config, _ = load_config.from_command_line(
        ["--config=configs/load_config.py:digits", *(f"--config.{word}" for word in words)]
    )
    state = train.train_job(config, workdir)
    assert state.params["Embed_0"]["embedding"].shape == (4, 8)
    assert (workdir / "samples" / "grid_00000002.png").exists()
    assert (workdir / "results.json").exists()
    weights = sample.load_weights(
        workdir, jax.eval_shape(lambda: state.params)
    )  # the checkpoint holds it too
    jax.tree.map(np.testing.assert_array_equal, weights["params"], state.params)


def test_an_objective_without_jvp_agrees_with_the_one_with(convnet):
    difference = module("difference", BLOCKS[2])
    difference.STEP = 1e-3
    net = convnet.ConvNet(depth=1, hidden_size=8, num_classes=3)
    rng = np.random.RandomState(0)
    x = rng.randn(8, 4, 4, 1).astype(np.float32)
    y = np.arange(8) % 3
    method = meanflow.MeanFlow(guidance_eq="none", data_proportion=0.5, norm_p=0.5)
    draws = meanflow.draw(jax.random.key(0), x.shape, method)
    one = jnp.zeros(1)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(1), x[:1], one, one, y[:1])["params"])
    params = jax.tree.map(lambda s: 0.15 * rng.randn(*s.shape).astype(np.float32), shapes)

    def function(params, *batch):
        return net.apply({"params": params}, *batch)

    def both(loss):
        def value(params):
            return loss(function, params, x, y, draws, method, null_label=3, num_equal=4)

        (_, rows), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
        return rows, jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads)])

    (want, want_grad), (got, got_grad) = both(meanflow.loss), both(difference.loss)
    np.testing.assert_allclose(got["error"], want["error"], rtol=0.02)
    np.testing.assert_allclose(got["v_loss"], want["v_loss"], rtol=1e-5)
    assert jnp.linalg.norm(got_grad - want_grad) < 0.02 * jnp.linalg.norm(want_grad)
    assert inspect.signature(difference.loss) == inspect.signature(meanflow.loss)
    assert "meanflow.loss(" in inspect.getsource(train.gradients)
