"""The golden data of the published implementation, in our layout; used by the parity tests."""

import json
from typing import NamedTuple

import jax
import make
import numpy as np

from formats import published
from methods import meanflow, objective, path
from models import dit
from utils import trees


class Published(NamedTuple):
    """The contents of meanflow.json and meanflow.npz, and the network that they describe."""

    info: dict
    arrays: dict[str, np.ndarray]
    net: dit.DiT
    params: dict

    def tree(self, prefix):
        """The parameters below `prefix` (`NAME/net/...`) as our tree."""
        flat = {k[len(prefix) :]: v for k, v in self.arrays.items() if k.startswith(prefix)}
        return published.from_published(trees.unflatten(flat), prefix)

    def batch(self, prefix):
        """A batch of the objective, its rows in the order of `path.split_rows`.

        Returns x, labels, `Draws`, the number of rows with r = t, and the permutation.
        """
        a = {k[len(prefix) :]: v for k, v in self.arrays.items() if k.startswith(prefix)}
        equal = a["t"] == a["r"]
        order = path.merge_rows(np.flatnonzero(~equal), np.flatnonzero(equal))
        order = np.asarray(order)
        x, y, t, r, noise, drop = (
            a[name][order] for name in ("x", "labels", "t", "r", "noise", "drop")
        )
        return x, y, objective.Draws(t, r, noise, drop), int(equal.sum()), order

    def method(self, options, num_equal, batch_size):
        """The `MeanFlow` that a case of the json describes."""
        fields = meanflow.MeanFlow.__dataclass_fields__
        options = {k: v for k, v in options.items() if k in fields}
        share = min((num_equal + 0.5) / batch_size, 1.0)
        return make.method(num_classes=self.net.num_classes, **options | {"data_proportion": share})


def load(golden):
    """Reads the golden folder."""
    info = json.loads((golden / "meanflow.json").read_text())
    with np.load(golden / "meanflow.npz") as file:
        arrays = dict(file)
    sizes = {k: info["model"][k] for k in ("depth", "hidden_size", "num_heads", "patch_size")}
    net = dit.DiT(**sizes, num_classes=info["model"]["num_classes"])
    found = Published(info, arrays, net, None)
    return found._replace(params=found.tree("params/"))


def flat(tree):
    """Our tree -> {published name: numpy array}."""
    return trees.flatten(published.to_published(jax.device_get(tree), "tree"))


def distance(a, b):
    """|a - b| / |b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
