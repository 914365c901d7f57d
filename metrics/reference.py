"""The reference that generated images are compared with: its file, its checks, the comparison."""

import logging
import os

import numpy as np
import scipy  # whose parts are imported when they are first used

from metrics import (
    distances,
    edm2_reference,
    evaluators,
    kernels,
    neighbours,
    provenance,
    scorer,
)
from utils import files, identity, npy, processes

NEGATIVE = 1e-3  # eigenvalues as negative as that, relative to the largest entry, are rounding

# metric -> where its mean and covariance stand in a file (ADM's names; the last are our own)
MOMENTS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s"),
           "fd_dinov2": ("mu_dinov2", "sigma_dinov2")}  # fmt: skip
SUBSET_SEED = 2020  # of the rows that stand for the larger set, where MIND wants equal ones


class Reference:
    """Statistics of real images, from a file or from records, and the metrics against them.

    Args:
      options: the options `fid`, as `evaluators.fill` returns them.
      score: `metrics.scorer.Scorer`, for statistics that have to be computed.
      records: `utils.dataset.Records` of images, for which they are computed where
        `options.cache_ref` is empty; or None.

    Raises:
      ValueError, FileNotFoundError: no reference, or one of another evaluator.
    """

    def __init__(self, options, score, records=None):
        self.options, self.score, self.records = options, score, records
        self._statistics = self._pool = None
        if not evaluators.of_features(options.metrics):
            self._statistics, self._said = {}, {}
        elif options.cache_ref:
            self._statistics = load_reference(options.cache_ref)
            check_fits(options, self._statistics, score)
            size, said = score.image_shape[0], self._statistics["said"]
            self._said = provenance.describe(said, options.cache_ref, size)
        else:
            check_records(options, records, score.image_shape)

    def statistics(self):
        """Returns them as `load_reference` does; also sees to what `pool` returns.

        Raises:
          ValueError: fewer images than a metric needs.
        """
        if self._statistics is None:
            count = self.records.num_records
            gathered, self._pool = self.score.read(
                lambda index: self.records.read(index)[self.records.key], count, "reference"
            )
            self._statistics = {}
            for metric, sums in gathered.moments.items():
                moments = distances.finish_moments(sums)
                self._statistics |= dict(zip(MOMENTS[metric], moments, strict=True))
        if self._pool is None and self.score.keeps_features:
            self._pool = image_features(self.options.cache_ref, self.score)
        if "kid" in self.options.metrics:
            kernels.check_subsets(len(self._pool), "reference images")
        return self._statistics

    def pool(self):
        """Returns the pool features of the reference images, float32 (N, D)."""
        self.statistics()
        return self._pool

    def compare(self, gathered, pool, count):
        """Returns the metrics of `count` images: name -> float.

        Args:
          gathered, pool: from `Scorer.gather`.
        """
        reference, results = self.statistics(), {}
        for metric, sums in gathered.moments.items():
            mu, sigma = (reference[name] for name in MOMENTS[metric])
            moments = distances.finish_moments(sums)
            results[metric] = distances.frechet_distance(*moments, mu, sigma)
        if gathered.scores is not None:
            results |= named("inception_score", distances.finish_scores(gathered.scores))
        for metric in evaluators.OF_SETS:
            if metric in self.options.metrics:
                results |= named(metric, compare_sets(metric, pool, self.pool()))
        return {name: results[name] for name in evaluators.NUMBERS if name in results}

    def describe(self):
        """Describes the reference for the results; {} where no metric has one."""
        if not evaluators.of_features(self.options.metrics):
            return {}
        if self.options.cache_ref:
            names = [name for pair in MOMENTS.values() for name in pair]
            moments = {n: self._statistics[n] for n in names if self._statistics[n] is not None}
            told = {"reference": self.options.cache_ref, **self._said}
            told["reference_digest"] = identity.of_arrays(moments)
            if self.score.keeps_features:
                told["reference_arr_0"] = image_checksum(self.options.cache_ref)
            return told
        digests = {name: self.records.identity.get(name) for name in ("content", "sample")}
        return {
            "reference": str(self.records.root),
            "reference_number": self.records.num_records,
            **{f"reference_{name}": value for name, value in digests.items() if value},
        }


def named(metric, values):
    """Returns the numbers of a metric by their names."""
    return dict(zip(evaluators.METRICS[metric], values, strict=True))


