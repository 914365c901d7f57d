"""Data of any height and width, and signals: the networks, the options, what they cost."""

import jax
import jax.numpy as jnp
import make
import numpy as np
import pytest

import parts
from configs import saved
from models import network
from run import inherit

SHAPES = {"wide": ["dataset.image_size=4,12", "model.patch_size=2,3"],
          "signal": ["dataset.image_size=1,12", "model.patch_size=1,3"]}  # fmt: skip
NETWORKS = {name: make.NETWORKS[name] for name in ("DiT", "imfDiT", "UNet")} | {
    "pmfDiT": [*make.NETWORKS["imfDiT"], "model.cls=pmfDiT", "model.hidden_size=32"]
}
UNET = ["model.channel_mult=1,2", "model.attn_resolutions=6", "model.patch_size=0"]


def made(network, shape):
    words = [*make.PIXELS, "dataset.image_channels=2", *NETWORKS[network], *SHAPES[shape]]
    return make.config(*words, *(UNET if network == "UNet" else ()))


def inputs(module, shape, rows=2):
    keys = jax.random.split(jax.random.key(3), 3)
    t = jax.random.uniform(keys[1], (rows,))
    c = {"t": t, "h": t / 2, "y": jnp.arange(rows) % 3}
    c |= {name: jnp.ones(rows) for name in module.conditions}
    return jax.random.normal(keys[0], (rows, *shape)), c


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_takes_it(name, shape):
    """Every place depends on every place and has a derivative; its FLOPs are XLA's."""
    options = made(name, shape)
    module, size = parts.make(options).module, parts.image_shape(options.dataset)
    params, net = make.params(module, size), network.function(module)
    z, c = inputs(module, size)

    def one(z):
        return net(params, (z, c))[0].u

    value, rate = jax.jit(lambda z: jax.jvp(one, (z,), (jnp.ones_like(z),)))(z)
    assert value.shape == rate.shape == z.shape and np.isfinite(rate).all()
    reach = jax.jit(jax.grad(lambda z: (one(z)[0, -1, -1] ** 2).sum()))(z)
    assert (np.abs(reach[0]) > 0).all() and not reach[1].any()
    if name == "UNet":  # larger: XLA leaves out the products with zeros beyond the border
        size = tuple(8 * side if side > 1 else 1 for side in size[:2]) + size[2:]
        (z, c), params = inputs(module, size), make.params(module, size)
    plain = network.function(module.unrolled())
    lowered = jax.jit(lambda p, z, c: plain(p, (z, c))[0].u).lower(params, z, c)
    found, known = lowered.cost_analysis()["flops"] / len(z), module.flops(size)
    assert 0.7 * found < known < 1.1 * found, (known, found)


def test_a_pair_of_equal_sides_is_one_number():
    """So runs of before are the same runs, whichever way their side is written."""
    one, pair = make.config("dataset.image_size=32"), make.config("dataset.image_size=32,32")
    assert one == pair and saved.flat(one) == saved.flat(pair)
    wide = saved.flat(made("DiT", "wide"))
    assert wide["dataset.image_size"] == [4, 12] and wide["model.patch_size"] == [2, 3]
    assert inherit.digest(wide) != inherit.digest(saved.flat(one))
    assert saved.of_run(made("DiT", "wide").to_dict()) == wide


@pytest.mark.parametrize(
    "words, said",
    [
        (["dataset.image_size=4,10"], r"\(4 x 10\) must be a multiple of the patch size 2 x 3"),
        (["dataset.image_size=0,12"], r"must be 1 or more, or height and width, got \[0, 12\]"),
        (["dataset.image_size=4,x"], r"image_size\[1\] expects a whole number"),
        (["model.patch_size=2,3,1"], "must be 0 or more, or height and width"),
        (["model.cls=UNet", *UNET, "dataset.image_size=4,11"], r"4 x 11\) must be a multiple of 2"),
    ],
)
def test_what_is_no_shape_is_refused(words, said):
    own = [] if "model.cls=UNet" in words else NETWORKS["DiT"]
    with pytest.raises(ValueError, match=said):
        parts.make(make.config(*make.PIXELS, *own, *SHAPES["wide"], *words))
