"""The reference that generated images are compared with: its file, its checks, the comparison.

Builds on metrics/distances.py, metrics/provenance.py, metrics/scorer.py,
utils/files.py and utils/identity.py.
"""

import os

import numpy as np
import scipy.linalg

from metrics import distances, provenance
from metrics.scorer import SPATIAL
from utils import files, identity

NEGATIVE = 1e-3  # eigenvalues as negative as that, relative to the largest entry, are rounding


class Reference:
    """Statistics of real images, from a file or from records, and the metrics against them.

    Args:
      options: the options `fid`.
      scorer: `metrics.scorer.Scorer`, for statistics that have to be computed.
      records: `utils.dataset.Records` of images, for which they are computed where
        `options.cache_ref` is empty; or None.

    Raises:
      ValueError, FileNotFoundError: no reference, or one of another evaluator.
    """

    def __init__(self, options, scorer, records=None):
        self.options, self.scorer, self.records = options, scorer, records
        self._statistics = None
        if options.cache_ref:
            self._statistics = load_reference(options.cache_ref)
            check_fits(options, scorer.features, self._statistics, scorer.dim)
            size = scorer.image_shape[0]
            self._said = provenance.describe(self._statistics["said"], options.cache_ref, size)
        else:
            check_records(options, records, scorer.image_shape)

    def statistics(self):
        """As `load_reference` returns them, with `pool` features where precision asks for them."""
        if self._statistics is None:
            count = self.records.num_records
            found, kept = self.scorer.read(
                lambda index: self.records.read(index)["image"], count, "reference"
            )
            mu, sigma = distances.finish_moments(found.pool)
            self._statistics = {"mu": mu, "sigma": sigma}
            if found.spatial is not None:
                spatial = distances.finish_moments(found.spatial)
                self._statistics |= dict(zip(("mu_s", "sigma_s"), spatial, strict=True))
            if "precision_recall" in self.options.metrics:
                self._statistics["pool"] = np.concatenate(kept)[:count]
        return self._statistics

    def compare(self, found, kept, count):
        """Metrics of `count` images from their statistics and kept features: name -> float."""
        reference, metrics, results = self.statistics(), self.options.metrics, {}
        if "fid" in metrics:
            moments = distances.finish_moments(found.pool)
            results["fid"] = distances.frechet_distance(
                *moments, reference["mu"], reference["sigma"]
            )
        if "sfid" in metrics:
            moments = distances.finish_moments(found.spatial)
            results["sfid"] = distances.frechet_distance(
                *moments, reference["mu_s"], reference["sigma_s"]
            )
        if "inception_score" in metrics:
            scores = distances.finish_scores(found.scores)
            results |= dict(zip(("inception_score", "inception_score_std"), scores, strict=True))
        if "precision_recall" in metrics:
            shares = distances.precision_recall(reference["pool"], np.concatenate(kept)[:count])
            results |= dict(zip(("precision", "recall"), shares, strict=True))
        return results

    def describe(self):
        """Which reference it is, for the results."""
        if self.options.cache_ref:
            moments = {name: self._statistics[name] for name in ("mu", "sigma")}
            digest = identity.of_arrays(moments)
            return {"reference": self.options.cache_ref, "reference_digest": digest, **self._said}
        digests = {name: self.records.identity.get(name) for name in ("content", "sample")}
        return {
            "reference": str(self.records.root),
            "reference_number": self.records.num_records,
            **{f"reference_{name}": value for name, value in digests.items() if value},
        }


def check_records(options, records, image_shape):
    """Raises ValueError where training records cannot serve as the reference."""
    if records is None or records.key != "image":
        raise ValueError(
            "fid.cache_ref: no reference statistics, and no training images to compute them from; "
            "give the npz, or switch fid.on_training off"
        )
    if options.features == "pixels" and image_shape != records.shape:
        raise ValueError(f"images are {image_shape}, those of {records.root} {records.shape}")


