"""LPIPS and ConvNeXt-V2: distances, features and gradients of the published networks.

perceptual.npz was computed in float64 by the packages lpips 0.1.4 (its own weights by channel) on
torchvision's VGG16 and by transformers 5.24 (ConvNextV2, small), with random weights.
"""

import pathlib

import jax
import numpy as np
import pytest

from methods import pixel
from models import convnext, frozen, lpips

pytestmark = pytest.mark.parity
FILE = pathlib.Path(__file__).parents[1] / "golden" / "perceptual.npz"


@pytest.fixture(scope="module")
def arrays():
    with np.load(FILE) as file:
        return dict(file)


def part(arrays, prefix):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def vgg():
    """The random VGG16 of the golden data, in torchvision's names."""
    rng, found, width, place = np.random.default_rng(1), {}, 3, 0
    for stage in lpips.STAGES:
        for features in stage:
            kernel = rng.standard_normal((features, width, 3, 3)) * np.sqrt(2 / (9 * width))
            found[f"features.{place}.weight"] = kernel.astype(np.float32)
            found[f"features.{place}.bias"] = np.float32(0.1 * rng.standard_normal(features))
            width, place = features, place + 2
        place += 1
    return found


def close(found, expected, tolerance):
    assert np.shape(found) == np.shape(expected)
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def test_lpips(arrays):
    weights = part(arrays, "lin/")
    params = lpips.convert(vgg(), weights, "x")
    value, gradient = jax.jit(jax.value_and_grad(lambda a, b: lpips.distance(params, a, b).sum()))(
        arrays["a"], arrays["b"]
    )
    close(value, arrays["lpips"].sum(), 1e-5)
    close(gradient, arrays["lpips_grad"], 1e-4)
    # The other form that people have, with the kernels as they are used.
    flaxmodels = {}
    for i, stage in enumerate(params["stages"]):
        for j, layer in enumerate(stage):
            flaxmodels[f"conv{i + 1}_{j + 1}/weight"] = layer["kernel"]
            flaxmodels[f"conv{i + 1}_{j + 1}/bias"] = layer["bias"]
    flaxmodels["fc6/weight"] = np.zeros(1)
    lins = {f"lin{i}": w.transpose(2, 3, 1, 0) for i, w in enumerate(weights.values())}
    again = lpips.convert(flaxmodels, lins, "x")
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


def test_lpips_has_a_gradient_where_images_are_equal(arrays):
    params = lpips.convert(vgg(), part(arrays, "lin/"), "x")
    black = np.full((1, 16, 16, 3), -1, np.float32)
    blind = {"stages": jax.tree.map(np.zeros_like, params["stages"]), "weights": params["weights"]}
    for tree in (params, blind):  # one of which has features of length 0
        gradient = jax.grad(lambda a, p=tree: lpips.distance(p, a, black).sum())(black)
        assert not np.any(gradient)


def test_convnext(arrays):
    theirs = part(arrays, "convnext/")
    params = convnext.convert(theirs, "x")
    features = jax.jit(convnext.features)(params, arrays["c"])
    # The published loss adds 1e-6 under a root, transformers does not.
    close(features, arrays["convnext_features"], 1e-4)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda c: convnext.distance(params, c, arrays["e"]).sum())
    )(arrays["c"])
    close(value, arrays["convnext"].sum(), 1e-4)
    close(gradient, arrays["convnext_grad"], 1e-3)


@pytest.mark.parametrize("fault", ["missing", "shape", "unknown", "nan"])
def test_weights_that_do_not_fit(arrays, fault):
    theirs, lins = part(arrays, "convnext/"), part(arrays, "lin/")
    name = "convnextv2.encoder.stages.1.layers.0.pwconv1.weight"
    broken, first = dict(theirs), "features.0.weight"
    images = vgg()
    if fault == "missing":
        del broken[name], images[first]
    elif fault == "shape":
        broken[name], images[first] = broken[name][:, :-1], images[first][..., :-1]
    elif fault == "unknown":
        broken["extra.weight"] = images["extra.weight"] = np.zeros(3, np.float32)
    else:
        broken[name] = np.full_like(broken[name], np.nan)
        images[first] = np.full_like(images[first], np.nan)
    with pytest.raises(ValueError, match=r"^file: "):
        convnext.convert(broken, "file")
    with pytest.raises(ValueError, match=r"^file: "):
        lpips.convert(images, lins, "file")


@pytest.mark.parametrize("name", frozen.FROZEN)
def test_what_a_step_computes_of_it(name):
    """The FLOPs by hand are those of XLA, of shapes alone: weights need not be there."""
    network = frozen.FROZEN[name]
    images = jax.ShapeDtypeStruct((1, pixel.SIDE, pixel.SIDE, 3), np.float32)

    def distance(a, b, params):
        return (network.unrolled or network.apply)(params, a, b).sum()

    step = jax.jit(jax.value_and_grad(distance)).lower(images, images, network.shapes())
    # XLA leaves out the products with the zeros around an image.
    assert 0.95 < step.cost_analysis()["flops"] / network.flops < 1.05


def test_the_shapes_of_the_base_size(arrays):
    """As `convert` makes them, from a file of another size."""
    small = jax.tree.structure(convnext.convert(part(arrays, "convnext/"), "x"))
    assert jax.tree.structure(convnext.param_shapes()) == small
    assert sum(a.size for a in jax.tree.leaves(convnext.param_shapes())) == 87_692_800
