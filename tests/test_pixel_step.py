"""A train step of pixel MeanFlow with a perceptual network, from its files to the gradient."""

from functools import partial

import jax
import make
import numpy as np
import pytest
from parity import test_perceptual
from safetensors.numpy import save_file

import parts
import train
from methods import pixel

PMF = ["model.cls=pmfDiT", *make.SIZES, "model.depth=2", "model.aux_head_depth=1"]
WORDS = [*make.PIXELS, *PMF, "method.name=pixel", "method.data_proportion=0.5"]


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Random VGG16 and the package's weights by channel, where they are looked for."""
    with np.load(test_perceptual.FILE) as file:
        lins = test_perceptual.part(dict(file), "lin/")
    for variable, arrays in (("VGG16_WEIGHTS", test_perceptual.vgg()), ("LPIPS_WEIGHTS", lins)):
        save_file(arrays, tmp_path / f"{variable}.safetensors")
        monkeypatch.setenv(variable, str(tmp_path / f"{variable}.safetensors"))
    monkeypatch.setattr(pixel, "SIDE", 32)  # of the crops, to compute little


def step(*words):
    """The state after a step, and the program's text."""
    config = make.config(*WORDS, "training.batch_size=4", *words)
    model = parts.make(config)
    recipe, _ = train.make_recipe(config.training, model, 10)
    key = jax.random.key(0)
    state = jax.jit(partial(train.init_state, recipe, model.module, model.image_shape))(key)
    state = state._replace(params=make.params(model.module, model.image_shape))
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (4, *model.image_shape)).astype(np.uint8)
    batch = {"image": images, "label": np.arange(4, dtype=np.int32) % 3}
    lowered = jax.jit(partial(train.train_step, recipe, key)).lower(
        state, batch, frozen := parts.load_frozen(model)
    )
    return jax.device_get(lowered.compile()(state, batch, frozen)), lowered.as_text()


def test_the_gradient_of_lpips_arrives(weights):
    without, _ = step()
    with_it, text = step("method.lpips_weight=0.4")
    assert without.sums["loss_lpips"] == 0 < with_it.sums["loss_lpips"]
    for name in ("loss_u", "loss_v"):  # the other terms stay
        np.testing.assert_allclose(with_it.sums[name], without.sums[name], rtol=1e-5)
    assert np.isfinite(with_it.sums["grad_norm"])
    assert abs(with_it.sums["grad_norm"] / without.sums["grad_norm"] - 1) > 1e-3
    assert len(text) < 2_000_000  # 15 million weights are arguments, no constants


def test_above_its_time_nothing_counts(weights):
    state, _ = step("method.lpips_weight=0.4", "method.perceptual_max_t=0")
    assert state.sums["loss_lpips"] == 0


def test_weights_that_lack_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VGG16_WEIGHTS", raising=False)
    model = parts.make(make.config(*WORDS, "method.lpips_weight=0.4"))
    with pytest.raises(FileNotFoundError, match=r"no VGG16 for LPIPS: put vgg16-397923af\.pth"):
        parts.load_frozen(model)
