"""A plain Flax port of the FID network, as a yardstick for speed and for correctness.

Written the obvious way: one module per convolution, batch norms unfolded, pools by
`reduce_window`. Nothing in the project depends on it except tests and the benchmark.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class ConvNorm(nn.Module):
    features: int
    window: tuple
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(
            self.features,
            self.window,
            self.stride,
            self.padding,
            use_bias=False,
            precision="highest",
            name="conv",
        )(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x))


def _avg_pool(x):
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _max_pool_same(x):
    return nn.max_pool(x, (3, 3), padding="SAME")


class PlainInception(nn.Module):
    """Pixels scaled to (x - 128) / 128, (N, 299, 299, 3) -> pool features (N, 2048)."""

    @nn.compact
    def __call__(self, x):
        def conv(name, n, h, w, x, **options):
            return ConvNorm(n, (h, w), name=name.replace(".", "_"), **options)(x)

        valid = {"padding": "VALID"}
        half = {"padding": "VALID", "stride": 2}
        x = conv("Conv2d_1a_3x3", 32, 3, 3, x, **half)
        x = conv("Conv2d_2a_3x3", 32, 3, 3, x, **valid)
        x = conv("Conv2d_2b_3x3", 64, 3, 3, x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = conv("Conv2d_3b_1x1", 80, 1, 1, x)
        x = conv("Conv2d_4a_3x3", 192, 3, 3, x, **valid)
        x = nn.max_pool(x, (3, 3), (2, 2))
        for b, n in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            y = conv(f"{b}.branch5x5_1", 48, 1, 1, x)
            z = conv(f"{b}.branch3x3dbl_1", 64, 1, 1, x)
            z = conv(f"{b}.branch3x3dbl_2", 96, 3, 3, z)
            branches = [
                conv(f"{b}.branch1x1", 64, 1, 1, x),
                conv(f"{b}.branch5x5_2", 64, 5, 5, y),
                conv(f"{b}.branch3x3dbl_3", 96, 3, 3, z),
                conv(f"{b}.branch_pool", n, 1, 1, _avg_pool(x)),
            ]
            x = jnp.concatenate(branches, -1)
        z = conv("Mixed_6a.branch3x3dbl_1", 64, 1, 1, x)
        z = conv("Mixed_6a.branch3x3dbl_2", 96, 3, 3, z)
        branches = [
            conv("Mixed_6a.branch3x3", 384, 3, 3, x, **half),
            conv("Mixed_6a.branch3x3dbl_3", 96, 3, 3, z, **half),
            nn.max_pool(x, (3, 3), (2, 2)),
        ]
        x = jnp.concatenate(branches, -1)
        for b, n in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            y = conv(f"{b}.branch7x7_1", n, 1, 1, x)
            y = conv(f"{b}.branch7x7_2", n, 1, 7, y)
            z = conv(f"{b}.branch7x7dbl_1", n, 1, 1, x)
            z = conv(f"{b}.branch7x7dbl_2", n, 7, 1, z)
            z = conv(f"{b}.branch7x7dbl_3", n, 1, 7, z)
            z = conv(f"{b}.branch7x7dbl_4", n, 7, 1, z)
            branches = [
                conv(f"{b}.branch1x1", 192, 1, 1, x),
                conv(f"{b}.branch7x7_3", 192, 7, 1, y),
                conv(f"{b}.branch7x7dbl_5", 192, 1, 7, z),
                conv(f"{b}.branch_pool", 192, 1, 1, _avg_pool(x)),
            ]
            x = jnp.concatenate(branches, -1)
        y = conv("Mixed_7a.branch3x3_1", 192, 1, 1, x)
        z = conv("Mixed_7a.branch7x7x3_1", 192, 1, 1, x)
        z = conv("Mixed_7a.branch7x7x3_2", 192, 1, 7, z)
        z = conv("Mixed_7a.branch7x7x3_3", 192, 7, 1, z)
        branches = [
            conv("Mixed_7a.branch3x3_2", 320, 3, 3, y, **half),
            conv("Mixed_7a.branch7x7x3_4", 192, 3, 3, z, **half),
            nn.max_pool(x, (3, 3), (2, 2)),
        ]
        x = jnp.concatenate(branches, -1)
        for b, pool in (("Mixed_7b", _avg_pool), ("Mixed_7c", _max_pool_same)):
            y = conv(f"{b}.branch3x3_1", 384, 1, 1, x)
            z = conv(f"{b}.branch3x3dbl_1", 448, 1, 1, x)
            z = conv(f"{b}.branch3x3dbl_2", 384, 3, 3, z)
            branches = [
                conv(f"{b}.branch1x1", 320, 1, 1, x),
                conv(f"{b}.branch3x3_2a", 384, 1, 3, y),
                conv(f"{b}.branch3x3_2b", 384, 3, 1, y),
                conv(f"{b}.branch3x3dbl_3a", 384, 1, 3, z),
                conv(f"{b}.branch3x3dbl_3b", 384, 3, 1, z),
                conv(f"{b}.branch_pool", 192, 1, 1, pool(x)),
            ]
            x = jnp.concatenate(branches, -1)
        return x.mean((1, 2))


def variables(state_dict):
    """Flax variables from a dict in torch-fidelity's names (`Mixed_5b.branch1x1.bn.weight`)."""
    names = {"bn.weight": "scale", "bn.bias": "bias", "bn.running_mean": "mean"}
    names |= {"bn.running_var": "var"}
    params, stats = {}, {}
    for key, value in state_dict.items():
        if key.startswith("fc."):
            continue
        layer, kind, leaf = key.rsplit(".", 2)
        layer = layer.replace(".", "_")
        if kind == "conv":
            params.setdefault(layer, {})["conv"] = {"kernel": jnp.transpose(value, (2, 3, 1, 0))}
        elif leaf in ("weight", "bias"):
            entry = params.setdefault(layer, {}).setdefault("bn", {})
            entry[names[f"{kind}.{leaf}"]] = jnp.asarray(value)
        else:
            stats.setdefault(layer, {}).setdefault("bn", {})[names[f"{kind}.{leaf}"]] = jnp.asarray(
                value
            )
    return {"params": params, "batch_stats": stats}


@jax.jit
def pool_features(variables, images):
    """Pool features (N, 2048) of `images` uint8 (N, H, W, 3), half-pixel bilinear resize."""
    x = images.astype(jnp.float32)
    shape = (len(x), 299, 299, 3)
    x = jax.image.resize(x, shape, "bilinear", antialias=False, precision="highest")
    return PlainInception().apply(variables, (x - 128) / 128)
