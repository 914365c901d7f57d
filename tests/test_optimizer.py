"""Muon by the axes of a network's arrays, and what a step of it does."""

import jax
import jax.numpy as jnp
import make
import numpy as np
import optax
import pytest

import optimizer
import parts
from configs import default
from models.network import Axes


def muon(axes, **options):
    training = default.get_config().training
    training.update({"optimizer": "muon", "learning_rate": 0.01, **options})
    return optimizer.make_optimizer(training, 10, axes=lambda: axes)[0]


def kernels_of(name):
    """{name of an array: whether Muon has it} of a backbone."""
    config = make.config(*make.PIXELS, *NETWORKS[name])
    made = parts.make(config)
    shapes = made.param_shapes()
    dims = optimizer.matrices(made.module.axes(shapes))
    arrays = jax.tree_util.tree_leaves_with_path(shapes)
    flat = jax.tree.leaves(dims, is_leaf=lambda d: d is None or isinstance(d, tuple))
    return {
        "/".join(key.key for key in path): (array.shape, dim)
        for (path, array), dim in zip(arrays, flat, strict=True)
    }


PMF = ["model.cls=pmfDiT", *make.SIZES, "model.depth=2", "model.aux_head_depth=1"]
NETWORKS = make.NETWORKS | {"pmfDiT": [*PMF, "method.name=pixel"]}


@pytest.mark.parametrize("name", NETWORKS)
def test_muon_has_every_matrix_and_nothing_else(name):
    for array, (shape, dim) in kernels_of(name).items():
        *parents, last = array.split("/")
        convolution = "conv" in array or parents[-1:] in (["x_embedder"], ["x_embedder2"])
        assert (dim is not None) == (last == "kernel" and not convolution), (array, shape)
        if dim:
            assert len(shape) - len(dim.reduction_axis + dim.output_axis) <= 2, array


def test_blocks_are_orthogonalised_one_by_one():
    """A stack of kernels gets what its kernels get alone; a stack of biases is Adam's."""
    rng = np.random.default_rng(0)
    grads = {"kernel": rng.normal(size=(3, 6, 4)), "bias": rng.normal(size=(3, 4))}
    grads = jax.tree.map(jnp.float32, grads)
    axes = {"kernel": Axes((0,), (1,), (2,)), "bias": Axes((0,), (), (1,))}
    change = muon(axes)
    stacked, _ = change.update(grads, change.init(grads), grads)
    for i in range(3):
        one = jax.tree.map(lambda g, i=i: g[i], grads)
        alone = muon({"kernel": Axes((), (0,), (1,)), "bias": Axes((), (), (0,))})
        expected, _ = alone.update(one, alone.init(one), one)
        for name in one:
            np.testing.assert_allclose(stacked[name][i], expected[name], rtol=1e-4, atol=1e-6)
    # The singular values of an orthogonalised matrix are near 1, times the learning rate.
    values = np.linalg.svd(np.asarray(stacked["kernel"]), compute_uv=False)
    assert np.all((0.5 < values / 0.01) & (values / 0.01 < 1.3))


def test_without_axes_the_wrong_half_would_be_orthogonalised():
    """Why the axes are told: by their number alone a stack of biases would pass for a matrix."""
    params = {"kernel": jnp.ones((3, 6, 4)), "bias": jnp.ones((3, 4))}
    state = optax.contrib.muon(0.01).init(params)
    masked = state.inner_states["muon"].inner_state[0].mu
    assert isinstance(masked["kernel"], optax.MaskedNode) and masked["bias"].shape == (3, 4)
