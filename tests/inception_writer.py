"""Writes weights of the FID network, named as by torch-fidelity, in the formats that people have.

The names of each format are spelled out here once more, so that they are tested against something.
"""

import importlib.util
import pickle

import numpy as np
from torch_writer import write_legacy, write_zip


def random_weights(folder):
    """The module that makes random weights and images, out of the golden folder."""
    spec = importlib.util.spec_from_file_location("random_weights", folder / "random_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BN = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def nest(flat):
    tree = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def write_pth(path, weights):
    write_zip(path, weights)


def write_pth_with_counters(path, weights):
    counters = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros((), np.int64)}
    write_legacy(path, weights | counters)


def jax_fid_tree(weights):
    flat = {"fc.kernel": weights["fc.weight"].T, "fc.bias": weights["fc.bias"]}
    for name, value in weights.items():
        layer, kind, leaf = name.rsplit(".", 2) if not name.startswith("fc.") else ("", "", "")
        if kind == "conv":
            flat[f"{layer}.conv.kernel"] = value.transpose(2, 3, 1, 0)
        elif kind == "bn":
            flat[f"{layer}.bn.{BN[leaf]}"] = value
    return nest(flat)


def write_jax_fid(path, weights):
    path.write_bytes(pickle.dumps(jax_fid_tree(weights), 4))


FORMATS = {
    "weights.pth": write_pth,
    "legacy.pth": write_pth_with_counters,
    "inception_v3_weights_fid.pickle": write_jax_fid,
}
