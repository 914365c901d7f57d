"""The U-Net, its augmentation and the published checkpoints, beside the golden numbers."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_writer

import parts
from configs import load_config
from formats import published_cifar
from models import augment, codec, network, unet
from run import weights
from utils import trees

SHAPE = (8, 8, 3)
SMALL = dict(
    model_channels=16, channel_mult=(1, 2), channel_mult_emb=2, channel_mult_noise=2, num_blocks=1,
    attn_resolutions=(4,), dropout=0.3, resample_filter=(1, 3, 3, 1), augment_dim=augment.LABELS,
    remat=False,
)  # fmt: skip


def make(num_classes=0, dtype=jnp.float32, **options):
    return unet.build(
        "UNet", image_shape=SHAPE, num_classes=num_classes, dtype=dtype, **SMALL | options
    )


def perturbed(module, seed=0):
    """Parameters nowhere near zero, so that zero initialisation hides nothing; numpy arrays."""
    rng = np.random.default_rng(seed)

    def one(name, shape):
        fan_in = np.prod(shape[:-1]) if len(shape) > 1 else 100
        noise = rng.standard_normal(shape, np.float32) / np.sqrt(fan_in)
        return (noise + name.endswith("scale")).astype(np.float32)

    shapes = trees.flatten(network.param_shapes(module, SHAPE))
    return trees.unflatten({name: one(name, a.shape) for name, a in shapes.items()})


def inputs(rows=4, seed=5):
    keys = jax.random.split(jax.random.key(seed), 4)
    z = jax.random.normal(keys[0], (rows, *SHAPE))
    t = jax.random.uniform(keys[1], (rows,))
    labels = jax.random.normal(keys[3], (rows, augment.LABELS))
    c = {"t": t, "h": t * jax.random.uniform(keys[2], (rows,)), "y": jnp.arange(rows) % 3}
    return z, c | {"augment": labels}


def test_published_size():
    """The network of the published checkpoint, by its options in configs/default.py."""
    config = load_config.get_config("cifar10_unet")
    shapes = network.param_shapes(parts.make(config).module, (32, 32, 3))
    leaves = jax.tree.leaves(shapes)
    assert (len(leaves), sum(a.size for a in leaves)) == (417, 55_932_419)


def test_fresh_network():
    module = make()
    init = jax.jit(lambda key: network.init_params(module, key, SHAPE))
    params = trees.flatten(init(jax.random.key(0)))
    scales = {"conv1": 1e-5, "proj": 1e-5, "dec_8x8_aux_conv": 1e-5, "qkv": 0.2**0.5}
    checked = 0
    for name, a in params.items():
        layer, _, kind = name.rpartition("/")
        if kind != "kernel":
            assert np.all(a == (kind == "scale")), name
            continue
        window = np.prod(a.shape[:-2])
        limit = (6 / (window * sum(a.shape[-2:]))) ** 0.5 * scales.get(layer.split("/")[-1], 1.0)
        assert 0.9 * limit < np.abs(a).max() <= limit, name  # uniform up to the limit
        checked += 1
    assert checked > 20
    z, c = inputs()
    u = jax.jit(network.function(module))(trees.unflatten(params), (z, c))[0].u
    assert 0 < np.abs(u).max() < 1e-3


def test_conditions():
    """Classes and augmentation labels both count; no labels are zeros; none are asked for."""
    module = make(num_classes=3)
    params, net = perturbed(module), jax.jit(network.function(module))
    z, c = inputs()

    def u(**changed):
        return net(params, (z, {k: v for k, v in (c | changed).items() if v is not None}))[0].u

    assert np.abs(u() - u(y=jnp.full(4, 3))).max() > 1e-3
    assert np.abs(u() - u(augment=None)).max() > 1e-3
    np.testing.assert_allclose(u(augment=jnp.zeros((4, 6))), u(augment=None), atol=1e-6)
    shapes = network.param_shapes(make(augment_dim=0), SHAPE)
    assert "map_augment" not in shapes and "label" not in shapes


def test_dropout_is_one_mask_for_u_and_its_derivative():
    module = make()
    params, net = perturbed(module), network.function(module)
    z, c = inputs()
    direction = jax.random.normal(jax.random.key(9), z.shape)

    @jax.jit
    def u(z, t, h, key):
        return net(params, (z, c | {"t": t, "h": h}), key=key)[0].u

    one, other = jax.random.split(jax.random.key(1))
    point, ones = (z, c["t"], c["h"]), jnp.ones(4)
    with jax.default_matmul_precision("highest"):
        _, rate = jax.jvp(lambda *p: u(*p, one), point, (direction, ones, ones))
        step = 1e-2
        ends = [u(*(a + s * step * d for a, d in zip(point, (direction, ones, ones), strict=True)),
                  one) for s in (1, -1)]  # fmt: skip
    difference = (ends[0] - ends[1]) / (2 * step)
    assert np.linalg.norm(rate - difference) <= 2e-2 * np.linalg.norm(rate)
    assert np.abs(u(*point, one) - u(*point, other)).max() > 1e-2


def names(jaxpr):
    """The operations of a program and of all that it calls, as often as it calls them."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from names(getattr(value, "jaxpr", value))


