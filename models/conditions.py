"""What a network makes of the conditions that come with the data, by their rank.

A vector joins the embedding of time, tokens stand in front of the patches, an array of the sample's
size is embedded like the patches and added to them: the same as concatenating it to z. All weights
by which a vector or an array enters begin at zero, so that a network which is begun with the
weights of one without them (`init_from`) gives that one's outputs exactly.

A dropped condition is a learned row: of the vector, of each patch, or of each token. So is a token
that the mask of the true ones leaves out.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.unet_layers import window
from utils import conditions

NAME = "conditions"  # of the parameters, in every network
normal, xavier = nn.initializers.normal(0.02), nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()


class Embedded(NamedTuple):
    """What conditions add to a network; each float32, or None for none."""

    patches: jax.Array | None = None  # (B, N, D), or of a network without patches (B, h, w, D)
    vector: jax.Array | None = None  # (B, E)
    tokens: jax.Array | None = None  # (B, M, D)

    def on_patches(self, x):
        """Adds what there is to the embedded patches."""
        return x if self.patches is None else x + self.patches

    def on_vector(self, x):
        """Adds what there is to the embedding of time (B, E)."""
        return x if self.vector is None else x + self.vector

    def before(self, x):
        """Puts the tokens in front of a sequence (B, N, D)."""
        return x if self.tokens is None else jnp.concatenate([self.tokens, x], axis=1)


class Embedding(nn.Module):
    """Embeds all conditions of c: `Embedded`.

    Attributes:
      given: of `utils.conditions.Condition`.
      features: of vectors and tokens; patch_features: of arrays.
      patch_size: by which arrays are cut; (): they are not, and pass a convolution.
      dtype: of the products.
    """

    given: tuple[conditions.Condition, ...]
    features: int
    patch_features: int
    patch_size: tuple[int, ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, c):
        patches, vectors, tokens = [], [], []
        for one in self.given:
            null = c.get("null", {}).get(one.name)
            how = dict(kept=one.kept, dtype=self.dtype, name=one.name)
            if one.kind == "vector":
                vectors.append(OfVector(self.features, **how)(c[one.name], null))
            elif one.kind == "array":
                array = OfArray(self.patch_features, patch_size=self.patch_size, **how)
                patches.append(array(c[one.name], null))
            else:
                true = c.get(one.name + conditions.MASK)
                tokens.append(OfTokens(self.features, **how)(c[one.name], true, null))
        return Embedded(
            sum(patches) if patches else None,
            sum(vectors) if vectors else None,
            jnp.concatenate(tokens, axis=1) if tokens else None,
        )


def embedding(given, features, patch_features, patch_size, dtype):
    """Makes the function c -> `Embedded` of a network that takes the conditions `given`."""
    if not given:
        return lambda c: Embedded()
    return Embedding(given, features, patch_features, patch_size, dtype, name=NAME)


class One(nn.Module):
    """Base of the embeddings of one condition."""

    features: int
    kept: bool
    dtype: jnp.dtype
    patch_size: tuple[int, ...] = ()

    def product(self, x, init):
        """Multiplies x by a kernel over all axes behind the first two: float32 (B, n, features)."""
        kernel = self.param("kernel", init, (*x.shape[2:], self.features))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return jnp.tensordot(x, kernel, x.ndim - 2, preferred_element_type=jnp.float32)

    def or_null(self, x, null, init):
        """Returns x with a learned row where `null`, bool, of which each axis is of x or 1."""
        row = self.param("null", init, (self.features,))
        return x if null is None else jnp.where(null, row, x)


class OfVector(One):
    """(B, ...) -> (B, features)."""

    @nn.compact
    def __call__(self, x, null):
        x = self.product(x.reshape(len(x), 1, -1), zeros)[:, 0]
        return x if self.kept else self.or_null(x, null if null is None else null[:, None], zeros)


class OfArray(One):
    """(B, h, w, c) -> (B, N, features) by patches, or (B, h, w, features)."""

    @nn.compact
    def __call__(self, x, null):
        if self.patch_size:
            (p, q), (B, h, w, c) = self.patch_size, x.shape
            x = x.reshape(B, h // p, p, w // q, q, c).swapaxes(2, 3)
            x = self.product(x.reshape(B, -1, p, q, c), zeros)
        else:
            same = dict(use_bias=False, kernel_init=zeros, dtype=self.dtype, name="conv")
            x = nn.Conv(self.features, **window(x.shape[1] == 1), **same)(x).astype(jnp.float32)
        if self.kept:
            return x
        null = null if null is None else jnp.expand_dims(null, tuple(range(1, x.ndim)))
        return self.or_null(x, null, zeros)


class OfTokens(One):
    """(B, M, D) -> (B, M, features) with learned positions."""

    @nn.compact
    def __call__(self, x, true, null):
        positions = self.param("positions", normal, (x.shape[1], self.features))
        out = jnp.zeros(x.shape[:2], bool) if true is None else ~true
        out = out if null is None else out | null[:, None]
        return self.or_null(self.product(x, xavier), out[..., None], normal) + positions


# Sizes --------------------------------------------------------------------------------------------


def num_tokens(given):
    """Counts the tokens in front of the patches."""
    return sum(one.shape[0] for one in given if one.kind == "tokens")


def products(given, features, patch_features):
    """Counts the products of numbers by which conditions are embedded, for one image."""
    total = 0
    for one in given:
        size = 1
        for length in one.shape:
            size *= length
        total += size * (patch_features if one.kind == "array" else features)
    return total
