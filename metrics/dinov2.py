"""DINOv2, the feature network of FD-DINOv2 (Oquab et al., arXiv 2304.07193; Stein et al.,
arXiv 2306.04675), in float32 at the highest precision of the platform.

A vision transformer with patches of 14 pixels, without registers; its feature is the class token
after the last norm. The parameters are a dict that `dinov2_weights` reads from the published
files; those of the blocks are stacked along a first axis (depth, ...), so that a single block is
compiled.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from metrics import resize as resizing

SIZE = 224  # pixels, whatever the images have
PATCH = 14
HEAD_WIDTH = 64  # in all published sizes
EPSILON = 1e-6  # of the norms
POSITION_OFFSET = 0.1  # of the original code; Hugging Face's port has none
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIZES = ("edm2", "edm2_pil", "torch_fidelity")
HIGHEST = jax.lax.Precision.HIGHEST


def features(params, images, resize="edm2", heads=None, offset=POSITION_OFFSET):
    """Returns the class token after the last norm, float32 (N, D), of images uint8 (N, H, W, 3).

    Args:
      params: from `dinov2_weights.load`.
      resize: how the images come to 224 x 224, see `resized`.
      heads: of the attention; None: D / 64, as in the published sizes.
      offset: of the position table, see `interpolation`.
    """
    x = resized(images, resize)
    x = (x / 255 - np.float32(MEAN)) / np.float32(STD)
    x = _tokens(params, x, offset)  # (N, 1 + 256, D)
    heads = heads or x.shape[-1] // HEAD_WIDTH
    x, _ = jax.lax.scan(lambda x, p: (_block(p, x, heads), None), x, params["blocks"])
    return _norm(params["norm"], x[:, 0])


def resized(images, resize):
    """Resizes images uint8 (N, H, W, 3) to grey values float32 (N, 224, 224, 3), any aspect.

    `edm2`: antialiased bicubic, neither clipped nor rounded. `edm2_pil`: Pillow's bicubic, rounded
    and clipped (dgm-eval, arXiv 2306.04675). `torch_fidelity`: TF1 bilinear, not antialiased. Each
    is another measurement.
    """
    height, width = images.shape[1:3]
    if resize == "edm2_pil":
        return resizing.pil_bicubic(images, SIZE).astype(jnp.float32)
    if resize == "edm2":
        rows, columns = (np.float32(resizing.bicubic(n, SIZE)) for n in (height, width))
    else:
        rows, columns = (resizing.bilinear(n, SIZE, "tf1") for n in (height, width))
    return resizing.apply(images, rows, columns)


@functools.cache
def interpolation(table, grid, offset=POSITION_OFFSET):
    """Returns the matrix (grid, table), float32, from an axis of the position table to the grid.

    Bicubic with a = -0.75, not antialiased, borders repeated. The original code asks for the
    scale (grid + 0.1) / table, so the last cell lies short of where it should; the features
    depend on it. The ratio is rounded to float32, as in torch.
    """
    if table == grid:
        return np.eye(grid, dtype=np.float32)
    ratio = np.float32(table / (grid + offset))
    source = (np.arange(grid, dtype=np.float32) + np.float32(0.5)) * ratio - np.float32(0.5)
    low = np.floor(source).astype(int)
    matrix, rows = np.zeros((grid, table)), np.arange(grid)
    for tap in range(-1, 3):
        index = np.clip(low + tap, 0, table - 1)
        np.add.at(matrix, (rows, index), resizing.keys_cubic(source - (low + tap), -0.75))
    return matrix.astype(np.float32)


def positions(table, grid=SIZE // PATCH, offset=POSITION_OFFSET):
    """Resizes the table of positions (M M, D) to float32 (grid grid, D), row by row."""
    side = round(table.shape[0] ** 0.5)
    matrix = interpolation(side, grid, offset)
    square = table.reshape(side, side, -1)
    square = jnp.einsum("pm,qn,mnd->pqd", matrix, matrix, square, precision=HIGHEST)
    return square.reshape(grid * grid, -1)


def _tokens(p, x, offset):
    """Turns normalised images (N, 224, 224, 3) into tokens, the class token first."""
    n, grid = len(x), SIZE // PATCH
    x = x.reshape(n, grid, PATCH, grid, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    x = _linear(p["patch"], x.reshape(n, grid * grid, -1))  # (N, 256, D)
    x = x + positions(p["positions"][1:], grid, offset)
    first = jnp.broadcast_to(p["cls_token"] + p["positions"][0], (n, 1, x.shape[-1]))
    return jnp.concatenate([first, x], axis=1)


def _block(p, x, heads):
    x = x + p["ls1"] * _attention(p, _norm(p["norm1"], x), heads)
    y = jax.nn.gelu(_linear(p["fc1"], _norm(p["norm2"], x)), approximate=False)
    return x + p["ls2"] * _linear(p["fc2"], y)


def _attention(p, x, heads):
    n, tokens, width = x.shape
    qkv = _linear(p["qkv"], x).reshape(n, tokens, 3, heads, width // heads)
    q, k, v = jnp.moveaxis(qkv, 2, 0)  # (N, T, heads, D / heads)
    logits = jnp.einsum("nqhd,nkhd->nhqk", q * (width // heads) ** -0.5, k, precision=HIGHEST)
    x = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(logits), v, precision=HIGHEST)
    return _linear(p["proj"], x.reshape(n, tokens, width))


def _linear(p, x):
    return jnp.matmul(x, p["kernel"], precision=HIGHEST) + p["bias"]


def _norm(p, x):
    mean = x.mean(-1, keepdims=True)
    centred = x - mean
    variance = (centred**2).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + EPSILON) * p["scale"] + p["bias"]
