"""Attention with a tangent of its own, and the layers with derivatives of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention, attention_kernel, hardware, layers

SHAPE = (2, 64, 2, 24)


def arrays(shape, count, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), count)
    return [(1.5 * jax.random.normal(key, shape)).astype(dtype) for key in keys]


def distance(found, expected):
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def expected_of(inputs):
    """Values and tangent by plain differentiation in float32."""
    inputs = [a.astype(jnp.float32) for a in inputs]
    return jax.jvp(attention.attention, inputs[:3], inputs[3:])


@pytest.mark.parametrize("block", [16, 64])
def test_tangent_by_blocks_of_queries(monkeypatch, block):
    monkeypatch.setattr(attention, "BLOCK", block)
    inputs = arrays(SHAPE, 6)
    assert distance(attention.tangent_of(*inputs), expected_of(inputs)[1]) < 1e-6
    half = arrays(SHAPE, 6, jnp.bfloat16)
    assert distance(attention.tangent_of(*half), expected_of(half)[1]) < 5e-3


def test_tangent_holds_no_array_of_all_pairs():
    """At 1,024 tokens: of the 16 x 1024^2 weights only those of a block of queries."""
    shape, block = (1, 1024, 16, 8), attention.BLOCK
    text = str(jax.make_jaxpr(attention.tangent_of)(*arrays(shape, 6, jnp.bfloat16)))
    assert f"1,16,{block},1024" in text and "1,16,1024,1024" not in text


@pytest.mark.parametrize("shape", [(1, 64, 2, 16), (1, 128, 1, 24)])
def test_kernel_of_the_tangent(shape):
    """Two blocks of keys, and a head that is no power of two."""
    inputs = arrays(shape, 6, jnp.bfloat16)
    found = attention_kernel.call(*inputs, interpret=True)
    assert distance(found, expected_of(inputs)[1]) < 5e-3
    assert attention_kernel.takes(inputs[0])
    assert not attention_kernel.takes(jnp.zeros((1, 16, 2, 16)))


def test_rows_of_the_kernel_stay_where_they_are(monkeypatch, run_python):
    """On several devices the kernel is called with each one's rows, and nothing is exchanged."""
    run_python(["-c", ROWS], devices=4)


ROWS = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from models import attention_kernel
called = []
def call(q, *others):
    called.append(q.shape)
    return q
