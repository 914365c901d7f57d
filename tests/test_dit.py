"""The backbone: two batches side by side, and its attention."""

import jax
import jax.numpy as jnp
import make
import numpy as np
import optax
import pytest

from models import dit, network
from scripts.measure import plain

CLASSES, SHAPE = 3, (4, 4, 2)


@pytest.mark.parametrize(
    "share, guidance",
    [(0.0, {}), (0.75, {}), (1.0, {}), (0.75, {"kappa": 0.0, "omega": 2.0}), (1.0, {"kappa": 0.0})],
)
def test_two_batches_side_by_side_are_equal_to_the_plain_transcription(share, guidance):
    """With the DiT itself, also where one of the two batches is empty."""
    method = make.method(data_proportion=share, **guidance)
    net = dit.DiT(depth=2, hidden_size=16, num_heads=2, patch_size=2, num_classes=CLASSES)
    params = network.init_params(net, jax.random.key(0), SHAPE)
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)
    x = jax.random.normal(jax.random.key(2), (8, *SHAPE))
    y = jnp.arange(8) % CLASSES
    draws = method.draw(jax.random.key(3), x.shape)

    def ours(params):
        return method.loss(network.function(net), params, x, {"y": y}, draws, {})[0]

    def oracle(params):
        return plain.loss(network.function(net), params, x, y, draws, method)[0]

    found, grads = jax.jit(jax.value_and_grad(ours))(params)
    expected, expected_grads = jax.jit(jax.value_and_grad(oracle))(params)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    scale = optax.tree.norm(expected_grads)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * scale)


@pytest.mark.parametrize("share", [0.75, 1.0])
def test_training_with_an_attention_that_has_no_jvp(monkeypatch, share):
    """As the fused kernels have none; with `remat` too."""
    plain_attention = jax.nn.dot_product_attention

    @jax.custom_vjp
    def kernel(q, k, v):
        return plain_attention(q, k, v)

    kernel.defvjp(
        lambda *qkv: (kernel(*qkv), qkv),
        lambda qkv, cotangent: jax.vjp(plain_attention, *qkv)[1](cotangent),
    )
    fused = lambda q, k, v, implementation: kernel(q, k, v)  # noqa: E731
    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    method = make.method(data_proportion=share)
    x = jax.random.normal(jax.random.key(2), (8, *SHAPE))
    draws = method.draw(jax.random.key(3), x.shape)

    def value_and_grad(**options):
        net = dit.DiT(2, 16, 2, patch_size=2, num_classes=CLASSES, **options)
        params = network.init_params(net, jax.random.key(0), SHAPE)
        params = jax.tree.map(
            lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size).reshape(p.shape)), params
        )
        given = {"y": jnp.arange(8) % CLASSES}
        loss = lambda p: method.loss(network.function(net), p, x, given, draws, {})[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    found, expected = value_and_grad(fused_attention=True, remat=True), value_and_grad()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), found, expected
    )


def test_fused_attention_is_asked_for_where_there_is_a_kernel(monkeypatch):
    """cuDNN has one in half precision; elsewhere XLA's own is taken."""
    asked = []

    def attention(q, k, v, implementation):
        asked.append(implementation)
        return v

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    for backend, dtype in (("gpu", jnp.bfloat16), ("gpu", jnp.float32), ("tpu", jnp.bfloat16)):
        monkeypatch.setattr(jax, "default_backend", lambda name=backend: name)
        layer = dit.Attention(num_heads=2, dtype=dtype)
        layer.init_with_output(jax.random.key(0), jnp.zeros((1, 4, 16)), True)
    assert asked == ["cudnn", None, None]
