"""The FID statistics of a set of images: mean and covariance of their Inception features."""

import functools
import itertools
from pathlib import Path

import jax
import numpy as np

from metrics import distances, inception, inception_weights, reference
from scripts.prepare import shards
from utils import files, processes, sharding

DIMENSIONS = {"pool": 2048, "spatial": 2023}


def write(args, items, decode):
    """Writes the reference for FID and sFID of the images `items` [(path, label)].

    Each process saves the moments of its share, and the one that finds all of them joins them, so
    that the result does not depend on the number of processes, up to rounding.
    """
    path = Path(args.fid_stats or f"{args.output}/imagenet_{args.image_size}_fid_stats.npz")
    if path.exists() and not args.overwrite:
        return print(f"{path} is there already; nothing to do", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    count, names = args.num_processes, shards.digest([name for name, _ in items])[:12]
    stem = f"unfinished-{path.stem}-{names}-{args.fid_resize}"
    parts = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.npz") for i in range(count)]
    if args.overwrite or not parts[args.process_id].exists():
        start, stop = (len(items) * i // count for i in (args.process_id, args.process_id + 1))
        sums = moments(args, decode(items[start:stop]), stop - start)
        with files.complete(parts[args.process_id]) as unfinished, open(unfinished, "wb") as file:
            np.savez(file, **sums)
    if not all(part.exists() for part in parts):
        return print("statistics: the rest is left to other processes", flush=True)
    joined = join([np.load(part) for part in parts])
    reference.save_reference(path, **joined, resize=args.fid_resize)
    for part in parts:
        part.unlink(missing_ok=True)
    print(f"statistics of {len(items)} images -> {path}", flush=True)


def moments(args, stream, total):
    """(image or None, label) -> {count, mu, sigma, mu_s, sigma_s}, on all local devices."""
    mesh = sharding.make_mesh(1, jax.local_devices())
    params = jax.device_put(
        inception_weights.load(args.inception_weights), sharding.replicated(mesh)
    )
    batch_size = args.device_batch_size * mesh.size

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, acc, batch, weight):
        features = inception.features(params, batch, resize=args.fid_resize)
        return {key: distances.add_moments(acc[key], features[key], weight) for key in acc}

    acc = {key: distances.init_moments(dim) for key, dim in DIMENSIONS.items()}
    acc = jax.device_put(acc, sharding.replicated(mesh))
    stream = iter(processes.progress(stream, total, "images"))
    while rows := list(itertools.islice(stream, batch_size)):
        batch = np.zeros((batch_size, args.image_size, args.image_size, 3), np.uint8)
        weight = np.zeros(batch_size, np.float32)
        for i, (image, _) in enumerate(rows):
            if image is not None:
                batch[i], weight[i] = image, 1
        acc = step(params, acc, *jax.device_put((batch, weight), sharding.by_row(mesh)))
    mu, sigma = distances.finish_moments(acc["pool"])
    mu_s, sigma_s = distances.finish_moments(acc["spatial"])
    count = int(acc["pool"].count)
    return {"count": count, "mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}


def join(parts):
    """Moments of the union of disjoint sets, from those of each (Chan et al. 1979), float64."""
    total = sum(int(part["count"]) for part in parts)
    joined = {}
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        joined[mu] = sum(part["count"] * part[mu] for part in parts) / total
        scatter = 0
        for part in parts:
            offset = part[mu] - joined[mu]
            scatter += (part["count"] - 1) * part[sigma] + part["count"] * np.outer(offset, offset)
        joined[sigma] = scatter / (total - 1)
    return joined
