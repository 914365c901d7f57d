"""MeanFlow as the equations read, with no row treated apart: what the project is held against.

JVP on all rows, both guidance passes on all rows. Written from the paper (arXiv 2505.13447,
algorithm 1, section 4.2 and appendix B), independently of methods/meanflow.py, and slower by a
third.
"""

import jax
import jax.numpy as jnp
import plain_improved

from methods import improved


def loss(net, params, x, y, draws, method):
    """Returns the loss and, by row, the squared error and the v_loss (improved: of V and of v)."""
    if isinstance(method, improved.Improved):
        return plain_improved.loss(net, params, x, y, draws, method)
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
