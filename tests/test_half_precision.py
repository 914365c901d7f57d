"""bfloat16 products: how far loss and gradient are from float32, on a network that has learned."""

import jax
import jax.numpy as jnp
import make
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import train
from models import codec, dit, hardware, network
from run import checkpoint, resume
from utils import sharding

STEPS, BATCH, SHAPE = 60, 64, (8, 8, 1)
METHOD = make.method(num_classes=10)


def make_recipe(dtype, **options):
    net = dit.DiT(2, 64, num_heads=2, patch_size=2, num_classes=10, dtype=dtype, **options)
    optimizer = optax.adamw(optax.constant_schedule(2e-3), b2=0.95)
    return net, train.Recipe(
        network.function(net), METHOD, codec.Codec(), optimizer, (0.9,), gather=net.cast
    )


@pytest.fixture(scope="module")
def trained():
    """Parameters after a short training in float32, and batches to compare on."""
    digits = load_digits()
    images = (digits.images[..., None] / 8 - 1).astype(np.float32)
    labels = digits.target.astype(np.int32)

    def batch(i):
        rows = np.random.RandomState(i).permutation(len(images))[:BATCH]
        draws = METHOD.draw(jax.random.key(i), (BATCH, *SHAPE))
        return images[rows], {"y": labels[rows]}, draws

    net, recipe = make_recipe(jnp.float32)
    init = jax.jit(lambda key: train.init_state(recipe, net, SHAPE, key))
    state = init(jax.random.key(0))
    key = jax.random.key(0)
    step = jax.jit(lambda state, *batch: train.update(recipe, state, *batch, key))
    errors = []
    for i in range(STEPS):
        before = state.sums["error_r=t"]
        state = step(state, *batch(i))
        errors.append(float(state.sums["error_r=t"] - before))
    assert np.mean(errors[-10:]) < 0.6 * np.mean(errors[:10])  # it has learned
    return state.params, [batch(STEPS + i) for i in range(4)]


def numbers(trained, dtype, **options):
    """Of each batch: the loss, the error before the adaptive weight, and the gradient."""
    params, batches = trained
    _, recipe = make_recipe(dtype, **options)
    key = jax.random.key(0)
    gradients = jax.jit(lambda *args: train.gradients(recipe, params, *args, {}, key))
    for batch in batches:
        (loss, rows), grads = gradients(*batch)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((loss, grads)))
        leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(grads)]
        yield float(loss), float(rows["error"].mean()), np.concatenate(leaves)


@pytest.fixture(scope="module")
def in_float32(trained):
    return list(numbers(trained, jnp.float32))


@pytest.mark.parametrize(
    "options",
    [
        {"half_residual": True},
        pytest.param({"half_residual": False}, marks=pytest.mark.slow),
        pytest.param({"half_residual": True, "remat": True}, marks=pytest.mark.slow),
    ],
)
def test_gradients_in_bfloat16_point_the_same_way(trained, in_float32, options):
    for full, half in zip(in_float32, numbers(trained, jnp.bfloat16, **options), strict=True):
        check_gradients(full, half)


def check_gradients(full, half):
    """The `numbers` of a batch in both precisions, beside each other."""
    assert abs(half[0] / full[0] - 1) < 1e-4  # the loss, nearly one by construction
    assert abs(half[1] / full[1] - 1) < 1e-2  # the error before the adaptive weight
    norms = np.linalg.norm(full[2]) * np.linalg.norm(half[2])
    cosine = full[2] @ half[2] / norms
    assert cosine >= 0.9998, cosine
    assert abs(np.linalg.norm(half[2]) / np.linalg.norm(full[2]) - 1) < 0.01
    assert not np.array_equal(full[2], half[2])  # it was another precision


@pytest.fixture
def as_on_a_card(monkeypatch):
    return make.as_on_a_card(monkeypatch)


def test_gradients_as_a_card_computes_them(trained, in_float32, as_on_a_card):
    found = numbers(trained, jnp.bfloat16, **as_on_a_card)
    for full, half in zip(in_float32[:2], found, strict=False):
        check_gradients(full, half)


@pytest.mark.parametrize("unroll", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gradients_as_a_tpu_computes_them(trained, in_float32, monkeypatch, unroll):
    monkeypatch.setattr(hardware, "platform", lambda: "tpu")
    monkeypatch.setattr(hardware, "memory", lambda: 1e9)
    found = numbers(trained, jnp.bfloat16, half_residual=True, unroll=unroll)
    for full, half in zip(in_float32[:2], found, strict=False):
        check_gradients(full, half)


def test_nothing_stands_between_a_product_and_its_gelu_on_a_card(trained, as_on_a_card):
    """XLA knows a GELU behind a product by the operations alone; `remat` puts one more between."""
    params, batches = trained
    for unroll, found in ((1, True), (0, False)):
        _, recipe = make_recipe(jnp.bfloat16, **as_on_a_card | {"unroll": unroll})

        def gradients(*args, recipe=recipe):
            return train.gradients(recipe, params, *args, {}, jax.random.key(0))

        text = str(jax.make_jaxpr(gradients)(*batches[0]))
        assert ("reduce_precision" in text) == found


@pytest.mark.slow
def test_a_run_in_bfloat16_goes_on_bit_for_bit(tmp_path):
    """Two steps, and two more from their checkpoint, are the four of a run without a stop."""
    net = dit.DiT(1, 32, 1, 2, num_classes=10, dtype=jnp.bfloat16, half_residual=True)
    optimizer = optax.adamw(optax.constant_schedule(2e-3), b2=0.95)
    method = make.method(num_classes=10, guidance_eq="none")
    recipe = train.Recipe(
        network.function(net), method, codec.Codec(), optimizer, (0.9,), gather=net.cast
    )
    step = jax.jit(lambda *args: train.train_step(recipe, jax.random.key(1), *args))
    pixels = np.random.RandomState(0).randint(0, 256, (4, 8, *SHAPE)).astype(np.uint8)
    batches = [{"image": image, "label": np.arange(8, dtype=np.int32)} for image in pixels]
    state = train.init_state(recipe, net, SHAPE, jax.random.key(0))
    for batch in batches[:2]:
        state = step(state, batch)

    config = make.config("training.half_precision=true", name="digits")
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        resume.save(checkpointer, state, {"position": 2}, config.to_dict())
    shapes = jax.eval_shape(lambda: state)
    targets = sharding.with_shardings(shapes, sharding.by_parameter(sharding.make_mesh(1), shapes))
    again, place, _ = resume.restore(config.to_dict(), tmp_path, targets, {})
    assert place == {"position": 2}
    for batch in batches[2:]:
        state, again = step(state, batch), step(again, batch)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(again)}
    assert kinds == {jnp.dtype("float32"), jnp.dtype("int32")}  # nothing is kept rounded
