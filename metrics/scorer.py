"""Images -> features -> statistics, on all devices.

Features and their moments are computed where the images are; only moments come to the host
(features too, where a metric compares the sets themselves).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metrics import distances, evaluators
from utils import compiling, processes, sharding

MOMENTS = {"fid": "pool", "sfid": "spatial", "fd_dinov2": "dinov2"}  # metric -> its features


class Statistics(NamedTuple):
    """Accumulators of one set of images; what is not asked for is not there."""

    moments: dict[str, distances.Moments]  # by the name of the metric
    scores: distances.Scores | None


def compiler_options(mesh):
    """Returns the options of XLA for the feature networks.

    Their products are float32, where Triton's kernels are compiled by the dozen for each, one
    chosen, and nothing gained over cuBLAS: measured on an H200, 44 s instead of 3 to compile the
    FID network, and the same speed.
    """
    gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
    return {"xla_gpu_enable_triton_gemm": False} if gpu else compiling.quick(mesh)


class Scorer:
    """Gathers the statistics of sets of images. Compiles when first used.

    Args:
      features: from `metrics.features.load`.
      mesh: devices.
      options: the options `fid`, as `evaluators.fill` returns them.
      image_shape: (H, W, C) of the images.
    """

    def __init__(self, features, mesh, options, image_shape):
        self.features, self.mesh, self.options = features, mesh, options
        self.image_shape = image_shape
        self.batch_size = options.device_batch_size * mesh.size
        image = jax.ShapeDtypeStruct((1, *image_shape), features.dtype)
        outputs = jax.eval_shape(features.apply, features.params, image)
        self.dims = {name: x.shape[-1] for name, x in outputs.items()}
        self.keeps_features = bool(set(options.metrics) & set(evaluators.OF_SETS))
        self._add = jax.jit(
            self.add, out_shardings=sharding.replicated(mesh), donate_argnums=0, static_argnums=4,
            compiler_options=compiler_options(mesh),
        )  # fmt: skip

    @functools.cached_property
    def feature_params(self):
        """Returns the parameters of the feature network, on every device."""
        return sharding.place_everywhere(self.mesh, self.features.params)

    def init(self, count):
        """Returns the statistics that begin a set of `count` images. Pure."""
        metrics, scores = self.options.metrics, None
        if "inception_score" in metrics:
            splits = evaluators.splits(self.options.evaluator, count)
            scores = distances.init_scores(splits, self.dims["logits_no_bias"])
        moments = {
            name: distances.init_moments(self.dims[feature])
            for name, feature in MOMENTS.items()
            if name in metrics
        }
        return Statistics(moments, scores)

    def empty(self, count):
        """Places `init` on the devices."""
        return sharding.place_everywhere(self.mesh, self.init(count))

    def add(self, statistics, feature_params, images, index, count):
        """Adds images or values (N, H, W, C) number `index` (N,) of `count`. Pure, for `jit`.

        Those from `count` on are not counted.

        Returns:
          The statistics, and the pool features (N, D) where a metric compares the sets themselves.
        """
        outputs = self.features.apply(feature_params, images)
        weight = (index < count).astype(jnp.float32)
        moments = {
            name: distances.add_moments(sums, outputs[MOMENTS[name]], weight)
            for name, sums in statistics.moments.items()
        }
        scores = statistics.scores
        if scores is not None:
            split = evaluators.split_of(self.options.evaluator, index, count)
            scores = distances.add_scores(scores, outputs["logits_no_bias"], split, weight)
        return Statistics(moments, scores), outputs["pool"] if self.keeps_features else None

    def gather(self, step, count, name):
        """Returns the statistics of `count` images, and their pool features (count, D), or None.

        Args:
          step: function (statistics, number of the first image) -> as `add`; or a tree of arrays
            in the place of the features, which then comes back.
          name: of the progress bar.

        Raises:
          Preempted: the job is asked to stop; a measurement is begun anew later.
        """
        statistics, pools, last = self.empty(count), [], None
        starts, shown = range(0, count, self.batch_size), processes.is_writer()
        for start in processes.progress(starts, len(starts), "batches", name, shown):
            processes.check_stop()
            sharding.hold_back(self.mesh, statistics)
            statistics, pool = step(statistics, start)
            if last is not None:  # a batch late, so that the device does not wait for the host
                pools.append(jax.device_get(last))
            last = pool
        if last is not None:
            pools.append(jax.device_get(last))
        if not pools:
            return statistics, None
        return statistics, jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *pools)

    def read(self, read, count, name):
        """Does as `gather` for images on the host; `read(index)` gives those number (N,)."""
        rows = sharding.by_row(self.mesh)

        def step(statistics, start):
            index = start + np.arange(self.batch_size, dtype=np.int32)
            images = sharding.place((read(np.minimum(index, count - 1)), index), (rows, rows))
            return self._add(statistics, self.feature_params, *images, count)

        return self.gather(step, count, name)

    def describe(self):
        """Describes what the numbers depend on beside the images and the reference."""
        return self.features.described
