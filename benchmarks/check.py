"""Whether the kernels of the card compute what the plain float32 operations do.

    python -m benchmarks check

Attention, its gradient and its tangent, and the gradient of the whole objective on a small network,
in half precision as the card would take it, beside float32. Exit status 1 where one is too far off.
"""

import jax
import jax.numpy as jnp
import numpy as np

import parts
from benchmarks import costs
from models import attention, attention_kernel, hardware, network
from utils import sharding

SHAPES = ((16, 64, 12, 64), (8, 256, 16, 72), (2, 1024, 12, 64))  # (B, N, H, d): B/4, XL/2, 512 px
BATCH = 64  # images of the gradient
LARGEST = {"values": 0.01, "gradient": 0.01, "tangent": 0.01}  # relative errors of bfloat16


def add_arguments(parser):
    """Adds the options of `run`."""
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")


def run(args):
    """Prints the errors; returns {"passed": whether none is too large, ...}."""
    fused = hardware.fused_attention(None, jnp.bfloat16)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; kernels of the card: {fused}")
    results, passed = {}, True
    for shape in SHAPES:
        errors = attention_errors(shape, fused, args.seed)
        results[f"attention {shape}"] = errors
        passed &= all(errors[name] <= most for name, most in LARGEST.items())
    cosine, norm = gradient(small_config())
    results["objective"] = {"cosine": cosine, "norm": norm}
    passed &= cosine >= 0.9998 and abs(norm - 1) <= 0.01
    for name, numbers in results.items():
        print(f"  {name:32}", *(f"{key} {value:.6f}" for key, value in numbers.items()))
    print("equal to float32 but for rounding" if passed else "TOO FAR from float32")
    return results | {"passed": bool(passed)}


def inputs(shape, seed, count):
    """Returns random bfloat16 arrays; some logits are large."""
    keys = jax.random.split(jax.random.key(seed), count)
    return [(1.5 * jax.random.normal(key, shape)).astype(jnp.bfloat16) for key in keys]


def distance(found, expected):
    """Returns |found - expected| / |expected|, in float64; NaN where there is one."""
    found, expected = (
        np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(x)])
        for x in (found, expected)
    )
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def attention_errors(shape, fused, seed):
    """Returns the relative errors of half precision: values, gradient of q, k, v, and tangent."""
    arrays = inputs(shape, seed, 7)
    half, full = arrays, [a.astype(jnp.float32) for a in arrays]

    def of(fused):
        def values(q, k, v):
            return attention.attention(q, k, v, fused=fused)

        def of_arrays(q, k, v, dq, dk, dv, g):
            out, back = jax.vjp(values, q, k, v)
            if fused is None:
                return out, back(g), jax.jvp(values, (q, k, v), (dq, dk, dv))[1]
            own = fused and attention_kernel.takes(q)  # whether or not it is the default
            tangent = attention_kernel.tangent if own else attention.tangent_of
            return out, back(g), tangent(q, k, v, dq, dk, dv)

        return jax.jit(of_arrays)

    with jax.default_matmul_precision("highest"):
        expected = of(None)(*full)
    found = of(fused)(*half)
    return {name: distance(a, b) for name, a, b in zip(LARGEST, found, expected, strict=True)}


def small_config():
    """Returns the published recipe on a network of two blocks, with heads of 72 as in XL/2."""
    sizes = {"cls": "DiT", "depth": 2, "hidden_size": 288, "num_heads": 4, "patch_size": 2}
    words = [f"--config.model.{name}={value}" for name, value in sizes.items()]
    return costs.config_without_data(["--config=configs/load_config.py:default", *words])[0]


def gradient(config):
    """Returns the cosine and ratio of the norms of the gradients in half precision and in float32.

    The parameters are moved from where they begin: there adaLN is zero, and most gradients with it.
    """
    made = parts.make(config, sharding.NOWHERE)
    method = made.method
    x = jax.random.normal(jax.random.key(1), (BATCH, *made.image_shape))
    given = {"y": jnp.arange(BATCH) % made.num_classes}
    draws = method.draw(jax.random.key(2), x.shape, 0)
    options = hardware.compiler_options(sharding.make_mesh(1, jax.devices()[:1]))

    def of(dtype):
        module = made.module.clone(dtype=dtype, half_residual=dtype == jnp.bfloat16)
        net = network.function(module)
        params = network.init_params(module, jax.random.key(0), x.shape[1:])
        params = jax.tree.map(
            lambda p: p + 0.03 * jax.random.normal(jax.random.key(p.size), p.shape), params
        )
        gradient = jax.grad(lambda p: method.loss(net, p, x, given, draws, {})[0])
        grads = jax.jit(gradient, compiler_options=options)(params)
        leaves = [np.asarray(g, np.float64).ravel() for g in jax.tree.leaves(grads)]
        return np.concatenate(leaves)

    with jax.default_matmul_precision("highest"):
        full = of(jnp.float32)
    half = of(jnp.bfloat16)
    norms = np.linalg.norm(full), np.linalg.norm(half)
    return float(full @ half / norms[0] / norms[1]), float(norms[1] / norms[0])