attention_kernel.call = call
mesh = jax.make_mesh((4,), ("data",))
q = jax.device_put(jnp.ones((8, 64, 2, 16)), NamedSharding(mesh, PartitionSpec("data")))
step = jax.jit(lambda *a: attention_kernel.tangent(*a)).lower(*[q] * 6).compile()
assert called[-1] == (2, 64, 2, 16), called
assert "all-gather" not in step.as_text() and "all-reduce" not in step.as_text()
"""


@pytest.mark.parametrize("tangent", [False, True])
def test_images_one_after_the_other_heed_none_but_themselves(tangent):
    """Values, gradients and tangents are those of each image for itself."""
    B, N, H, d = 6, 16, 2, 24
    inputs = arrays((B, N, H, d), 7)

    def loss(images, qkv, directions):
        def joined(*arrays):
            arrays = [a.reshape(B // images, images * N, H, d) for a in arrays]
            return attention.attention(*arrays, tangent=tangent, images=images)

        value, moved = jax.jvp(joined, qkv, directions)
        return jnp.sum(value.ravel() * inputs[6].ravel()), moved.reshape(B, N, H, d)

    (expected, found) = (
        jax.value_and_grad(loss, argnums=1, has_aux=True)(images, inputs[:3], inputs[3:6])
        for images in (1, 3)
    )
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert distance(b, a) < 1e-5


def objective(tangent, of=None):
    """|u + r|^2 where r has du, which is not differentiated: as in MeanFlow. In a loop, with remat.

    The gradient is taken by parameters through which values and tangents both go.
    """

    def network(w, x):
        def block(x, _):
            y = layers.norm_modulate(x, w["shift"], w["scale"], x.dtype, tangent)
            q, k, v = (jnp.tanh(y @ w[name]).reshape(SHAPE) for name in "qkv")
            y = attention.attention(q, k, v, tangent=tangent).reshape(x.shape)
            return x + layers.gelu(y, tangent=tangent), None

        return jax.lax.scan(jax.checkpoint(block), x, None, length=2)[0]

    def loss(w, x, dx):
        u, du = jax.jvp(lambda x: network(w, x), (x,), (dx,))
        return jnp.mean((u + jax.lax.stop_gradient(du)) ** 2)

    B, N, H, d = SHAPE
    x, dx = arrays((B, N, H * d), 2)
    w = dict(zip("qkv", 0.2 * jnp.stack(arrays((H * d, H * d), 3)), strict=True))
    w |= dict(zip(("shift", "scale"), arrays((B, H * d), 2), strict=True))
    return jax.jit(jax.value_and_grad(loss))(w, x, dx)


def test_gradient_of_an_objective_with_a_tangent(monkeypatch):
    """Equal to plain differentiation all the way, in float32."""
    value, grads = objective(tangent=True)

    def plain(x, shift, scale, dtype, tangent=False):
        mean, var = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
        n = (x - mean) / jnp.sqrt(var + 1e-6)
        return n * (1 + scale[:, None]) + shift[:, None]

    monkeypatch.setattr(layers, "norm_modulate", plain)
    monkeypatch.setattr(layers, "gelu", lambda x, tangent: jax.nn.gelu(x))
    expected, expected_grads = objective(tangent=False)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, expected_grad in expected_grads.items():
        assert distance(grads[name], expected_grad) < 1e-5, name


def test_gelu_keeps_its_input_alone():
    x, dx = jnp.linspace(-6, 6, 101), jnp.linspace(1, 2, 101)
    np.testing.assert_allclose(layers.gelu(x), jax.nn.gelu(x), atol=1e-6)
    slopes = jax.vmap(jax.grad(jax.nn.gelu))(x)
    for options in ({}, {"in_product": True}):
        found = jax.vmap(jax.grad(lambda x, options=options: layers.gelu(x, **options)))(x)
        np.testing.assert_allclose(found, slopes, atol=6e-6)
        half = layers.gelu(x.astype(jnp.bfloat16), **options)
        assert half.dtype == jnp.bfloat16 and distance(half, jax.nn.gelu(x)) < 4e-3
    _, tangent = jax.jvp(lambda x: layers.gelu(x, tangent=True), (x,), (dx,))
    np.testing.assert_allclose(tangent, slopes * dx, atol=2e-5)


def test_norm_keeps_the_types_it_was_given():
    x, dx = (a.astype(jnp.bfloat16) for a in arrays((2, 8, 16), 2))
    shift, scale = arrays((2, 16), 2)
    out, back = jax.vjp(lambda *a: layers.norm_modulate(*a, jnp.bfloat16), x, shift, scale)
    assert [g.dtype for g in back(out)] == [jnp.bfloat16, jnp.float32, jnp.float32]
    _, tangent = jax.jvp(
        lambda x: layers.norm_modulate(x, shift, scale, jnp.bfloat16, tangent=True), (x,), (dx,)
    )
    assert tangent.dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(24,), (3, 24)])
def test_gradient_of_a_vector_is_the_sum_over_its_rows(shape, monkeypatch):
    """In half precision as a TPU computes it, and with a tangent along."""
    x, g = arrays((3, 16, 24), 2)
    vector, other = arrays(shape, 2)

    def loss(dtype, vector):
        def product(x, vector):
            return x * layers.spread(vector, x, dtype)

        value, tangent = jax.jvp(product, (x, vector), (g, other))
        return jnp.sum(g * value + x * tangent)

    expected = jax.grad(loss, argnums=1)(jnp.float32, vector)
    monkeypatch.setattr(hardware, "platform", lambda: "tpu")
    found = jax.grad(loss, argnums=1)(jnp.bfloat16, vector)
    assert 0 < distance(found, expected) < 5e-3
