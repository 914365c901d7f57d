"""The feature network of FID: Inception v3 as TensorFlow published it on 2015-12-05.

It differs from the Inception v3 of other libraries: average pools leave out the padding, the
pool branch of the last block takes a maximum, batch norms have epsilon 1e-3, there are 1008
classes, and pixels are scaled as (x - 128) / 128. All arithmetic is float32 at the highest
precision of the platform, since bfloat16 here moves the FID by whole points.

The parameters are a flat dict, layer -> {kernel, bias}: 94 convolutions with their batch norms
folded in (kernels HWIO) and `fc` (2048, 1008). The names are torchvision's. They are
read from the files that people have by metrics/inception_weights.py.
"""

import jax
import jax.numpy as jnp
import numpy as np

from metrics import resize as resizing

SIZE = 299
RESIZES = resizing.BILINEAR
HIGHEST = jax.lax.Precision.HIGHEST


def features(params, images, resize="half_pixel"):
    """Returns what the metrics need of `images` uint8 (N, H, W, 3), H and W >= 1.

    Returns float32 `pool` (N, 2048) for FID, `logits` (N, 1008), `logits_no_bias` (N, 1008) for
    the Inception score, `spatial` (N, 2023) for sFID: the first 7 channels of the first branch
    of Mixed_6d, flattened in the order height, width, channel. Pure; to be called inside jit.

    `resize` is `half_pixel`, as the published MeanFlow numbers, or `tf1`, as ADM, torch-fidelity
    and the NVIDIA tools. Both are bilinear without antialiasing.
    """
    x = (resize_bilinear(images, resize) - 128) / 128  # (N, 299, 299, 3)
    x, spatial = _trunk(params, x)  # (N, 8, 8, 2048)
    pool = x.mean((1, 2))
    logits = jnp.matmul(pool, params["fc"]["kernel"], precision=HIGHEST)
    return {
        "pool": pool,
        "logits": logits + params["fc"]["bias"],
        "logits_no_bias": logits,
        "spatial": spatial[..., :7].reshape(len(images), -1),
    }


def _trunk(p, x):
    x = _conv(p, "Conv2d_1a_3x3", x, stride=2, padding="VALID")  # (N, 149, 149, 32)
    x = _conv(p, "Conv2d_2a_3x3", x, padding="VALID")
    x = _conv(p, "Conv2d_2b_3x3", x)
    x = _max_pool(x)  # (N, 73, 73, 64)
    x = _conv(p, "Conv2d_3b_1x1", x)
    x = _conv(p, "Conv2d_4a_3x3", x, padding="VALID")
    x = _max_pool(x)  # (N, 35, 35, 192)
    x = _block_a(p, "Mixed_5b", x)
    x = _block_a(p, "Mixed_5c", x)
    x = _block_a(p, "Mixed_5d", x)
    x = _block_b(p, "Mixed_6a", x)  # (N, 17, 17, 768)
    x, _ = _block_c(p, "Mixed_6b", x)
    x, _ = _block_c(p, "Mixed_6c", x)
    x, spatial = _block_c(p, "Mixed_6d", x)
    x, _ = _block_c(p, "Mixed_6e", x)
    x = _block_d(p, "Mixed_7a", x)  # (N, 8, 8, 1280)
    x = _block_e(p, "Mixed_7b", x, _pool_branch)
    x = _block_e(p, "Mixed_7c", x, _max_branch)
    return x, spatial


# ------------------------------------------------------------------------------------- blocks


def _block_a(p, name, x):
    return jnp.concatenate(
        [
            _conv(p, f"{name}.branch1x1", x),
            _chain(p, f"{name}.branch5x5", x, "_1", "_2"),
            _chain(p, f"{name}.branch3x3dbl", x, "_1", "_2", "_3"),
            _pool_branch(p, f"{name}.branch_pool", x),
        ],
        axis=-1,
    )


def _block_b(p, name, x):
    double = _chain(p, f"{name}.branch3x3dbl", x, "_1", "_2")
    return jnp.concatenate(
        [
            _conv(p, f"{name}.branch3x3", x, stride=2, padding="VALID"),
            _conv(p, f"{name}.branch3x3dbl_3", double, stride=2, padding="VALID"),
            _max_pool(x),
        ],
        axis=-1,
    )


