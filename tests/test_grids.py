"""The pictures of a run while it trains: real images, rows by steps and by guidance."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import make
import numpy as np
import pytest
from PIL import Image

import grids
import sample
from methods.sampler import SAMPLERS, integrate, sample_times


class Records:
    """A set of 2 x 2 pixels whose value is their number, and that counts what is read."""

    key, shape, dtype, root = "image", (2, 2, 1), np.dtype(np.uint8), "r"

    def __init__(self, labels):
        self.labels, self.num_records, self.read_count = np.asarray(labels), len(labels), 0

    def read(self, indices, flipped):
        assert not flipped
        self.read_count += len(indices)
        images = np.broadcast_to(np.reshape(indices, (-1, 1, 1, 1)), (len(indices), *self.shape))
        return {"image": images.astype(np.uint8), "label": self.labels[indices]}


def numbers(batch):
    return batch["image"][:, 0, 0, 0].tolist()


def test_records_of_each_class():
    records = Records([0, 1, 1, 2, 0, 1])
    batch, found = grids.of_classes(records, np.array([1, 1, 0, 0, 0, 3]))
    assert found.tolist() == [True, True, True, True, False, False]
    assert numbers(batch) == [1, 2, 0, 4, 0, 0]
    assert batch["label"].tolist() == [1, 1, 0, 0, 0, 3] and batch["label"].dtype == np.int32
    batch, found = grids.of_classes(records, np.zeros(4, int), labelled=False)
    assert found.all() and numbers(batch) == [0, 1, 2, 3]


@pytest.mark.parametrize("limits", [dict(SEARCHED=20), dict(SEARCHED_BYTES=80, CHUNK=10)])
def test_what_is_read_is_little_and_spread_over_all(monkeypatch, limits):
    for name, value in limits.items():
        monkeypatch.setattr(grids, name, value)
    records = Records(np.arange(200) // 20)  # sorted by class, as folders are
    batch, found = grids.of_classes(records, np.array([0, 9, 9, 9, 5]))
    assert records.read_count <= 20 and found.tolist() == [True, True, True, False, True]
    assert [n // 20 for n in numbers(batch)] == [0, 9, 9, 0, 5]
    records = Records([0] * 200)
    grids.of_classes(records, np.array([0, 0]))
    assert records.read_count <= 20


def test_scales_of_guidance():
    improved = make.method("improved", omega_max=8.0)
    assert grids.scales(improved) == pytest.approx((1, 2, 4, 8))
    assert grids.scales(make.method("improved", omega_max=1.0)) == ()
    for name in ("meanflow", "flow"):
        assert grids.scales(make.method(name)) == ()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_without_length_change_nothing(sampler):
    net = make.as_net(lambda params, z, t, h, y: params * z * (1 + t - h)[:, None, None, None])
    noise = jax.random.normal(jax.random.key(0), (2, 2, 2, 1))

    def images(times):
        return integrate(
            make.method(), net, jnp.float32(0.7), noise, {"y": jnp.zeros(2, int)}, times,
            sampler=sampler, fresh=lambda k: noise + k,
        )  # fmt: skip

    for steps in (1, 2, 4):
        times = sample_times(steps)
        longer = grids.padded(times, 4, sampler)
        assert len(longer) == 5 and longer.dtype == jnp.float32
        np.testing.assert_array_equal(images(longer), images(times))


class Renderer:
    """Stands in for `sample.Renderer`: an image tells the number of steps and the guidance."""

    def __init__(self):
        self.asked = []

    def __call__(self, params, labels, setting, given=None):
        times, guidance = setting.times, setting.guidance
        steps = int((np.diff(times) < 0).sum())
        scale = 0 if guidance is None else float(guidance.omega)
        self.asked.append((len(labels), len(times) - 1, steps, scale))
        yield np.full((len(labels), 32, 32, 1), 10 * steps + round(10 * scale), np.uint8)


@pytest.fixture
def drawn(tmp_path):
    """Function (config) -> `Grids` that has drawn step 7, and what went into the log."""

    def draw(config):
        method = make.method(config.method.name, omega_max=config.method.omega_max) \
            if config.method.name == "improved" else make.method()  # fmt: skip
        model = SimpleNamespace(method=method, num_classes=config.dataset.num_classes)
        options, steps = config.sampling, config.training.sample_steps
        found, shown = grids.Grids(options, steps, tmp_path, model, Renderer(), None), []
        writer = SimpleNamespace(image=lambda step, name, image: shown.append((step, name)))
        found.draw(7, None, writer)
        return found, shown

    return draw


def rows(file):
    """The value of each row of a picture with images of 32 pixels and frames of 2."""
    image = np.asarray(Image.open(file).convert("L"))
    assert image.shape[1] == 36 * sample.GRID_COLUMNS
    return image[18::36, 18].tolist()


def test_pictures_by_steps_and_by_guidance(drawn, tmp_path):
    config = make.config("sampling.num_steps=1,2", "sampling.omega=1.5", name="digits_imf")
    found, shown = drawn(config)
    names = ["samples_by_steps", "samples_by_guidance", "samples_2step", "samples"]
    assert shown == [(7, name) for name in names]
    folder = tmp_path / "samples"
    assert sorted(path.name for path in folder.iterdir()) == [
        "grid_00000007.png", "grid_00000007_2step.png", "guidance_00000007.png",
        "steps_00000007.png",
    ]  # fmt: skip
    assert rows(folder / "steps_00000007.png") == [10 + 15, 20 + 15, 40 + 15]
    assert rows(folder / "guidance_00000007.png") == [20, 26, 35, 50]
    assert set(rows(folder / "grid_00000007.png")) == {25}
    # One compiled function for all that is beside the grids: one size, one number of times.
    assert {asked[:2] for asked in found.renderer.asked[:7]} == {(10, 4)}
    assert found.labels[found.places].tolist() == list(range(10))
    assert "steps 1, 2, 4; by guidance 1, 1.59, 2.52, 4" in found.describe()


def test_nothing_more_where_nothing_more_is_asked_for(drawn):
    found, shown = drawn(make.config("training.sample_steps=", name="digits"))
    assert shown == [(7, "samples")] and len(found.renderer.asked) == 1
    assert found.describe().startswith("rows by class: ")
    config = make.config("training.sample_steps=", name="digits_imf")
    assert [name for _, name in drawn(config)[1]] == ["samples_by_guidance", "samples"]


def test_steps_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="training.sample_steps are numbers from 1"):
        make.config("training.sample_steps=1,0")
