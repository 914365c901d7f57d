"""Metrics of samples beside their truth (docs/evaluation.md).

PSNR and SSIM are those of scikit-image, the mean over all pairs.
"""

import importlib
from functools import partial

import jax
import numpy as np

from metrics import evaluators, own

BYTES = 255.0  # the range of images in bytes; of values that of the truth
MOST = 100.0  # dB; what a sample that is its truth counts
SSIM = {"win_size": 7, "K1": 0.01, "K2": 0.03, "gaussian_weights": False,
        "use_sample_covariance": True}  # fmt: skip
AT_ONCE = 50  # pairs that go through the network of LPIPS


def psnr(samples, truth):
    """Computes the peak signal-to-noise ratio in dB, at most MOST for each pair."""
    error = np.mean((samples.astype(np.float64) - truth) ** 2, axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return np.mean(np.minimum(10 * np.log10(reach(truth) ** 2 / error), MOST))


def ssim(samples, truth):
    """Computes the structural similarity; of signals (h = 1) along their length."""
    structural_similarity = with_scikit_image().structural_similarity
    one = partial(structural_similarity, data_range=reach(truth), channel_axis=-1, **SSIM)
    pairs = zip(*(a[:, 0] if a.shape[1] == 1 else a for a in (samples, truth)), strict=True)
    return np.mean([one(ours, theirs) for ours, theirs in pairs])


def with_scikit_image():
    """Imports skimage.metrics; ValueError in a line where it is not installed."""
    try:
        return importlib.import_module("skimage.metrics")
    except ImportError as error:
        raise ValueError("fid.metrics: ssim needs pip install scikit-image") from error


def perceptual(samples, truth, network):
    """Computes LPIPS by VGG16, `models.frozen.Frozen`, where its weights are at hand."""
    params, distance = network.load(), jax.jit(network.apply)
    images = [np.broadcast_to(a, (*a.shape[:-1], 3)) / np.float32(127.5) - 1
              for a in (samples, truth)]  # fmt: skip
    starts = range(0, len(samples), AT_ONCE)
    parts = [distance(params, *(a[i : i + AT_ONCE] for a in images)) for i in starts]
    return np.concatenate(parts).mean()


def reach(truth):
    """Returns the range of the truth: of bytes BYTES."""
    return BYTES if truth.dtype == np.uint8 else float(truth.max() - truth.min())


def check(metrics, shape, values, has_truth, network):
    """Raises ValueError where metrics of pairs do not fit samples of `shape` (H, W, C)."""
    asked = [metric for metric in metrics if metric in evaluators.OF_PAIRS]
    if asked and not has_truth:
        raise ValueError(f"fid.metrics: {asked[0]} compares pairs, and samples drawn by labels "
                         "alone have no truth: see dataset.conditions")  # fmt: skip
    sides = [side for side in shape[:2] if side > 1]
    if "ssim" in asked:
        with_scikit_image()
        if min(sides, default=0) < SSIM["win_size"]:
            raise ValueError(f"fid.metrics: ssim needs {SSIM['win_size']} pixels, not {shape}")
    if "lpips" in asked:
        if values or min(shape[:2]) < 16 or shape[2] not in (1, 3):
            raise ValueError(f"fid.metrics: lpips is of images of 16 pixels or more, not {shape}")
        network.load()
    for name in metrics:
        if ":" in name:
            own.load(name)


def measure(metrics, samples, conditions, truth, network):
    """Returns the numbers of those of `metrics` that are of pairs, or one's own: name -> float.

    Args:
      samples, conditions, truth: see `own.numbers`.
      network: of LPIPS, see `perceptual`.
    """
    known = {"psnr": psnr, "ssim": ssim, "lpips": partial(perceptual, network=network)}
    found = {name: float(known[name](samples, truth)) for name in metrics if name in known}
    for name in metrics:
        if ":" in name:
            found |= own.numbers(name, samples, conditions, truth)
    return found
