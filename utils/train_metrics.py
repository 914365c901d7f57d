"""The metrics of training: summed on the device, step by step, and read once per log period.

The sums are part of the training state, so the means of a period are the same whether or not the
run was interrupted within it. What an objective tells by row is known here by its names alone:
rows called `error` or `error_...` are shown by kind of row and by time, others as their mean.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

TIME_BUCKETS = 4  # equal parts of [0, 1] by which errors are logged
NORMS = ("grad_norm", "update_norm", "param_norm")
KINDS = ("r=t", "r<t")


def errors_of(rows):
    """Returns those names of rows that are errors."""
    return [name for name in rows if name.split("_")[0] == "error"]


def scalars_of(rows):
    """Returns the names of the means: the loss, rows that are no errors, and the norms."""
    return ("loss", *(name for name in rows if name not in errors_of(rows)), *NORMS)


def zero_sums(rows):
    """Returns sums for the start of a log period: {name: float32 () or (TIME_BUCKETS,)}.

    Args:
      rows: names of what the objective tells by row.
    """
    names = [*scalars_of(rows), "steps", "skipped", *(f"rows_{kind}" for kind in KINDS)]
    names += [f"{error}_{kind}" for error in errors_of(rows) for kind in KINDS]
    by_time = ["rows_by_time", *(f"{error}_by_time" for error in errors_of(rows))]
    return {
        **{name: jnp.zeros(()) for name in names},
        **{name: jnp.zeros(TIME_BUCKETS) for name in by_time},
        "nonfinite_step": jnp.full((), -1, jnp.int32),  # the first one, or -1
    }


def measure(loss, grads, before, params, ema_params, norm=optax.tree.norm):
    """Computes the loss and the norms of a step, {name: float32 ()}, and whether it is finite.

    Args:
      before, params: the weights before and after it; ema_params: their averages by name.
      norm: of a tree of arrays.
    """
    distances = [norm(jax.tree.map(jnp.subtract, a, params)) for a in ema_params.values()]
    norms = {
        "grad_norm": norm(grads),
        # Not of `updates`: XLA would read the moments twice to have them (3 GB a step of DiT-B).
        "update_norm": norm(jax.tree.map(jnp.subtract, params, before)),
        "param_norm": norm(params),
    }
    # Asked for the distances, XLA makes weights and averages in one pass (TPU).
    finite = jnp.isfinite(loss + norms["grad_norm"] + norms["param_norm"] + sum(distances))
    return {"loss": loss, **norms}, finite


def begin_period(sums, fresh, rows):
    """Returns the sums, or where `fresh`, bool (), those that a log period begins with. Pure."""
    zero = zero_sums(rows)
    return jax.tree.map(lambda zero, s: jnp.where(fresh, zero, s), zero, sums)


def add(sums, step, scalars, rows, t, r, finite, skip_nonfinite):
    """Adds one step. Pure.

    Args:
      sums: from `zero_sums`.
      step: int32 (), steps done before this one.
      scalars: the loss and the NORMS by name.
      rows: what the objective tells by row, float32 (B,) by name.
      t, r: times, float32 (B,).
      finite: bool (), whether loss and gradient are.
      skip_nonfinite: whether a step that is not finite was left out, and is only counted.
    """
    differ = r < t
    bucket = jnp.clip((t * TIME_BUCKETS).astype(jnp.int32), 0, TIME_BUCKETS - 1)
    bucket = jax.nn.one_hot(bucket, TIME_BUCKETS)  # (B, TIME_BUCKETS)
    errors = errors_of(rows)
    new = {
        **scalars,
        **{name: jnp.mean(value) for name, value in rows.items() if name not in errors},
        "steps": 1.0,
        "rows_r=t": jnp.sum(~differ),
        "rows_r<t": jnp.sum(differ),
        "rows_by_time": jnp.sum(bucket, axis=0),
    }
    for name in errors:
        error = rows[name]
        new[f"{name}_r=t"] = jnp.sum(jnp.where(differ, 0, error))
        new[f"{name}_r<t"] = jnp.sum(jnp.where(differ, error, 0))
        new[f"{name}_by_time"] = jnp.sum(bucket * error[:, None], axis=0)
    added = sums | {name: sums[name] + value for name, value in new.items()}
    if skip_nonfinite:
        left_out = sums | {"skipped": sums["skipped"] + 1}
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), added, left_out)
    first = (sums["nonfinite_step"] < 0) & ~finite
    return added | {"nonfinite_step": jnp.where(first, step + 1, sums["nonfinite_step"])}


class NotFiniteError(FloatingPointError):
    """A loss or gradient that is not finite; `step` is the first one of it."""

    def __init__(self, step, line):
        super().__init__(line)
        self.step = step


def check_finite(sums):
    """Raises NotFiniteError where a loss or gradient of the period was not finite."""
    if sums["nonfinite_step"] >= 0:
        shown = [name for name in sums if not name.endswith(("_by_time", *KINDS))]
        bad = [name for name in shown if not np.isfinite(sums[name])]
        step = int(sums["nonfinite_step"])
        raise NotFiniteError(
            step,
            f"step {step}: {', '.join(bad)} not finite; the last checkpoint is "
            "from before. Lower training.learning_rate, set training.grad_clip, or leave such "
            "steps out with training.skip_nonfinite",
        )


def means(sums, rows):
    """Turns the sums of a log period (numpy) into means, named as TensorBoard shows them.

    `raw_loss` is the squared error summed over H, W, C, before the adaptive weight: the curve to
    watch, since the normalised `loss` is flat by construction at norm_p = 1. Where every step of
    the period was left out there are no means.
    """
    if not sums["steps"]:
        return {"skipped_steps": float(sums["skipped"])}
    metrics = {name: sums[name] / sums["steps"] for name in scalars_of(rows)}
    count = sums["rows_by_time"]
    for name in errors_of(rows):
        tag, errors = name.replace("error", "raw_loss"), sums[f"{name}_by_time"]
        metrics[f"{tag}/all"] = errors.sum() / max(count.sum(), 1)
        for kind in KINDS:
            if sums[f"rows_{kind}"]:
                metrics[f"{tag}/{kind}"] = sums[f"{name}_{kind}"] / sums[f"rows_{kind}"]
        for i in np.flatnonzero(count):
            interval = f"t={i / TIME_BUCKETS:g}-{(i + 1) / TIME_BUCKETS:g}"
            metrics[f"{tag}/{interval}"] = errors[i] / count[i]
    if sums["skipped"]:
        metrics["skipped_steps"] = sums["skipped"]
    return {name: float(value) for name, value in metrics.items()}
