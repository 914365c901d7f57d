"""MeanFlow's step as published, without its savings: what the project's step is held against.

Every row goes through the JVP and both guidance passes, 6 forward passes of a batch instead of 4.5;
blocks are written out one after the other, nothing is computed again, no norm is taken. Written
from the papers (arXiv 2505.13447, algorithm 1, section 4.2 and appendix B; 2212.09748),
independently of methods/meanflow.py and of the loop in models/dit.py.
"""

from functools import partial
from operator import itemgetter

import flax.linen as nn
import jax
import jax.numpy as jnp

import parts
import train
from models import blocks, dit, network


def loss(net, params, x, y, draws, method):
    """Returns the loss and, by row, the squared error and the v_loss.

    Args:
      net: (params, (z, c), jvp=0) -> (`Velocity`,), as of `models.network.function`.
      x: float32 (B, h, w, c); y: labels int32 (B,); draws: of `method`, a `MeanFlow`.
    """
    t, r, e, drop = draws
    column, null_label = (-1, 1, 1, 1), method.num_classes
    v = e - x
    z = (1 - t.reshape(column)) * x + t.reshape(column) * e

    def u(z, t, r, y):
        return net(params, (z, {"t": t, "h": t - r, "y": y}), jvp=0)[0].u

    v_g = v
    if method.guidance_eq == "cfg":
        v_u = u(z, t, t, jnp.full_like(y, null_label))
        v_c = u(z, t, t, y)
        inside = jnp.logical_and(t >= method.t_start, t <= method.t_end).reshape(column)
        omega = jnp.where(inside, method.omega, 1.0)
        kappa = jnp.where(inside, method.kappa, 0.0)
        v_g = omega * v + kappa * v_c + (1 - omega - kappa) * v_u
    v_g = jax.lax.stop_gradient(jnp.where(drop.reshape(column), v, v_g))
    y = jnp.where(drop, null_label, y)

    dr, dt = method.tangent
    tangents = (v_g, jnp.full_like(t, dt), jnp.full_like(r, dr))
    prediction, du_dt = jax.jvp(lambda z, t, r: u(z, t, r, y), (z, t, r), tangents)
    target = jax.lax.stop_gradient(v_g - (t - r).clip(0, 1).reshape(column) * du_dt)
    error = ((prediction - target) ** 2).sum((1, 2, 3))
    weight = jax.lax.stop_gradient(1 / (error + method.norm_eps) ** method.norm_p)
    return (weight * error).mean(), (error, ((prediction - v) ** 2).sum((1, 2, 3)))


def step(recipe, net, key, state, batch, loss=loss):
    """Takes a step of a loss: AdamW and one average, (`TrainState`, raw records) -> `TrainState`.

    Args:
      recipe: `train.Recipe`, whose draws and optimizer are taken.
      net: as of `loss`.
    """
    key_x, key_draw = jax.random.split(jax.random.fold_in(key, state.step))
    x, given = recipe.codec.encode(batch, key_x)
    draws = recipe.method.draw(key_draw, x.shape, state.step)

    def of_params(params):
        return loss(net, params, x, given["y"], draws, recipe.method)

    grads, _ = jax.grad(of_params, has_aux=True)(state.params)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p + u, state.params, updates)
    (decay,), ((name, average),) = recipe.ema_vals, state.ema_params.items()
    average = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, average, params)
    return train.TrainState(state.step + 1, params, {name: average}, opt_state, state.sums)


def apart(params):
    """Returns the parameters of a `DiT` with a list of blocks instead of a stack."""
    stack = params["blocks"]
    count = len(jax.tree.leaves(stack)[0])
    return params | {"blocks": [jax.tree.map(itemgetter(i), stack) for i in range(count)]}


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def velocity(module, params, batch, jvp=None):
    """Computes (`Velocity`,) of a `DiT` in float32, of parameters from `apart`."""
    (z, c), D, p = batch, module.hidden_size, module.patch_size
    (B, h, w, _), first = z.shape, params["x_embedder"]
    x = jnp.tensordot(dit.patchify(z, p), first["kernel"], 3) + first["bias"]
    x += dit.position_embedding(D, h // p, w // p)
    c = sum(
        dit.TimeEmbedder(D).apply({"params": params[f"{name}_embedder"]}, c[name])
        for name in module.time_cond
    ) + params["y_embedder"]["embedding"][c["y"]]  # fmt: skip
    c = nn.silu(c)

    def attention(params, x):
        heads = (B, -1, module.num_heads, D // module.num_heads)
        q, k, v = (a.reshape(heads) for a in jnp.split(dense(params["qkv"], x), 3, axis=-1))
        weights = nn.softmax(jnp.einsum("bihd,bjhd->bhij", q, k) * heads[-1] ** -0.5)
        return dense(params["proj"], jnp.einsum("bhij,bjhd->bihd", weights, v).reshape(x.shape))

    for block in params["blocks"]:
        a, b, gate, a2, b2, gate2 = jnp.split(dense(block["adaLN"], c), 6, axis=-1)
        inner = blocks.modulate(blocks.layer_norm(x), a, b)
        x += gate[:, None] * attention(block["attn"], inner)
        inner = blocks.modulate(blocks.layer_norm(x), a2, b2)
        x += gate2[:, None] * dense(block["mlp"]["fc2"], nn.gelu(dense(block["mlp"]["fc1"], inner)))
    last = params["final_layer"]
    shift, scale = jnp.split(dense(last["adaLN"], c), 2, axis=-1)
    x = dense(last["linear"], blocks.modulate(blocks.layer_norm(x), shift, scale))
    return (network.Velocity(dit.unpatchify(x, p, z.shape[1:])),)


def make(config):
    """Makes (key -> state, (state, raw records) -> state) of a config with a `DiT` and MeanFlow."""
    made, key = parts.make(config), jax.random.key(0)
    recipe, _ = train.make_recipe(config.training, made, 1)

    def init(key):
        params = network.init_params(made.module, key, made.image_shape)
        return train.fresh_state(recipe, apart(params))

    return init, partial(step, recipe, partial(velocity, made.module), key)
