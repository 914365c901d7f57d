"""Rules of a configuration beyond the types: ranges, choices, options that go together.

Nothing here needs jax, a device or the data. What a network, an objective, a codec or a metric
alone can know of its options, it checks itself when it is built (`parts.check`).
"""

import re

DATA_PLACEHOLDER = "YOUR_DATA_ROOT"  # of the published YAML files
REFERENCE_PLACEHOLDER = "YOUR_FID_CACHE_REF"

CHOICES = {
    "training.lr_schedule": ("const", "cosine"),
    "sampling.format": ("png", "npz"),
    "sampling.vae_dtype": ("float32", "bfloat16"),
    "init_weights": ("ema", "params"),
}

POSITIVE = (
    "dataset.image_size dataset.image_channels dataset.prefetch_factor "
    "model.model_channels model.channel_mult_emb model.channel_mult_noise model.num_blocks "
    "training.batch_size training.learning_rate training.grad_accum_steps training.log_per_step "
    "training.checkpoint_per_epoch training.ema_snapshot_per_epoch training.ema_period "
    "sampling.num_images fid.device_batch_size"
).split()

NOT_NEGATIVE = (
    "dataset.num_workers model.depth model.hidden_size model.num_heads model.patch_size "
    "model.aux_head_depth model.unroll model.augment_dim training.seed training.num_epochs "
    "training.num_steps training.warmup_steps training.warmup_epochs training.warmup_init "
    "training.weight_decay training.grad_clip training.sample_per_epoch training.fid_per_epoch "
    "training.sample_per_step training.checkpoint_per_step training.fid_per_step sampling.seed "
    "sampling.channels mesh.fsdp"
).split()

LARGEST_INT, LARGEST_SEED, LARGEST_FLOAT = 2**31 - 1, 2**32 - 1, 3e38
LARGEST_STEPS = 10**6  # of a sampler
LONGEST = 300  # characters of a line

FROM_0_TO_1 = "dataset.augment_prob model.dropout training.adam_b1 training.adam_b2".split()


def validate(config):
    """Raises ValueError with one line about the first option whose value cannot be meant."""
    for path, choices in CHOICES.items():
        value = _get(config, path)
        _require(value in choices, path, f"is one of {' | '.join(choices)}, not {value!r}")
    for path in POSITIVE:
        _require(_get(config, path) > 0, path, f"must be above 0, got {_get(config, path)}")
    for path in NOT_NEGATIVE:
        value = _get(config, path)
        _require(value is None or value >= 0, path, f"must not be negative, got {value}")
    for path in FROM_0_TO_1:
        value = _get(config, path)
        _require(0 <= value <= 1, path, f"must lie in 0..1, got {value}")
    _validate_sizes(config)
    _require(
        config.dataset.num_classes >= -1,
        "dataset.num_classes",
        f"must not be negative, got {config.dataset.num_classes} (-1: as the records say)",
    )
    _require(
        not config.dataset.augment_prob or config.dataset.vae == "none",
        "dataset.augment_prob",
        "is for pixels (dataset.vae: none); latents cannot be scaled and shifted",
    )
    _validate_training(config.training)
    _validate_sampling(config.sampling, config.dataset.num_classes)
    _validate_evaluation(config)


def _validate_sizes(config):
    """Numbers have to fit into the 32 bits that devices count and compute in."""
    for section, values in config.items():
        options = values.items() if hasattr(values, "items") else [(None, values)]
        for key, value in options:
            path = section if key is None else f"{section}.{key}"
            limit = LARGEST_SEED if key == "seed" else LARGEST_INT
            for x in value if isinstance(value, tuple) else (value,):
                if isinstance(x, int):
                    _require(abs(x) <= limit, path, f"is at most {limit}, got {x}")
                elif isinstance(x, float):
                    _require(abs(x) <= LARGEST_FLOAT, path, f"is too large: {x}")


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
        not (training.warmup_steps and training.warmup_epochs),
        "training.warmup_epochs",
        "and training.warmup_steps: give one of them",
    )
    decays = training.ema_val
    _require(
        decays and len(set(decays)) == len(decays) and all(0 <= decay <= 1 for decay in decays),
        "training.ema_val",
        f"needs one or more different decays in 0..1, got {list(decays)}",
    )
    for path in ("training.adam_b1", "training.adam_b2"):
        _require(_get({"training": training}, path) < 1, path, "must be below 1")
    _require(
        all(1 <= steps <= LARGEST_STEPS for steps in training.sample_steps),
        "training.sample_steps",
        f"are numbers from 1 to {LARGEST_STEPS}, got {list(training.sample_steps)}",
    )
    profile = training.profile_steps
    _require(
        not profile or (len(profile) == 2 and 2 <= profile[0] <= profile[1]),
        "training.profile_steps",
        f"is (first, last) with 1 < first <= last, or empty, got {list(profile)}",
    )


def _validate_sampling(sampling, num_classes):
    _require(
        sampling.num_steps and all(1 <= steps <= LARGEST_STEPS for steps in sampling.num_steps),
        "sampling.num_steps",
        f"needs one or more numbers of at least 1, at most {LARGEST_STEPS}, got "
        f"{list(sampling.num_steps)}",
    )
    for path in ("t_min", "t_max"):
        _require(sampling[path], f"sampling.{path}", "needs one or more times")
    _require(
        num_classes < 0 or all(0 <= label <= num_classes for label in sampling.labels),
        "sampling.labels",
        f"must lie in 0..{num_classes - 1} ({num_classes}: without a class)",
    )


def _validate_evaluation(config):
    fid = config.fid
    _require(fid.num_samples >= 2, "fid.num_samples", "a covariance needs at least 2 samples")
    averages = [f"ema_{decay}" for decay in config.training.ema_val]
    averages += [f"ema_sigma{sigma:g}" for sigma in config.training.ema_sigma]
    weights = ["ema", "params", *averages]
    trains = not (config.eval_only or config.sample_only)
    for name in fid.weights:
        found = re.fullmatch(r"ema_sigma(0?\.\d+)", name)
        # Of a run that has tracked two profiles, an evaluation reconstructs any other.
        if found and (config.eval_only or float(found[1]) in config.training.ema_sigma):
            weights.append(name)
    _require(
        fid.weights and (not trains or all(name in weights for name in fid.weights)),
        "fid.weights",
        f"are of {' | '.join(weights)}, got {list(fid.weights)}",
    )
    _require(
        not (config.eval_only and config.sample_only), "eval_only", "and sample_only: choose one"
    )
    _require(not (config.load_from and config.init_from), "load_from", "and init_from: choose one")
    if trains:
        _require(
            DATA_PLACEHOLDER not in config.dataset.root,
            "dataset.root",
            "is still the placeholder: name the record folder, or set DATA_ROOT",
        )
    if config.eval_only or (trains and fid.on_training):
        _require(
            fid.cache_ref != REFERENCE_PLACEHOLDER,
            "fid.cache_ref",
            "is still the placeholder: name the npz of reference statistics, or leave it empty to "
            "compare with the training images",
        )


def _get(config, path):
    for key in path.split("."):
        config = config[key]
    return config


def _require(condition, path, message):
    if not condition:
        line = f"{path} {message}"
        raise ValueError(line if len(line) <= LONGEST else f"{line[:LONGEST]}...")