def test_a_mask_is_drawn_once():
    """The backward pass keeps it, and a barrier keeps it apart from the convolution behind it."""
    module = make()
    (z, c), net = inputs(), network.function(module)

    def loss(params, key):
        return jnp.sum(net(params, (z, c), key=key)[0].u ** 2)

    program = jax.make_jaxpr(jax.grad(loss))(perturbed(module), jax.random.key(1))
    found = collections.Counter(names(program.jaxpr))
    blocks = sum(map(len, module.layers(SHAPE[0])))
    assert found["random_bits"] == found["optimization_barrier"] == blocks


def test_half_precision():
    z, c = inputs(16)
    params = perturbed(make())
    exact, half = (
        jax.jit(network.function(net))(net.cast(params), (z, c))[0].u
        for net in (make(dtype=jnp.float32), make(dtype=jnp.bfloat16))
    )
    error = np.linalg.norm(half - exact) / np.linalg.norm(exact)
    assert half.dtype == jnp.float32 and 1e-5 < error < 2e-2, error


def test_flops():
    """Counted by hand, and by XLA without the products with zeros beyond the border."""
    module, shape = make(), (32, 32, 3)
    z = jax.ShapeDtypeStruct((8, *shape), jnp.float32)
    c = jax.eval_shape(lambda: inputs(8)[1])
    lowered = jax.jit(network.function(module)).lower(network.param_shapes(module, shape), (z, c))
    found = lowered.cost_analysis()["flops"] / 8
    assert 0.9 * found < module.flops(shape) < 1.1 * found, (found, module.flops(shape))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"channel_mult": (1, 1, 1, 1, 1)}, "image_size"),
        ({"model_channels": 36}, "channels"),
        ({"dropout": 1.0}, "dropout"),
        ({"resample_filter": (1, 2, 1)}, "resample_filter"),
        ({"augment_dim": 9}, "augment_dim"),
        ({"channel_mult": (1, 0)}, "channel_mult"),
    ],
)
def test_what_does_not_fit_is_refused(options, said):
    with pytest.raises(ValueError, match=f"model|dataset.*{said}"):
        make(**options)


# The augmentation


def test_codec():
    """Published: an unlabelled flip first, if asked for; then the pipe. The key decides alone."""
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
    batch = {"image": images, "label": jnp.zeros(64, jnp.int32)}
    key = jax.random.key(3)
    encode = jax.jit(codec.Codec(augment_prob=0.12).encode)
    x, given = encode(batch, key)
    again, _ = encode(batch, key)
    np.testing.assert_array_equal(x, again)
    assert x.shape == images.shape and given["augment"].shape == (64, augment.LABELS)
    flip, *rest = np.asarray(given["augment"]).T
    assert 16 < flip.sum() < 48 and set(flip) == {0.0, 1.0}
    # Rows in which no gate but that of the mirror is open come back as they were.
    still = np.flatnonzero(~np.any(rest, axis=0))
    assert 32 < len(still) < 60
    mirrored = np.where(flip[:, None, None, None] > 0, images[:, :, ::-1], images)
    np.testing.assert_allclose(x[still], (mirrored / 127.5 - 1)[still], atol=1e-4)
    assert np.abs(x - (mirrored / 127.5 - 1)).max() > 0.1
    twice = jax.jit(codec.Codec(augment_prob=0.12, flip=True).encode)(batch, key)
    np.testing.assert_array_equal(twice[1]["augment"], given["augment"])
    same = np.array([np.allclose(a, b, atol=1e-4) for a, b in zip(twice[0], x, strict=True)])
    assert 16 < same.sum() < 48


def test_laws_of_the_draws():
    draws = augment.draw(jax.random.key(0), 4000)
    for name, a in draws._asdict().items():
        mean, std = {"bit": (0.5, 0.5), "normal": (0, 1)}.get(name.split("_")[1], (0.5, 12**-0.5))
        np.testing.assert_allclose([np.mean(a), np.std(a)], [mean, std], atol=0.05, err_msg=name)
    assert np.abs(np.corrcoef(np.concatenate([np.atleast_2d(a) for a in draws]))
                  - np.eye(11)).max() < 0.08  # fmt: skip


