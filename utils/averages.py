"""Averages of weights: by constant decays, by half-lives, and by power functions of time.

The last (post-hoc EMA): Karras et al., arXiv 2312.02696, section 3 and appendix C. The profile of
an average at time t gives the weights at time s <= t the weight (gamma + 1) s^gamma / t^(gamma +
1); its relative standard deviation sigma_rel names it. Times count steps: only their ratios matter.
Snapshots of two tracked profiles are enough to reconstruct any other one after training.

An average has a name, in the state, in checkpoints and in `fid.weights`: `ema_0.9999` by its decay,
`ema_half500` by its half-life in thousands of images, `ema_sigma0.05` by its sigma_rel.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

LONGEST = 12**-0.5  # sigma_rel of the plain average of all steps, gamma = 0


PROFILE = "ema_sigma"  # how the name of a power-function average begins
HALF_LIFE = "ema_half"


def names(decays, sigmas=(), half_lives=()):
    """Returns the names of averages as a tuple, those of decays first."""
    return (
        *(f"ema_{decay}" for decay in decays),
        *(f"{HALF_LIFE}{half:g}" for half in half_lives),
        *(f"{PROFILE}{sigma}" for sigma in sigmas),
    )


def of_options(training):
    """Returns the names of the averages that the options `training` ask for; a dict may lack some.

    The first one is evaluated.
    """
    kinds = ("ema_val", "ema_sigma", "ema_half_life")
    return names(*(training.get(name, ()) for name in kinds))


def sigma_of(name):
    """Returns the sigma_rel in the name of a power-function average; None for another name."""
    return float(name.removeprefix(PROFILE)) if name.startswith(PROFILE) else None


def by_half_life(averages):
    """Returns {half-life in thousands of images, text: tree} of averages by name."""
    halves = {k.removeprefix(HALF_LIFE): tree for k, tree in averages.items() if HALF_LIFE in k}
    if not halves:
        raise ValueError("none of the averages goes by a half-life (training.ema_half_life)")
    return halves


def after_step(averages, params, step, decays, period, sigmas, half_lives=(), images=1):
    """Returns the averages after step number `step` (1, 2, ...), which led to `params`. Pure.

    Args:
      averages: those before it, name -> tree.
      period: steps between two changes of those of `decays`.
      images: of a step.
    """
    constant = {
        name: jax.tree.map(partial(by_decay, decay, period, step), averages[name], params)
        for name, decay in zip(names(decays), decays, strict=True)
    }
    weights = [half_life_weight(step, half_life, images) for half_life in half_lives]
    weights += [update_weight(step, sigma_to_gamma(sigma)) for sigma in sigmas]
    return constant | {
        name: jax.tree.map(partial(update, weight=weight), averages[name], params)
        for name, weight in zip(names((), sigmas, half_lives), weights, strict=True)
    }


def by_decay(decay, period, step, average, value):
    """Returns an average after step number `step`: changed at every `period`-th step alone.

    Then by decay ** period, which is nearly, not exactly, the average of every step.
    """
    new = decay**period * average + (1 - decay**period) * value
    return new if period == 1 else jnp.where(step % period == 0, new, average)


def half_life_weight(step, half_life, images):
    """Returns what the newest weights count after step number `step` (1, 2, ...): ().

    An average forgets half in `half_life` thousands of images, but at most in a twentieth of those
    seen so far (arXiv 2601.22158; its code counts 1,024 images a step).
    """
    forgotten = jnp.minimum(1000.0 * half_life, 0.05 * images * step)
    return -jnp.expm1(-math.log(2) * images / forgotten)


# Power functions --------------------------------------------------------------------------------


def check(name, sigma):
    """Raises ValueError, in a line that begins with `name`, where there is no such profile."""
    if not 0 < sigma < LONGEST:
        raise ValueError(f"{name}: sigma_rel of an average lies between 0 and {LONGEST:.4f}")


def sigma_to_gamma(sigma):
    """Returns the exponent of a profile by its sigma_rel, 0 < sigma < 0.2887, in float64.

    Raises ValueError for another.
    """
    check(sigma, sigma)
    c = float(sigma) ** -2  # the largest root of (g + 2)^2 (g + 3) = c (g + 1)
    roots = np.roots([1, 7, 16 - c, 12 - c])
    return float(roots.real[np.abs(roots.imag) < 1e-6 * np.abs(roots)].max())


def update_weight(step, gamma):
    """Computes the share of the newest weights in the average after step `step` (1, 2, ...): ().

    1 - (1 - 1 / step)^(gamma + 1), in a form that keeps its digits in float32. The first step
    counts fully. Pure, for `jit`.
    """
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / step))


def update(average, value, weight):
    """Returns an average after a step: `weight` of it is the new value. Pure, for `jit`.

    Not as beta average + (1 - beta) value: near 1, beta keeps so few digits of 1 - beta in float32
    that the average would grow or shrink over many steps.
    """
    return average + weight * (value - average)


def coefficients(times, sigmas, time, sigma):
    """Computes the factors of snapshots for the profile `sigma` at `time`: float64 (N,), sum 1.

    Args:
      times, sigmas: of the snapshots, (N,), 0 < times <= time, none of them twice.
      time: one of `times`, or the fit is worse.

    The least-squares fit of the profiles (arXiv 2312.02696, appendix C.3), divided by its sum.
    """
    times = np.asarray(times, np.float64)
    gammas = np.array([sigma_to_gamma(s) for s in sigmas])
    products = _inner_product(times[:, None], gammas[:, None], times, gammas)
    wanted = _inner_product(times, gammas, float(time), sigma_to_gamma(sigma))
    # The Gram matrix of unit profiles has the smaller condition number.
    norm = np.sqrt(np.diag(products))
    found = np.linalg.solve(products / np.outer(norm, norm), wanted / norm) / norm
    return found / found.sum()


def _inner_product(t_a, g_a, t_b, g_b):
    """Integrates the product of two profiles over [0, min(t_a, t_b)]."""
    ratio = np.where(t_a < t_b, (t_a / t_b) ** g_b, (t_b / t_a) ** g_a)
    return (g_a + 1) * (g_b + 1) / (g_a + g_b + 1) * ratio / np.maximum(t_a, t_b)