def compare_sets(metric, generated, reference):
    """Returns the numbers of a metric of two sets of features, (N, D) and (M, D)."""
    if metric == "kid":
        return kernels.kid(generated, reference)
    if metric == "kid_all":
        return (kernels.kid_all(generated, reference),)
    if metric == "mind":
        count = min(len(generated), len(reference))
        return (kernels.mind(subset(generated, count), subset(reference, count)),)
    half = metric == "precision_recall_float16"
    return neighbours.precision_recall(reference, generated, half=half)


def subset(features, count):
    """Returns `count` rows of a set, random ones where it is larger, the same each time."""
    if len(features) == count:
        return features
    rows = np.random.RandomState(SUBSET_SEED).choice(len(features), count, replace=False)
    return features[np.sort(rows)]


def check_records(options, records, image_shape):
    """Raises ValueError where training records cannot serve as the reference."""
    if records is None or records.key == "moments":
        raise ValueError(
            "fid.cache_ref: no reference statistics, and no training images to compute them from; "
            "give the npz, or switch fid.on_training off"
        )
    if options.features != "inception" and image_shape != records.shape:
        raise ValueError(f"images are {image_shape}, those of {records.root} {records.shape}")


def check_fits(options, reference, score):
    """Raises ValueError where reference statistics belong to another evaluator."""
    where = f"fid.cache_ref: {options.cache_ref}"
    for metric in options.metrics:
        if metric in MOMENTS:
            mu, _ = MOMENTS[metric]
            if reference[mu] is None:
                raise ValueError(f"{where} holds no {' and '.join(MOMENTS[metric])} for {metric}")
            width, dim = len(reference[mu]), score.dims[scorer.MOMENTS[metric]]
            if width != dim:
                name = score.features.described["dinov2" if metric == "fd_dinov2" else "features"]
                raise ValueError(f"{where} describes {width} features, {name} has {dim}")
        if metric in evaluators.OF_SETS and reference["image_shape"] is None:
            raise ValueError(
                f"fid.metrics: {metric} needs reference images (the arr_0 of ADM's npz), and "
                f"{options.cache_ref} holds none; leave fid.cache_ref empty, and with eval_only "
                "let dataset.root name records of images (scripts.prepare_dataset images "
                "--vae=none)"
            )
    for name in ("resize", "dinov2_resize"):
        used = score.features.described.get(name)
        if used and reference[name] not in (None, used):
            raise ValueError(
                f"{where} was made with {reference[name]} resize, fid.{name} is {used} "
                f"(fid.evaluator: {options.evaluator})"
            )
    used = score.features.described.get("feature_weights_sha256")
    made_by = reference["said"].get("weights", used)
    if used and made_by != used:
        raise ValueError(
            f"{where} was made with feature weights {made_by[:12]}, and those here are "
            f"{used[:12]}: see fid.inception_weights"
        )
    if score.keeps_features and reference["image_shape"] != tuple(score.image_shape):
        raise ValueError(
            f"{where} holds images of {reference['image_shape']}, those generated are "
            f"{tuple(score.image_shape)}"
        )


def image_features(path, score):
    """Returns the pool features of the images `arr_0` in a reference file, float32 (N, D).

    They are kept beside the file, under the network and resize that made them and the checksum of
    the images: another file of the same name has other features.
    """
    path, described = files.local(path), score.features.described
    weights = str(described["feature_weights_sha256"])[:12]
    name = f"{path.stem}-features-{described['resize']}-{weights}-{image_checksum(path)}.npy"
    known = path.with_name(name)
    if processes.all_true(known.is_file()):
        return np.load(known, allow_pickle=False)
    images = npy.member(path, "arr_0")
    _, pool = score.read(images.__getitem__, len(images), "reference images")
    if processes.is_writer():
        try:
            with files.complete(known) as unfinished, open(unfinished, "wb") as file:
                np.save(file, pool)
        except OSError as error:
            logging.warning("features of the reference images could not be kept (%s)", error)
    return pool


def image_checksum(path):
    """Returns the CRC-32 (hex) of the images `arr_0` in an npz, which their zip file holds."""
    with npy.load_npz(path) as file:
        return f"{file.zip.getinfo('arr_0.npy').CRC:08x}"


# The file ---------------------------------------------------------------------------------------


