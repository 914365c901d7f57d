"""The FID statistics of a set of images: mean and covariance of their Inception features."""

import functools
import itertools

import jax
import numpy as np

from formats import weight_files
from metrics import (
    distances,
    inception,
    inception_weights,
    provenance,
    reference,
)
from scripts.prepare import shards
from utils import environment, files, identity, processes, sharding

DIMENSIONS = {"pool": 2048, "spatial": 2023}


def path_of(args):
    """Returns the file of the statistics."""
    return files.path(args.fid_stats or f"{args.output}/imagenet_{args.image_size}_fid_stats.npz")


def asked(args, split, items):
    """Returns what the statistics are to be of, as `metrics.provenance` names it."""
    how = ["EXIF orientation"] if getattr(args, "exif_orientation", False) else []
    behind = getattr(args, "background", "keep")
    how += [] if behind == "keep" else [f"background {behind}"]
    return {
        "split": split,
        "size": args.image_size,
        "resize": args.fid_resize,
        "files": shards.digest([name for name, _ in items] + how),
    }


def check(args, split, items):
    """Raises ValueError where there are other statistics under that name, before any work."""
    path = path_of(args)
    if not path.exists() or args.overwrite:
        return
    said = provenance.of_path(files.local(path))
    if others := provenance.differences(said, asked(args, split, items)):
        raise ValueError(
            f"{path} holds other statistics ({'; '.join(others)}): name another file with "
            "--fid_stats, or start over with --overwrite"
        )
    if "files" not in said:
        print(f"{path} does not say of which images it is; --overwrite makes it anew", flush=True)


def write(args, split, items, decode):
    """Writes the reference for FID and sFID of the images `items` [(path, label)] of a split.

    Each process saves the moments of its share, and the one that finds all of them joins them, so
    that the result does not depend on the number of processes, up to rounding.
    """
    environment.pin()
    path = path_of(args)
    if path.exists() and not args.overwrite:
        return print(f"{path} is there already; nothing to do", flush=True)
    files.make_folder(path.parent)
    said = asked(args, split, items)
    count = args.num_processes
    stem = f"unfinished-{path.stem}-{said['files'][:12]}-{args.image_size}-{args.fid_resize}"
    parts = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.npz") for i in range(count)]
    if args.overwrite or not parts[args.process_id].exists():
        start, stop = (len(items) * i // count for i in (args.process_id, args.process_id + 1))
        sums = moments(args, decode(items[start:stop]), stop - start)
        with files.complete(parts[args.process_id]) as unfinished, open(unfinished, "wb") as file:
            np.savez(file, **sums)
    if not all(part.exists() for part in parts):
        return print("statistics: the rest is left to other processes", flush=True)
    shares = [np.load(files.local(part)) for part in parts]
    if len({str(part["weights"]) for part in shares}) > 1:
        raise ValueError(f"{path}: the processes had different --inception_weights; start over")
    images = identity.Sum()
    for part in shares:
        images.join(identity.Sum(str(part["images"])))
    number = sum(int(part["count"]) for part in shares)
    said |= {"number": number, "images": str(images), "weights": str(shares[0]["weights"])}
    reference.save_reference(path, **join(shares), **said)
    for part in parts:
        files.remove(part)
    print(f"statistics of {number} {split} images -> {path}", flush=True)


def moments(args, stream, total):
    """Sums (image or None, label) up to {count, mu, sigma, mu_s, sigma_s}, on local devices.

    Beside them `images`, the sum of the digests of the pixels, and `weights`, that of the network.
    """
    mesh = sharding.make_mesh(1, jax.local_devices())
    weights = inception_weights.load(args.inception_weights)
    params = jax.device_put(weights, sharding.replicated(mesh))
    seen = identity.Sum()
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
                seen.add(image.tobytes())
        acc = step(params, acc, *jax.device_put((batch, weight), sharding.by_row(mesh)))
    mu, sigma = distances.finish_moments(acc["pool"])
    mu_s, sigma_s = distances.finish_moments(acc["spatial"])
    count = int(acc["pool"].count)
    sums = {"count": count, "mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}
    return sums | {"images": str(seen), "weights": weight_files.digest(weights)}


def join(parts):
    """Joins the moments of disjoint sets (Chan et al. 1979), float64."""
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
