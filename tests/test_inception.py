"""metrics/inception.py against golden features, a plain port, and interpolation by hand."""

import json

import jax
import numpy as np
import plain_inception
import pytest
from inception_writer import random_weights, write_pth

from metrics import inception, inception_weights

TOLERANCE = {"pool": 1.5e-4, "logits": 5e-4, "spatial": 1.5e-4}


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "inception"


@pytest.fixture(scope="module")
def maker(folder):
    return random_weights(folder)


@pytest.fixture(scope="module")
def weights(maker, folder):
    expected = json.loads((folder / "expected.json").read_text())
    found = maker.random_weights(expected["weight_seed"])
    assert maker.digest(found) == expected["weights_sha256"]
    return found


@pytest.fixture(scope="module")
def params(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    write_pth(path, weights)
    return inception_weights.read(path)


@pytest.fixture(scope="module")
def extract():
    return jax.jit(inception.features, static_argnames="resize")


# ------------------------------------------------------------------------------------- network


@pytest.mark.parity
def test_golden_features(folder, params, extract):
    probe = np.load(folder / "probe.npz")
    names = [name for name in probe.files if not name.startswith("images/")]
    found = {}
    for name in names:
        resize, size, output = name.split("/")
        if (resize, size) not in found:
            found[resize, size] = extract(params, probe[f"images/{size}"], resize=resize)
        value = found[resize, size][output]
        assert value.dtype == np.float32 and value.shape == probe[name].shape
        error = np.abs(value - probe[name]).max()
        assert error < TOLERANCE[output], f"{name}: {error}"
    assert {"tf1", "half_pixel"} == {resize for resize, _ in found}
    bias = params["fc"]["bias"]
    for outputs in found.values():
        np.testing.assert_allclose(
            outputs["logits_no_bias"], outputs["logits"] - bias, rtol=0, atol=1e-5
        )


@pytest.mark.slow
def test_the_plain_port_agrees(params, weights, maker, extract):
    images = maker.random_images(5, 2, 64)
    plain = plain_inception.pool_features(plain_inception.variables(weights), images)
    found = extract(params, images)["pool"]
    np.testing.assert_allclose(found, plain, rtol=0, atol=TOLERANCE["pool"])


def test_everything_is_float32_at_highest_precision(params):
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), np.uint8)
    text = str(jax.make_jaxpr(inception.features)(params, images))
    products = text.count("dot_general[") + text.count("conv_general_dilated[")
    assert products == 94 + 1 + 2  # convolutions, logits, two directions of the resize
    assert text.count("Precision.HIGHEST") + text.count("HIGHEST, HIGHEST") >= products
    assert "bf16" not in text and "f16[" not in text


# -------------------------------------------------------------------------------------- resize


@pytest.mark.parametrize("size", [1, 8, 64, 256, 299, 512])
def test_resize_by_hand(size):
    rng = np.random.default_rng(size)
    image = rng.integers(0, 256, (1, size, size + 3, 1), dtype=np.uint8)
    for resize in inception.RESIZES:
        found = np.asarray(inception.resize_bilinear(image, resize))[0, :, :, 0]
        assert found.shape == (299, 299)
        for p, q in rng.integers(0, 299, (40, 2)):
            value = _pixel(image[0, :, :, 0].astype(float), p, q, resize)
            assert abs(found[p, q] - value) < 0.01, (resize, p, q)


def _pixel(image, p, q, resize):
    def source(i, n):
        x = i * n / 299 if resize == "tf1" else (i + 0.5) * n / 299 - 0.5
        return min(max(x, 0), n - 1)

    (y, x), (h, w) = (source(p, image.shape[0]), source(q, image.shape[1])), image.shape
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
    top = image[y0, x0] * (1 - x + x0) + image[y0, x1] * (x - x0)
    bottom = image[y1, x0] * (1 - x + x0) + image[y1, x1] * (x - x0)
    return top * (1 - y + y0) + bottom * (y - y0)


def test_an_unknown_resize_is_refused(params):
    with pytest.raises(ValueError, match="fid.resize: 'bicubic' is unknown, choose one of half"):
        inception.features(params, np.zeros((1, 8, 8, 3), np.uint8), "bicubic")
