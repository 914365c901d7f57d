"""The metrics of training: summed on the device, step by step, and read once per log period.

The sums are part of the training state, so the means of a period are the same whether or not the
run was interrupted within it.
"""

import jax
import jax.numpy as jnp
import numpy as np

TIME_BUCKETS = 4  # equal parts of [0, 1] by which the loss is logged
SCALARS = ("loss", "v_loss", "grad_norm", "update_norm", "param_norm")


def zero_sums():
    """The sums at the start of a log period: name -> float32 () or (TIME_BUCKETS,)."""
    names = (*SCALARS, "steps", "skipped", "error_r=t", "error_r<t", "rows_r=t", "rows_r<t")
    return {
        **{name: jnp.zeros(()) for name in names},
        "error_by_time": jnp.zeros(TIME_BUCKETS),
        "rows_by_time": jnp.zeros(TIME_BUCKETS),
        "nonfinite_step": jnp.full((), -1, jnp.int32),  # the first one, or -1
    }


def add(sums, step, scalars, error, t, r, finite, skip_nonfinite):
    """Adds one step. Pure.

    Args:
      sums: from `zero_sums`.
      step: int32 (), steps done before this one.
      scalars: the values of `SCALARS`.
      error: unnormalised loss by row, float32 (B,).
      t, r: times, float32 (B,).
      finite: bool (), whether loss and gradient are.
      skip_nonfinite: whether a step that is not finite was left out, and is only counted.
    """
    differ = r < t
    bucket = jnp.clip((t * TIME_BUCKETS).astype(jnp.int32), 0, TIME_BUCKETS - 1)
    bucket = jax.nn.one_hot(bucket, TIME_BUCKETS)  # (B, TIME_BUCKETS)
    new = {
        **scalars,
        "steps": 1.0,
        "error_r=t": jnp.sum(jnp.where(differ, 0, error)),
        "error_r<t": jnp.sum(jnp.where(differ, error, 0)),
        "rows_r=t": jnp.sum(~differ),
        "rows_r<t": jnp.sum(differ),
        "error_by_time": jnp.sum(bucket * error[:, None], axis=0),
        "rows_by_time": jnp.sum(bucket, axis=0),
    }
    added = sums | {name: sums[name] + value for name, value in new.items()}
    if skip_nonfinite:
        left_out = sums | {"skipped": sums["skipped"] + 1}
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), added, left_out)
    first = (sums["nonfinite_step"] < 0) & ~finite
    return added | {"nonfinite_step": jnp.where(first, step + 1, sums["nonfinite_step"])}


def check_finite(sums):
    """Raises FloatingPointError where a loss or gradient of the period was not finite."""
    if sums["nonfinite_step"] >= 0:
        bad = [name for name in SCALARS if not np.isfinite(sums[name])]
        raise FloatingPointError(
            f"step {sums['nonfinite_step']}: {', '.join(bad)} not finite; the last checkpoint is "
            "from before. Lower training.learning_rate, set training.grad_clip, or leave such "
            "steps out with training.skip_nonfinite"
        )


def means(sums):
    """Sums of a log period (numpy) -> means under the names that TensorBoard shows.

    `raw_loss` is the squared error summed over H, W, C, before the adaptive weight: the curve to
    watch, since the normalised `loss` is flat by construction at norm_p = 1.
    """
    steps = max(sums["steps"], 1)
    metrics = {name: sums[name] / steps for name in SCALARS}
    errors, rows = sums["error_by_time"], sums["rows_by_time"]
    metrics["raw_loss/all"] = errors.sum() / max(rows.sum(), 1)
    for kind in ("r=t", "r<t"):
        if sums[f"rows_{kind}"]:
            metrics[f"raw_loss/{kind}"] = sums[f"error_{kind}"] / sums[f"rows_{kind}"]
    for i in np.flatnonzero(rows):
        interval = f"t={i / TIME_BUCKETS:g}-{(i + 1) / TIME_BUCKETS:g}"
        metrics[f"raw_loss/{interval}"] = errors[i] / rows[i]
    if sums["skipped"]:
        metrics["skipped_steps"] = sums["skipped"]
    return {name: float(value) for name, value in metrics.items()}
