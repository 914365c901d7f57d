"""The backbone: two batches side by side, and its attention."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import make
import numpy as np
import optax
import plain
import pytest

from models import blocks, dit, hardware, network

CLASSES, SHAPE = 3, (4, 4, 2)


@pytest.mark.parametrize(
    "share, guidance",
    [(0.0, {}), (0.75, {}), (1.0, {}), (0.75, {"kappa": 0.0, "omega": 2.0}), (1.0, {"kappa": 0.0})],
)
def test_two_batches_side_by_side_are_equal_to_the_plain_transcription(share, guidance):
    """With the DiT itself, also where one of the two batches is empty."""
    method = make.method(data_proportion=share, **guidance)
    net = dit.DiT(depth=2, hidden_size=16, num_heads=2, patch_size=2, num_classes=CLASSES)
    params = make.params(net, SHAPE)
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
    scale = jax.jit(optax.tree.norm)(expected_grads)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * scale)


@pytest.mark.parametrize("share", [0.75, pytest.param(1.0, marks=pytest.mark.slow)])
def test_training_with_an_attention_that_has_no_jvp(monkeypatch, share):
    """As the fused kernels have none; with `remat` too. In half precision, to rounding."""
    plain_attention = jax.nn.dot_product_attention

    @jax.custom_vjp
    def kernel(q, k, v):
        return plain_attention(q, k, v)

    kernel.defvjp(
        lambda *qkv: (kernel(*qkv), qkv),
        lambda qkv, cotangent: jax.vjp(plain_attention, *qkv)[1](cotangent),
    )
    asked = []

    def fused(q, k, v, implementation):
        asked.append(implementation)
        return kernel(q, k, v)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    method = make.method(data_proportion=share)
    x = jax.random.normal(jax.random.key(2), (8, *SHAPE))
    draws = method.draw(jax.random.key(3), x.shape)

    def gradient(dtype, **options):
        net = dit.DiT(2, 16, 2, patch_size=2, num_classes=CLASSES, dtype=dtype, **options)
        params = make.params(net, SHAPE)
        given, function = {"y": jnp.arange(8) % CLASSES}, network.function(net)
        loss = lambda p: method.loss(function, net.cast(p), x, given, draws, {})[0]  # noqa: E731
        grads = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
        return np.concatenate([np.asarray(g, np.float64).ravel() for g in grads])

    expected = gradient(jnp.float32)
    assert not asked
    for options in ({"remat": True}, {"half_residual": True}):
        found = gradient(jnp.bfloat16, fused_attention=True, **options)
        assert set(asked) == {"cudnn"}
        assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
    np.testing.assert_array_equal(gradient(jnp.float32, fused_attention=True), expected)


def test_what_is_best_for_a_card(monkeypatch):
    """Kernels for half precision on a GPU; no loop there, and all kept where the memory allows."""
    policy = jax.checkpoint_policies.everything_saveable
    for backend, dtype in (("gpu", jnp.bfloat16), ("gpu", jnp.float32), ("tpu", jnp.bfloat16)):
        monkeypatch.setattr(jax, "default_backend", lambda name=backend: name)
        assert hardware.fused_attention(None, dtype) == (backend == "gpu" and dtype == jnp.bfloat16)
        assert not hardware.fused_attention(False, dtype)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert hardware.unroll(28, in_jvp=True) == 28
    assert hardware.unroll(28, in_jvp=False) == 1
    assert hardware.images_in_lanes(64, 64, True) == 1
    block = blocks.Block
    for memory, width, tokens, kept in (
        (60e9, 768, 256, "all"), (60e9, 1152, 256, "products"), (115e9, 1152, 256, "all"),
        (115e9, 1152, 1024, "products"), (0, 768, 64, "products"),
    ):  # fmt: skip
        monkeypatch.setattr(hardware, "memory", lambda memory=memory: memory)
        xs = [jax.ShapeDtypeStruct((rows, tokens, width), jnp.bfloat16) for rows in (64, 192)]
        depth = 12 if width == 768 else 28
        assert (hardware.remat(block, policy, xs, depth, loop=False) is block) == (kept == "all")
        assert hardware.remat(block, policy, xs, depth, loop=True) is not block
        assert hardware.remat(block, None, xs, depth, loop=False) is not block
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert hardware.unroll(12, in_jvp=True, width=768) == 1
    assert hardware.remat(block, policy, xs, 12, loop=False) is not block
    each = hardware.count()
    for rows, tokens, images in ((8, 64, 2), (8, 16, 8), (7, 64, 1), (8, 256, 1)):
        assert hardware.images_in_lanes(rows * each, tokens, True) == images
    for kind, passes in (("TPU v5 lite", [2, 2]), ("TPU v6 lite", [1, 2]), ("TPU7x", [2, 1])):
        monkeypatch.setattr(hardware, "kind", lambda kind=kind: kind)
        assert [hardware.images_in_lanes(8 * each, 64, d) for d in (False, True)] == passes
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert [hardware.unroll(12, True, width) for width in (128, 768)] == [1, 12]
    assert hardware.unroll(12, in_jvp=False, width=768) == 1


@pytest.mark.parametrize("use_bias", [True, False])
def test_three_products_have_the_parameters_of_one(use_bias):
    """q, k and v by parts of one kernel: the same weights, from the same key, and numbers."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 16))
    options = dict(dtype=jnp.float32, kernel_init=blocks.xavier, use_bias=use_bias, name="qkv")
    expected, params = nn.Dense(48, **options).init_with_output(jax.random.key(1), x)
    found, same = blocks.Qkv(**options).init_with_output(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    np.testing.assert_allclose(jnp.concatenate(found, axis=-1), expected, rtol=1e-5, atol=1e-6)
