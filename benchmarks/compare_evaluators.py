"""Holds the evaluator against torch-fidelity, pytorch-fid and clean-fid, on random weights.

    python -m benchmarks.compare_evaluators [--images 200] [--size 64] [--python PATH]

Both sides get the same made-up Inception weights and the same crops of two photographs (those of
scikit-learn). The packages are installed into an environment of their own in a temporary folder,
unless `--python` names one that has them. Prints a table; exit status 0: all within 1e-4 relative,
1: not, 2: it could not be measured.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from sklearn import datasets

from metrics import distances, features, inception_weights, kernels, neighbours

PACKAGES = ("torch-fidelity==0.4.0", "pytorch-fid==0.3.0", "clean-fid==0.1.35", "scipy<1.18")
TOLERANCE = 1e-4
BATCH = 20


def torch_state(seed):
    """Made-up weights of the FID network, by torch-fidelity's names: OIHW, float32."""
    rng = np.random.RandomState(seed)
    state = {}
    for layer, shape in inception_weights.CONV_SHAPES.items():
        height, width, inputs, outputs = shape
        scale = np.sqrt(2 / (height * width * inputs))
        state[f"{layer}.conv.weight"] = scale * rng.randn(outputs, inputs, height, width)
        state[f"{layer}.bn.weight"] = rng.uniform(0.8, 1.2, outputs)
        state[f"{layer}.bn.bias"] = 0.1 * rng.randn(outputs)
        state[f"{layer}.bn.running_mean"] = 0.1 * rng.randn(outputs)
        state[f"{layer}.bn.running_var"] = rng.uniform(0.8, 1.2, outputs)
    inputs, outputs = inception_weights.FC_SHAPE
    state["fc.weight"], state["fc.bias"] = 0.05 * rng.randn(outputs, inputs), rng.randn(outputs)
    return {name: value.astype(np.float32) for name, value in state.items()}


def crops(photograph, count, size, seed):
    """Random square cut-outs, uint8 (count, size, size, 3)."""
    rng = np.random.RandomState(seed)
    tops = rng.randint(0, photograph.shape[0] - size, count)
    lefts = rng.randint(0, photograph.shape[1] - size, count)
    places = zip(tops, lefts, strict=True)
    return np.stack([photograph[t : t + size, x : x + size] for t, x in places])


def photographs():
    """Two natural images of the same kind: the halves of one photograph, and of another."""
    china, flower = datasets.load_sample_images().images
    middle = china.shape[1] // 2
    return china[:, :middle], np.concatenate([china[:, middle:], flower[:, :middle]], axis=1)


def own_features(state, images):
    """Our features of images by the network of `state`: {"pool": (N, 2048), ...}."""
    params = inception_weights.from_torch(state)
    network = features.of_inception(params, "tf1", None)
    apply, found = jax.jit(network.apply), []
    for start in range(0, len(images), BATCH):
        batch = np.resize(images[start : start + BATCH], (BATCH, *images.shape[1:]))
        found.append(jax.device_get(apply(network.params, batch)))
    return {key: np.concatenate([f[key] for f in found])[: len(images)] for key in found[0]}


def own_metrics(generated, reference, subset_size):
    """Our numbers from our features."""
    results = {}
    for name, key in (("fid", "pool"), ("sfid", "spatial")):
        moments = []
        for found in (generated, reference):
            values = found[key].astype(np.float64)
            moments += [values.mean(0), np.cov(values, rowvar=False)]
        results[name] = distances.frechet_distance(*moments)
    results["inception_score"] = distances.inception_score(generated["logits_no_bias"])[0]
    pools = generated["pool"], reference["pool"]
    results["kid"] = kernels.kid(*pools, subset_size=subset_size)[0]
    results["kid_all"] = kernels.kid_all(*pools)
    shares = neighbours.precision_recall(reference["pool"], generated["pool"])
    return results | dict(zip(("precision", "recall"), shares, strict=True))


def make_environment(folder):
    """An environment with the packages; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = Path(folder) / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python


def compare(args, folder):
    """Measures both sides: (our features and the others', our numbers, the others', versions)."""
    state = torch_state(0)
    sets = {
        name: crops(photograph, args.images, args.size, seed)
        for seed, (name, photograph) in enumerate(
            zip(("generated", "reference"), photographs(), strict=True)
        )
    }
    subset_size = args.images // 2
    weights = {f"weights/{name}": value for name, value in state.items()}
    np.savez(folder / "inputs.npz", **weights, **sets, subset_size=subset_size)
    python = args.python or make_environment(folder / "environment")
    worker = Path(__file__).with_name("foreign_evaluators.py")
    subprocess.run([python, worker, folder], check=True)
    found = {name: own_features(state, images) for name, images in sets.items()}
    with np.load(folder / "foreign.npz") as file:
        theirs = {name: file[name] for name in file.files}
    errors = {}
    for key, ours in (("pool", "pool"), ("logits", "logits_no_bias"), ("spatial", "spatial")):
        pairs = [(found[name][ours], theirs[f"{name}/{key}"]) for name in sets]
        largest = max(float(np.abs(a - b).max()) for a, b in pairs)
        errors[key] = largest, float(np.std(pairs[0][1]))
    foreign = json.loads((folder / "foreign.json").read_text())
    return errors, own_metrics(*found.values(), subset_size), foreign


def report(errors, ours, foreign):
    """Prints the table; returns whether everything agrees."""
    versions = foreign["versions"] | {"jax": importlib.metadata.version("jax")}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for key, (error, deviation) in errors.items():
        print(f"features {key:8} largest difference {error:.1e}, their deviation {deviation:.2g}")
    worst = 0.0
    for package, results in foreign["results"].items():
        for name, value in results.items():
            relative = abs(ours[name] - value) / abs(value)
            worst = max(worst, relative)
            print(f"{package:15} {name:16} {ours[name]:14.8f} {value:14.8f} {relative:9.1e}")
    return worst <= TOLERANCE


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare_evaluators",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=200, help="in each of the two sets")
    parser.add_argument("--size", type=int, default=64, help="pixels of their sides")
    parser.add_argument("--python", type=Path, help="of an environment that has the packages")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return 0 if report(*compare(args, Path(folder))) else 1
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"compare_evaluators: {error}", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
