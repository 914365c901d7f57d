"""What every backbone tells of its parameters, and images that are not square."""

import jax
import make
import numpy as np
import pytest

import parts
from models import dit, network
from models.network import Axes

DEEPER = {
    "DiT": ["model.depth=3"],
    "imfDiT": ["model.depth=4", "model.aux_head_depth=2"],
    "pmfDiT": ["model.depth=4", "model.aux_head_depth=2"],
    "UNet": [],
}
PMF = [*make.SIZES, "model.cls=pmfDiT", "model.depth=2", "model.aux_head_depth=1"]
NETWORKS = make.NETWORKS | {"pmfDiT": [*PMF, "method.name=pixel"]}


def arrays(*words):
    """A network's arrays: name -> (shape, `Axes`)."""
    config = make.config(*make.PIXELS, *words)
    module = parts.make(config).module
    shapes = network.param_shapes(module, parts.image_shape(config.dataset))
    axes = jax.tree.leaves(module.axes(shapes), is_leaf=lambda a: isinstance(a, Axes))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    names = ["/".join(key.key for key in path) for path, _ in leaves]
    return dict(zip(names, zip([a.shape for _, a in leaves], axes, strict=True), strict=True))


@pytest.mark.parametrize("name", DEEPER)
def test_the_axes_of_every_array(name):
    """Blocks, classes, places and matrices of one kernel are stacked; only kernels take input."""
    words = NETWORKS[name]
    larger_words = [*words, "dataset.num_classes=5", *DEEPER[name]]
    pairs = zip(arrays(*words).items(), arrays(*larger_words).values(), strict=True)
    for (array, (shape, axes)), (larger, _) in pairs:
        assert sorted(sum(axes, ())) == list(range(len(shape))), array
        grown = tuple(i for i, (a, b) in enumerate(zip(shape, larger, strict=True)) if a != b)
        rest = tuple(axis for axis in axes.stacked if axis not in grown)
        if array.endswith(("tokens", "positions")):
            assert rest == (0,), array
        elif name == "pmfDiT" and array.endswith(("qkv/kernel", "w13/kernel")):
            assert [shape[axis] for axis in rest] == [3 if "qkv" in array else 2], array
        else:
            assert axes.stacked == grown, array
        assert set(grown) <= set(axes.stacked), array
        assert bool(axes.into) == array.endswith("kernel"), array
        assert axes.out == (len(shape) - 1,), array


def test_patches_of_an_image_that_is_not_square():
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 3))
    patches = dit.patchify(x, 2)
    np.testing.assert_array_equal(patches[:, 3 * 1 + 2], x[:, 2:4, 4:6])  # row 1, column 2
    np.testing.assert_array_equal(dit.unpatchify(patches.reshape(2, 6, 12), 2, x.shape[1:]), x)
    square = dit.position_embedding(8, 3, 3).reshape(3, 3, 8)
    np.testing.assert_array_equal(dit.position_embedding(8, 2, 3).reshape(2, 3, 8), square[:2])


@pytest.mark.parametrize("name", ["DiT", "imfDiT"])
def test_a_transformer_takes_images_that_are_not_square(name):
    config = make.config(*make.PIXELS, *make.NETWORKS[name])
    module = parts.make(config).module
    params = make.params(module, (4, 8, 1))
    c = {"t": np.ones(2, np.float32), "h": np.ones(2, np.float32), "y": np.zeros(2, np.int32)}
    c |= {name: np.ones(2, np.float32) for name in module.conditions}
    z = np.random.default_rng(0).standard_normal((2, 4, 8, 1)).astype(np.float32)
    ((u, _),) = jax.jit(network.function(module))(params, (z, c))
    assert u.shape == z.shape and np.std(u) > 0