def save_reference(path, mu=None, sigma=None, mu_s=None, sigma_s=None, **more):
    """Writes statistics as ADM names them: `mu, sigma` (pool), `mu_s, sigma_s` (spatial).

    Beside them `resize`, which came before the network; comparing two would mislead; `mu_dinov2`,
    `sigma_dinov2`, `dinov2_resize`, and what metrics/provenance.py names.
    """
    arrays = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s} | more
    with files.complete(path) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, **{name: value for name, value in arrays.items() if value is not None})


def load_reference(path):
    """Reads reference statistics: a dict of `mu` (D,), `sigma` (D, D) of pool features, float64.

    Beside them `mu_s, sigma_s` (sFID), `mu_dinov2, sigma_dinov2`, `resize`, `dinov2_resize` (str)
    and `image_shape` (H, W, C) of the images `arr_0`; each None where the file does not say. And
    `said`: what it says of its images, from `provenance.of_file`.

    Known are npz files with ADM's names (with images, they belong to `tf1`), with `ref_mu,
    ref_sigma` of the published MeanFlow code (`half_pixel`), with our own, and EDM2's pickles
    (`tf1`). Raises FileNotFoundError, or ValueError with one line: neither, names missing, wrong
    shapes, not finite, not symmetric.
    """
    if files.is_remote(path):
        path = files.local(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file of reference statistics")
    with open(path, "rb") as file:
        pickled = file.read(1) == b"\x80"
    content = _from_edm2(path) if pickled else _from_npz(path)
    names = [name for pair in MOMENTS.values() for name in pair]
    result = dict.fromkeys((*names, "resize", "dinov2_resize", "image_shape")) | content
    result["resize"] = result["said"].get("resize")
    for mu, sigma in MOMENTS.values():
        if result[mu] is not None:
            for name in (mu, sigma):
                if result[name].dtype.kind not in "fiu":
                    kind = result[name].dtype
                    raise ValueError(f"{path}: {name} holds {kind}, not real numbers")
                result[name] = np.asarray(result[name], np.float64)
            _check_moments(path, mu, sigma, result[mu], result[sigma])
    return result


def _from_edm2(path):
    moments, _ = edm2_reference.load(path)
    content = {"dinov2_resize": "edm2", "said": {"origin": "EDM2", "resize": "tf1"}}
    for metric, values in moments.items():
        content |= dict(zip(MOMENTS[metric], values, strict=True))
    return content


def _from_npz(path):
    with files.reading(path, "not a readable npz of reference statistics"):
        with npy.load_npz(path) as file:
            return _read_npz(file, path)


def _read_npz(file, path):
    provenance.check_sizes(file, [prefix + name for pair in MOMENTS.values() for name in pair
                                  for prefix in ("", "ref_")])  # fmt: skip
    content = {"said": provenance.of_file(file)}
    for mu, sigma in MOMENTS.values():
        for prefix in ("", "ref_"):
            if mu not in content and {prefix + mu, prefix + sigma} <= set(file.files):
                content |= {mu: file[prefix + mu], sigma: file[prefix + sigma]}
    if len(content) == 1:
        listed = ", ".join(sorted(file.files)[:8]) or "nothing"
        raise ValueError(f"they need mu and sigma (or ref_mu and ref_sigma), the file has {listed}")
    if "arr_0" in file.files:
        shape, dtype = npy.header_of_member(path, "arr_0")  # without reading its gigabytes
        if len(shape) != 4 or dtype != np.uint8:
            raise ValueError(f"arr_0 is {dtype} {shape}, not uint8 (N, H, W, 3)")
        content["image_shape"] = shape[1:]
    if "dinov2_resize" in file.files:
        content["dinov2_resize"] = str(file["dinov2_resize"])
    return content


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
    allowed = NEGATIVE * np.abs(sigma).max()
    # Whether Cholesky's factor is there tells the same in a tenth of the time.
    if scipy.linalg.lapack.dpotrf(sigma + allowed * np.eye(len(mu)), lower=1)[1] == 0:
        return
    smallest = scipy.linalg.eigvalsh(sigma, subset_by_index=[0, 0])[0]
    if smallest < -allowed:
        raise ValueError(
            f"{path}: {sigma_name} is no covariance: its smallest eigenvalue is {smallest:.3g}"
        )