def _block_c(p, name, x):
    first = _conv(p, f"{name}.branch1x1", x)
    rest = [
        _chain(p, f"{name}.branch7x7", x, "_1", "_2", "_3"),
        _chain(p, f"{name}.branch7x7dbl", x, "_1", "_2", "_3", "_4", "_5"),
        _pool_branch(p, f"{name}.branch_pool", x),
    ]
    return jnp.concatenate([first, *rest], axis=-1), first


def _block_d(p, name, x):
    small = _conv(p, f"{name}.branch3x3_1", x)
    large = _chain(p, f"{name}.branch7x7x3", x, "_1", "_2", "_3")
    return jnp.concatenate(
        [
            _conv(p, f"{name}.branch3x3_2", small, stride=2, padding="VALID"),
            _conv(p, f"{name}.branch7x7x3_4", large, stride=2, padding="VALID"),
            _max_pool(x),
        ],
        axis=-1,
    )


def _block_e(p, name, x, last_branch):
    single = _conv(p, f"{name}.branch3x3_1", x)
    double = _chain(p, f"{name}.branch3x3dbl", x, "_1", "_2")
    return jnp.concatenate(
        [
            _conv(p, f"{name}.branch1x1", x),
            _conv(p, f"{name}.branch3x3_2a", single),
            _conv(p, f"{name}.branch3x3_2b", single),
            _conv(p, f"{name}.branch3x3dbl_3a", double),
            _conv(p, f"{name}.branch3x3dbl_3b", double),
            last_branch(p, f"{name}.branch_pool", x),
        ],
        axis=-1,
    )


# ------------------------------------------------------------------------------------- layers


def _conv(p, name, x, stride=1, padding="SAME"):
    layer = p[name]
    return jax.nn.relu(_linear(layer["kernel"], x, stride, padding) + layer["bias"])


def _chain(p, name, x, *suffixes):
    for suffix in suffixes:
        x = _conv(p, name + suffix, x)
    return x


def _linear(kernel, x, stride=1, padding="SAME"):
    if kernel.shape[:2] == (1, 1):  # a matrix product is up to three times faster on a CPU
        return jnp.matmul(x, kernel[0, 0], precision=HIGHEST)
    size = [(n - k) // stride + 1 for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True)]
    if padding == "VALID":
        # A convolution without padding takes three times as long in the CPU compiler's library
        # as one with, so one row and one column too many are computed and cut off.
        padding = [(0, 1), (0, 1)]
    else:
        size = x.shape[1:3]
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=HIGHEST,
    )
    return y[:, : size[0], : size[1]]


def _pool_branch(p, name, x):
    # The 1x1 convolution comes first: it commutes with the mean, and leaves fewer channels to
    # be pooled. The bias and the ReLU stay behind.
    layer = p[name]
    return jax.nn.relu(_avg_pool(_linear(layer["kernel"], x)) + layer["bias"])


def _max_branch(p, name, x):
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    return _conv(p, name, _windows(jnp.maximum, padded, 1))


def _max_pool(x):
    """Takes maxima over 3x3, stride 2, without padding."""
    return _windows(jnp.maximum, x, 2)


def _avg_pool(x):
    """Takes means over 3x3, stride 1, of the part of the window that lies inside."""
    total = _windows(jnp.add, jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 1)
    rows, columns = (np.full(n, 3.0, np.float32) for n in x.shape[1:3])
    rows[[0, -1]] = columns[[0, -1]] = 2
    return total * (1 / np.outer(rows, columns))[..., None]


def _windows(combine, x, stride):
    """Reduces 3x3 windows, rows and then columns: slices are several times faster on a CPU than
    `reduce_window`, and fuse."""
    for axis in (1, 2):
        end = x.shape[axis] - 2
        a, b, c = (jax.lax.slice_in_dim(x, i, i + end, stride, axis) for i in range(3))
        x = combine(combine(a, b), c)
    return x


# ------------------------------------------------------------------------------------- resize


def resize_bilinear(images, resize):
    """Resizes (N, H, W, C) of any numeric dtype to (N, 299, 299, C) float32; see `features`."""
    rows, columns = (resizing.bilinear(n, SIZE, resize) for n in images.shape[1:3])
    return resizing.apply(images, rows, columns)
