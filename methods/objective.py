"""What an objective is: draws, loss and velocity, and the options that several have."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from methods import path


class Draws(NamedTuple):
    """What is random in one step, where an objective needs no more."""

    t: jax.Array  # (B,) in [0, 1]
    r: jax.Array  # (B,) in [0, t]
    noise: jax.Array  # (B, ..., C), standard normal
    drop: jax.Array  # (B,) bool: the row trains without its label


class Guidance(NamedTuple):
    """Guidance that is chosen at sampling time; float32 ()."""

    omega: jax.Array  # its scale; 1: none
    t_min: jax.Array  # it holds for t_min <= t <= t_max
    t_max: jax.Array
    channels: jax.Array  # int32 (), how many channels it concerns, the first ones; 0: all


class Objective:
    """Base of all objectives: a frozen dataclass of the options that it has.

    It is given the network as a function (`models.network.function`), so it knows no architecture.
    A subclass has `draw`, `loss` and, where the network is no average velocity, `velocity`.
    """

    rows = ("error",)  # what `loss` tells by row; `error...` are also shown by kind of row and time
    conditions = ()  # what its network has to take beside t, h and y
    frozen = ()  # names of the frozen networks (`models.frozen.FROZEN`) that `held` has to hold
    needs_v = False  # whether its network has to predict the instantaneous velocity too
    instantaneous = False  # whether it asks at h = 0 only, so that its network has to take t
    guided_at_sampling = False  # whether `velocity` makes use of a `Guidance`
    needs_through = False  # whether a gradient flows through the tangent of its JVP
    noise_scale = 1.0  # standard deviation of z_1

    def draw(self, key, shape, step):
        """Draws what is random in step number `step`, int32 (), for data of `shape` (B, ..., C).

        Returns:
          `Draws`, or a NamedTuple with more; every array has B rows.
        """
        raise NotImplementedError

    def loss(self, net, params, x, given, draws, held):
        """Computes the loss of a batch, deterministic in `draws`.

        Args:
          net: from `models.network.function`.
          params: its parameters; the only argument through which a gradient flows.
          x: data, float32 (B, ..., C).
          given: what comes with the data and goes on into the network: `y`, int32 (B,), and more.
          draws: from `draw`.
          held: what has no gradient: `ema_params`, the first average, and by name each network of
            `frozen` as a function of its inputs.

        Returns:
          The loss, a float32 scalar, and {name: float32 (B,) for name in rows}, in the order of
          the batch.
        """
        raise NotImplementedError

    def velocity(self, net, params, z, t, r, given, guidance=None):
        """Computes the velocity over [r, t] that the sampler follows, float32 like z.

        Here the average u(z_t, t, t - r, y); a guidance that is trained in needs no other.

        Args:
          guidance: `Guidance`, or None; traced, so that a sweep compiles once.
        """
        return net(params, (z, {"t": t, "h": t - r, **given}))[0].u

    def unconditional(self, given):
        """Returns `given` with the label of no class in every row, and its conditions dropped.

        Args:
          given: `y`, int32 (B,) or weights float32 (B, K + 1), and more; `null`, {name: bool (B,)},
            says of the conditions that can be dropped which ones are.
        """
        y = given["y"]
        if "null" in given:
            given = given | {"null": jax.tree.map(jnp.ones_like, given["null"])}
        if y.ndim == 1:
            return given | {"y": jnp.full_like(y, self.num_classes)}
        return given | {"y": jnp.zeros_like(y).at[:, self.num_classes].set(1)}

    def dropped(self, given, drop):
        """Returns `given`, and in the rows where `drop`, bool (B,), what `unconditional` has."""

        def choose(without, own):
            return jnp.where(path.by_row(drop, own), without, own)

        return jax.tree.map(choose, self.unconditional(given), given)

    def check_unguided(self):
        """Raises ValueError where it is guided: for data with nothing to be guided by."""
        rule = "must be none where dataset.num_classes is 0: without classes there is no guidance"
        check(vars(self).get("guidance_eq", "none") == "none", "guidance_eq", rule)

    def guidance_at(self, guidance, t):
        """Returns the `Guidance` of a step that begins at the times t (B,), whatever its stages."""
        return guidance

    def phase(self, step, total):
        """Returns the objective of this phase of training, after `step` of `total` steps, both int.

        It is hashable, and another one where the program changes (a JVP begins): the step is
        compiled once for each.
        """
        return self

    def equal_count(self, batch_size):
        """Counts the rows of a batch that have r = t."""
        return path.equal_count(batch_size, self.data_proportion)

    def groups(self, batch_size):
        """Counts the groups of a batch, of one layout; gradient accumulation cuts between them."""
        return path.num_groups(batch_size, self.equal_count(batch_size))

    def passes(self, batch_size):
        """Counts the forward passes of a step by row; a backward pass counts as two."""
        raise NotImplementedError

    def passes_of_both(self, batch_size):
        """Counts those of them that predict both velocities; all others predict one."""
        return 0.0


def check(condition, option, rule):
    """Raises ValueError in a line where the rule of an option of `method` is broken."""
    if not condition:
        raise ValueError(f"method.{option} {rule}")


def check_options(method):
    """Checks those options of an objective that several have, by name."""
    options = vars(method)
    for name in options.keys() & {
        "data_proportion", "class_dropout_prob", "t_start", "t_end", "mix", "fade_start"
    }:  # fmt: skip
        check(0 <= options[name] <= 1, name, f"must lie in 0..1, got {options[name]}")
    for name in options.keys() & {"P_std", "P_std_r", "norm_p"}:
        value = options[name]
        check(value is None or value >= 0, name, f"must not be negative, got {value}")
    if "norm_eps" in options:
        check(method.norm_eps > 0, "norm_eps", f"must be above 0, got {method.norm_eps}")
    if "noise_dist" in options:
        kinds = ("logit_normal", "uniform")
        rule = f"is one of {' | '.join(kinds)}, not {method.noise_dist!r}"
        check(method.noise_dist in kinds, "noise_dist", rule)
    if "guidance_eq" in options:
        kinds = ("cfg", "mix", "none") if "mix" in options else ("cfg", "none")
        rule = f"is one of {' | '.join(kinds)}, not {method.guidance_eq!r}"
        check(method.guidance_eq in kinds, "guidance_eq", rule)
        check(method.kappa < 1, "kappa", "must be below 1: the scale is omega / (1 - kappa)")
        check(method.kappa >= 0, "kappa", f"must not be negative, got {method.kappa}")
        check(method.t_start <= method.t_end, "t_start", "must not be above method.t_end")
