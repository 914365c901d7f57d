"""The packages that benchmarks/compare_evaluators.py compares with, in their environment.

    python foreign_evaluators.py FOLDER

Reads FOLDER/inputs.npz (`weights/NAME` by torch-fidelity's names, `generated`, `reference` uint8
(N, H, W, 3), `subset_size`) and writes FOLDER/foreign.npz and foreign.json. Imports nothing of this
project, whose environment has no torch.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import torch

K, SUBSETS = 3, 100


def declare_operators():
    """Lets a torchvision whose compiled part is for another torch be imported."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [module for module in sys.modules if module.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        declare_operators.kept = library


def features(folder, inputs):
    """torch-fidelity's features of both sets: {"generated/pool": (N, 2048), ...}, float32."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    names = [name for name in inputs.files if name.startswith("weights/")]
    state = {name.removeprefix("weights/"): torch.from_numpy(inputs[name]) for name in names}
    torch.save(state, folder / "weights.pth")
    layers = ["2048", "logits_unbiased"]
    net = FeatureExtractorInceptionV3("compared", layers, str(folder / "weights.pth")).eval()
    spatial = []
    net.Mixed_6d.branch1x1.register_forward_hook(lambda *args: spatial.append(args[2]))
    found = {}
    for name in ("generated", "reference"):
        images, outputs = torch.from_numpy(inputs[name]).permute(0, 3, 1, 2), []
        spatial.clear()
        with torch.no_grad():
            for batch in images.split(16):
                outputs.append(net(batch))
        for key, values in zip(("pool", "logits"), zip(*outputs, strict=True), strict=True):
            found[f"{name}/{key}"] = torch.cat(values).numpy()
        maps = torch.cat(spatial)[:, :7].permute(0, 2, 3, 1)  # NHWC, as ADM flattens them
        found[f"{name}/spatial"] = maps.reshape(len(maps), -1).numpy()
    return found


def by_torch_fidelity(found, subset_size):
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    pools = [torch.from_numpy(found[f"{name}/pool"]) for name in ("generated", "reference")]
    exact = [pool.double() for pool in pools]
    score = metric_isc.isc_features_to_metric(
        torch.from_numpy(found["generated/logits"]), splits=10, shuffle=False
    )
    kid = metric_kid.kid_features_to_metric(
        *exact, kid_subsets=SUBSETS, kid_subset_size=subset_size, verbose=False
    )
    shares = metric_prc.prc_features_to_metric(*pools, prc_neighborhood=K, verbose=False)
    results = {
        "inception_score": score["inception_score_mean"],
        "kid": kid["kernel_inception_distance_mean"],
        "precision": float(shares["precision"]),
        "recall": float(shares["recall"]),
    }
    for name, key in (("fid", "pool"), ("sfid", "spatial")):
        statistics = [
            metric_fid.fid_features_to_statistics(torch.from_numpy(found[f"{n}/{key}"]).double())
            for n in ("generated", "reference")
        ]
        results[name] = float(
            next(iter(metric_fid.fid_statistics_to_metric(*statistics, verbose=False).values()))
        )
    return results


def frechet(function, found):
    """FID and sFID of torch-fidelity's features by another package's distance."""
    results = {}
    for name, key in (("fid", "pool"), ("sfid", "spatial")):
        moments = []
        for which in ("generated", "reference"):
            values = found[f"{which}/{key}"].astype(np.float64)
            moments += [values.mean(0), np.cov(values, rowvar=False)]
        results[name] = float(function(*moments))
    return results


def main(folder):
    folder = Path(folder)
    declare_operators()
    from cleanfid import fid as cleanfid
    from pytorch_fid import fid_score

    inputs = np.load(folder / "inputs.npz")
    found, size = features(folder, inputs), int(inputs["subset_size"])
    np.savez(folder / "foreign.npz", **found)
    np.random.seed(0)  # clean-fid draws from numpy's own generator
    pools = [found[f"{name}/pool"].astype(np.float64) for name in ("generated", "reference")]
    whole = cleanfid.kernel_distance(*pools, num_subsets=1, max_subset_size=len(pools[0]))
    results = {
        "torch-fidelity": by_torch_fidelity(found, size),
        "pytorch-fid": frechet(fid_score.calculate_frechet_distance, found),
        "clean-fid": frechet(cleanfid.frechet_distance, found) | {"kid_all": float(whole)},
    }
    packages = ("torch", "torch-fidelity", "pytorch-fid", "clean-fid", "numpy", "scipy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    text = json.dumps({"results": results, "versions": versions})
    (folder / "foreign.json").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
