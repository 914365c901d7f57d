"""Rules that join options: what goes together, and what a job needs.

What one option may be stands with it in default.py. Nothing here needs jax, a device or the data;
what a network, an objective, a codec or a metric alone can know of its options, it checks itself
when it is built (`parts.check`).
"""

import re
from operator import attrgetter

from configs.default import OPTIONS

DATA_PLACEHOLDER = "YOUR_DATA_ROOT"  # of the published YAML files
REFERENCE_PLACEHOLDER = "YOUR_FID_CACHE_REF"

LONGEST = 300  # characters of a line


def validate(config):
    """Raises ValueError with one line about the first option whose value cannot be meant."""
    for path, option in OPTIONS.items():
        fault = option.fault(attrgetter(path)(config))
        _require(fault is None, path, fault)
    data, fid = config.dataset, config.fid
    trains = not (config.eval_only or config.sample_only)
    _require(
        not data.augment_prob or (data.vae == "none" and not data.float_values),
        "dataset.augment_prob",
        "is for pixels (dataset.vae: none); latents cannot be scaled and shifted",
    )
    _require(
        not (data.augment_prob and data.conditions),
        "dataset.augment_prob",
        "goes without dataset.conditions: those would have to be scaled and shifted too",
    )
    _validate_values(data)
    _validate_training(config.training)
    _require(
        data.num_classes < 0 or all(0 <= y <= data.num_classes for y in config.sampling.labels),
        "sampling.labels",
        f"must lie in 0..{data.num_classes - 1} ({data.num_classes}: without a class)",
    )
    _validate_weights(fid.weights, config.training, trains, config.eval_only)
    _require(
        not (config.eval_only and config.sample_only), "eval_only", "and sample_only: choose one"
    )
    _require(not (config.load_from and config.init_from), "load_from", "and init_from: choose one")
    _require(
        not trains or DATA_PLACEHOLDER not in data.root,
        "dataset.root",
        "is still the placeholder: name the record folder, or set DATA_ROOT",
    )
    _require(
        not (config.eval_only or (trains and fid.on_training))
        or fid.cache_ref != REFERENCE_PLACEHOLDER,
        "fid.cache_ref",
        "is still the placeholder: name the npz of reference statistics, or leave it empty to "
        "compare with the training images",
    )


def _validate_values(data):
    _require(
        not data.float_values or data.vae == "none",
        "dataset.float_values",
        "needs dataset.vae: none",
    )
    ends = data.value_range
    _require(
        not ends or (data.float_values and len(ends) == 2 and ends[0] < ends[1]),
        "dataset.value_range",
        f"is (low, high) of dataset.float_values, or empty, got {list(ends)}",
    )


def _validate_training(training):
    steps = training.num_epochs + training.num_steps
    _require(steps > 0, "training.num_epochs", "and training.num_steps are both 0: nothing to do")
    _require(
        training.batch_size % training.grad_accum_steps == 0,
        "training.batch_size",
        f"({training.batch_size}) must be a multiple of training.grad_accum_steps "
        f"({training.grad_accum_steps})",
    )
    _require(
        training.ema_val or training.ema_half_life,
        "training.ema_val",
        "needs one or more different decays in 0..1, got []",
    )
    _require(
        not (training.warmup_steps and training.warmup_epochs),
        "training.warmup_epochs",
        "and training.warmup_steps: give one of them",
    )


def _validate_weights(names, training, trains, evaluates):
    known = ["ema", "params", *(f"ema_{decay}" for decay in training.ema_val)]
    known += [f"ema_half{half:g}" for half in training.ema_half_life]
    known += [f"ema_sigma{sigma:g}" for sigma in training.ema_sigma]
    for name in names:
        profile = re.fullmatch(r"ema_sigma(0?\.\d+)", name)
        # Of a run that has tracked two profiles, an evaluation reconstructs any other.
        if profile and (evaluates or float(profile[1]) in training.ema_sigma):
            known.append(name)
    _require(
        names and (not trains or all(name in known for name in names)),
        "fid.weights",
        f"are of {' | '.join(known)}, got {list(names)}",
    )


def _require(condition, path, message):
    if not condition:
        line = f"{path} {message}"
        raise ValueError(line if len(line) <= LONGEST else f"{line[:LONGEST]}...")