def check_fits(options, features, reference, dim):
    """Raises ValueError where reference statistics belong to another evaluator."""
    where = f"fid.cache_ref: {options.cache_ref}"
    if len(reference["mu"]) != dim:
        raise ValueError(
            f"{where} describes {len(reference['mu'])} features, {features.name} has {dim}"
        )
    if reference["resize"] not in (None, features.resize):
        raise ValueError(
            f"{where} was made with {reference['resize']} resize, fid.resize is {features.resize}"
        )
    made_by = reference["said"].get("weights", features.weights_sha256)
    if made_by != features.weights_sha256:
        raise ValueError(
            f"{where} was made with feature weights {made_by[:12]}, and "
            f"{features.name} has {str(features.weights_sha256)[:12]}: see fid.inception_weights"
        )
    if "sfid" in options.metrics:
        if reference["mu_s"] is None:
            raise ValueError(f"{where} holds no spatial statistics (mu_s, sigma_s) for sfid")
        if len(reference["mu_s"]) != SPATIAL:
            found = len(reference["mu_s"])
            raise ValueError(f"{where} holds {found} spatial features, not {SPATIAL}")
    if "precision_recall" in options.metrics:
        raise ValueError(
            "fid.metrics: precision_recall needs the features of the reference images; "
            "leave fid.cache_ref empty, and with eval_only let dataset.root name records of images "
            "(scripts.prepare_dataset images --vae=none)"
        )


# The file ---------------------------------------------------------------------------------------


def save_reference(path, mu, sigma, mu_s=None, sigma_s=None, resize=None, said=None):
    """Write statistics as ADM names them: `mu, sigma` (pool), `mu_s, sigma_s` (spatial).

    `resize` says which resize came before the network; comparing two would mislead. `said` is
    that and more, by the names of metrics/provenance.py.
    """
    arrays = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s, "resize": resize}
    arrays |= said or {}
    with files.complete(path) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, **{name: value for name, value in arrays.items() if value is not None})


def load_reference(path):
    """Reference statistics from an npz: a dict with `mu` (D,), `sigma` (D, D), float64.

    Beside them `mu_s, sigma_s` for sFID and `resize` (str), each None where the file has none, and
    `said`: what the file says of its images, from `provenance.of_file`.
    The names `ref_mu, ref_sigma` of the published MeanFlow code are known too. Raises
    FileNotFoundError, or ValueError with one line: not an npz, names missing, wrong shapes, not
    finite, not symmetric.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file of reference statistics")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = _names_in(file, path)
            provenance.check_sizes(file, names)
            found, said = {name: file[name] for name in names}, provenance.of_file(file)
    except _ReferenceError:
        raise
    except Exception as error:  # zipfile, zlib, struct and numpy all raise their own
        raise ValueError(f"{path}: not a readable npz of reference statistics ({error})") from error
    result = {"mu": None, "sigma": None, "mu_s": None, "sigma_s": None}
    result |= {"resize": said.get("resize"), "said": said}
    for name, value in found.items():
        if value.dtype.kind not in "fiu":
            raise ValueError(f"{path}: {name} holds {value.dtype}, not real numbers")
        result[name.removeprefix("ref_")] = np.asarray(value, np.float64)
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if result[mu] is not None:
            _check_moments(path, mu, sigma, result[mu], result[sigma])
    return result


def said_of(path):
    """What a file of statistics says of its images, without checking the statistics themselves.

    Raises:
      ValueError: it is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return provenance.of_file(file)
    except Exception as error:
        raise ValueError(f"{path}: not a readable npz of reference statistics ({error})") from error


class _ReferenceError(ValueError):
    """A message that is already complete."""


def _names_in(file, path):
    names = []
    for prefix in ("", "ref_"):
        if f"{prefix}mu" in file.files and f"{prefix}sigma" in file.files:
            names += [f"{prefix}mu", f"{prefix}sigma"]
            break
    else:
        listed = ", ".join(sorted(file.files)[:8]) or "nothing"
        raise _ReferenceError(
            f"{path}: reference statistics need mu and sigma (or ref_mu and ref_sigma), "
            f"the file has {listed}"
        )
    if "mu_s" in file.files and "sigma_s" in file.files:
        names += ["mu_s", "sigma_s"]
    return names


def _check_moments(path, mu_name, sigma_name, mu, sigma):
    if mu.ndim != 1 or sigma.shape != mu.shape * 2:
        raise ValueError(
            f"{path}: {mu_name} {mu.shape} and {sigma_name} {sigma.shape} "
            "should have the shapes (D,) and (D, D)"
        )
    for name, value in ((mu_name, mu), (sigma_name, sigma)):
        if not np.isfinite(value).all():
            raise ValueError(f"{path}: {name} has values that are not finite")
    if np.abs(sigma - sigma.T).max() > 1e-4 * np.abs(sigma).max():
        raise ValueError(f"{path}: {sigma_name} is not symmetric")
    smallest = scipy.linalg.eigvalsh(sigma, subset_by_index=[0, 0])[0]
    if smallest < -NEGATIVE * np.abs(sigma).max():
        raise ValueError(
            f"{path}: {sigma_name} is no covariance: its smallest eigenvalue is {smallest:.3g}"
        )
