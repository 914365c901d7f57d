"""The evaluators of the field as presets, and the rules of the options `fid`.

A number belongs to the evaluator that made it: resize, rounding of the images, labels, reference
and metrics together. `fid.evaluator` chooses all of them; an option that is given overrides its
own, and the results then say so.
"""

from typing import NamedTuple

from metrics import own

# What `fid.metrics` may ask for -> the names of its numbers in the results.
METRICS = {
    "fid": ("fid",),
    "sfid": ("sfid",),
    "inception_score": ("inception_score", "inception_score_std"),
    "precision_recall": ("precision", "recall"),
    "precision_recall_float16": ("precision_float16", "recall_float16"),
    "kid": ("kid", "kid_std"),
    "kid_all": ("kid_all",),
    "mind": ("mind",),
    "fd_dinov2": ("fd_dinov2",),
    "psnr": ("psnr",),
    "ssim": ("ssim",),
    "lpips": ("lpips",),
}
NUMBERS = tuple(name for names in METRICS.values() for name in names)
HIGHER_IS_BETTER = (
    "inception_score",
    *METRICS["precision_recall"],
    *METRICS["precision_recall_float16"],
    "psnr",
    "ssim",
)
OF_PAIRS = ("psnr", "ssim", "lpips")  # of samples beside their truth: metrics/pairs.py
OF_SETS = ("precision_recall", "precision_recall_float16", "kid", "kid_all", "mind")
LABELS = ("random", "balanced", "data")
ROUNDINGS = ("nearest", "down")
FEATURES = ("inception", "pixels", "values")


class Preset(NamedTuple):
    """An evaluator; the fields but the last stand for the options of these names."""

    resize: str
    metrics: tuple[str, ...]
    labels: str
    rounding: str
    split_size: int  # consecutive samples of a split of the Inception score; 0: ten splits


PRESETS = {
    "meanflow": Preset("half_pixel", ("fid",), "random", "nearest", 0),
    "adm": Preset(
        "tf1", ("fid", "sfid", "inception_score", "precision_recall"), "random", "down", 5000
    ),
    "edm2": Preset("tf1", ("fid", "fd_dinov2"), "random", "nearest", 0),
}


def fill(fid, latents=True):
    """Returns the options `fid` with those of the evaluator where they are empty, a copy.

    Args:
      latents: whether images are decoded: EDM2 rounds these down, and pixels to the nearest.

    Raises:
      ValueError: in a line, an option that names nothing there is, or does not fit the others.
    """
    from metrics import dinov2, inception  # late: they bring jax, which the names do not need

    check_choice("evaluator", fid.evaluator, PRESETS)
    fid = fid.copy_and_resolve_references()
    for name, value in _options(fid.evaluator, latents).items():
        fid[name] = fid[name] or value
    choices = {"labels": LABELS, "rounding": ROUNDINGS, "resize": inception.RESIZES,
               "dinov2_resize": dinov2.RESIZES, "features": FEATURES}  # fmt: skip
    for name, known in choices.items():
        check_choice(name, fid[name], known)
    if not {name for name in fid.metrics if not is_own(name)} <= METRICS.keys():
        known = f"{' | '.join(METRICS)} | module:function"
        raise ValueError(f"fid.metrics are of {known}, got {list(fid.metrics)}")
    if fid.features != "inception" and not set(of_features(fid.metrics)) <= {"fid"}:
        raise ValueError(f"fid.metrics: fid.features: {fid.features} has no other metric than fid")
    return fid


def is_own(name):
    """Says whether a metric, or one of its numbers, is a function of one's own."""
    return ":" in name


def of_features(metrics):
    """Returns those metrics that compare features of two sets, or statistics of them."""
    return [name for name in metrics if name not in OF_PAIRS and not is_own(name)]


def gives(metric, number):
    """Says whether a metric of `fid.metrics` gives the number of this name."""
    ours = is_own(metric) and (number == metric or number.startswith(f"{metric}."))
    return ours or number in METRICS.get(metric, ())


def rises(number):
    """Says whether more of a number is better."""
    return own.rises(number) if is_own(number) else number in HIGHER_IS_BETTER


def check_choice(name, value, known):
    """Raises ValueError where an option `fid` is none of those known."""
    if value not in known:
        raise ValueError(f"fid.{name} is one of {' | '.join(known)}, not {value!r}")


def _options(evaluator, latents):
    options = PRESETS[evaluator]._asdict()
    del options["split_size"]
    if evaluator == "edm2" and latents:
        options["rounding"] = "down"
    return options


def describe(fid, latents=True):
    """Names an evaluator for the results, with what was overridden; `fid` as `fill` returns it.

    Which metrics are taken changes none of them, so it is not said.
    """
    preset = _options(fid.evaluator, latents) | {"features": "inception", "dinov2_resize": "edm2"}
    changed = [
        f"{name} {fid[name]}" for name in preset if name != "metrics" and fid[name] != preset[name]
    ]
    return f"{fid.evaluator}, but {', '.join(changed)}" if changed else fid.evaluator


def splits(evaluator, count):
    """Returns in how many splits the Inception score of `count` samples is taken."""
    size = PRESETS[evaluator].split_size
    return -(-count // size) if size else 10


def split_of(evaluator, index, count):
    """Returns the split of samples number `index` (N,); those behind `count` are in the last."""
    size = PRESETS[evaluator].split_size
    index = index.clip(0, count - 1)
    # Ten parts [k n // 10, (k + 1) n // 10), as torch-fidelity cuts them.
    return index // size if size else ((index + 1) * 10 - 1) // count


def tag(name, count):
    """Names a metric in the log: `fid`, or `fid@5k` where fewer than 10,000 samples bias it."""
    if count >= 10_000:
        return name
    return f"{name}@{count / 1000:g}k" if count >= 1000 else f"{name}@{count}"