SHARED = """
import re, sys, jax, numpy as np
sys.path.insert(0, "tests")
from models import codec, network
from utils import sharding
from test_unet import make, perturbed

def step(batch, params, key):
    x, given = codec.Codec(augment_prob=0.5, flip=True).encode(batch, key)
    c = given | {"t": x[:, 0, 0, 0], "h": x[:, 0, 0, 1]}
    return x, given["augment"], network.function(make())(params, (x, c), key=key)[0].u

mesh, params, key = sharding.make_mesh(1), perturbed(make()), jax.random.key(3)
images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
batch = {"image": images, "label": np.zeros(16, np.int32)}
alone = jax.jit(step)(batch, params, key)
rows = sharding.by_row(mesh)
compiled = jax.jit(step, in_shardings=(rows, None, None), out_shardings=rows).lower(
    batch, params, key).compile()
print(re.findall(r" (all-\\w+|collective-\\w+|reduce-scatter)\\(", compiled.as_text()))
shared = compiled(jax.device_put(batch, rows), params, key)
for a, b in zip(alone, shared):
    assert len(b.sharding.device_set) == 4
    np.testing.assert_allclose(a, b, atol=1e-5)
"""


def test_devices_share_a_batch_without_a_word(run_python):
    """Augmentation and dropout are the same on any number of devices, and move no image."""
    assert run_python(SHARED, devices=4).stdout.strip() == "[]"


# Published checkpoints


def state_of(params):
    """Our tree as the published code names it, with the filters that it stores beside."""
    arrays = published_cifar.to_published(params)
    taps = np.outer([1, 3, 3, 1], [1, 3, 3, 1])[None, None].astype(np.float32) / 64
    filters = {k.replace("conv0.bias", "conv0.resample_filter") for k in arrays
               if ("_up." in k or "_down." in k) and "conv0.bias" in k}  # fmt: skip
    return arrays | {name: taps for name in filters}


def write_checkpoint(path, changed=None):
    nets = {
        p: perturbed(make(), i) for i, p in enumerate(("net", "net_ema", "net_ema1", "net_ema2"))
    }
    model = {"num_updates": np.array(768)}
    model |= {f"{p}.{k}": v for p, tree in nets.items() for k, v in state_of(tree).items()}
    namespace = torch_writer.Raw(
        b"cargparse\nNamespace\n)\x81}X\x02\x00\x00\x00lrG?\x00\x00\x00\x00\x00\x00\x00sb"
    )
    value = {"model": model | (changed or {}), "optimizer": {"state": {0: {"step": 5.0}}},
             "lr_schedule": {"last_epoch": 5}, "epoch": 15, "args": namespace}  # fmt: skip
    torch_writer.write_zip(path, value)
    return nets


def load(path):
    config = load_config.get_config("cifar10_unet")
    return weights.load(path, network.param_shapes(make(), SHAPE), config.dataset)


def test_published_checkpoint(tmp_path):
    nets = write_checkpoint(tmp_path / "checkpoint-last.pth")
    found = load(tmp_path / "checkpoint-last.pth")
    assert found.step == 768 and found.ema == "ema_0.99995"
    assert list(found.ema_params) == ["ema_0.99995", "ema_0.9999", "ema_0.9996"]
    for tree, name in zip((found.params, *found.ema_params.values()),
                          ("net", "net_ema1", "net_ema", "net_ema2"), strict=True):  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, tree, nets[name])


def test_a_run_begins_with_a_published_checkpoint(tmp_path):
    """By default with the average of the published FID."""
    nets = write_checkpoint(tmp_path / "checkpoint-last.pth")
    config = load_config.get_config("cifar10_unet")
    config.init_from = str(tmp_path / "checkpoint-last.pth")
    params, line = weights.begin(config.init_from, config.dataset, make(), perturbed(make(), 9))
    jax.tree.map(np.testing.assert_array_equal, params, nets["net_ema1"])
    count = len(jax.tree.leaves(params))
    assert f"{count} of {count} parameters taken" in line


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"net.enc.8x8_conv.extra": np.zeros(3, np.float32)}, "extra"),
        ({"other.weight": np.zeros(3, np.float32)}, "other.weight"),
        ({"net.enc.8x8_conv.bias": np.zeros(3, np.float32)}, "enc_8x8_conv/bias"),
        ({"net.enc.4x4_down.conv0.resample_filter": np.ones((1, 1, 4, 4), np.float32)}, "filter"),
    ],
)
def test_published_checkpoints_are_read_strictly(tmp_path, changed, said):
    write_checkpoint(tmp_path / "a.pth", changed)
    with pytest.raises(ValueError, match=said) as error:
        load(tmp_path / "a.pth")
    assert "\n" not in str(error.value)
