"""Weights of any origin: loading, choosing a set, placing on devices."""

from formats import published
from utils import checkpoint, sharding, trees


def load(path, shapes, optimizer=False):
    """The weights of a run or of a published checkpoint, as numpy trees of the model's `shapes`.

    Args:
      path: a run's workdir, or a published checkpoint (its file, or the folder that holds it).
      shapes: the tree of the model's parameters as `ShapeDtypeStruct`.
      optimizer: whether to read Adam's moments too.

    Returns:
      A dict of `step`, `params`, `ema_params` (a tuple, one tree for each decay), `ema_vals` (their
      decays, empty where the file does not say), `opt_state` ({"count", "mu", "nu"} of Adam where
      asked for and stored, else None), `config` (the options of the run, nested, or None) and
      `identity` (what the run was made from, see utils/checkpoint.py; {} where it does not say).

    Raises:
      FileNotFoundError, ValueError: nothing there, or weights of another model.
    """
    if checkpoint.steps(path):
        weights = {"opt_state": None} | checkpoint.restore_weights(path, optimizer=optimizer)
        weights["ema_vals"] = weights["config"].get("training", {}).get("ema_val", ())
    else:
        weights = published.load(path)
        weights["ema_params"], weights["ema_vals"] = (weights["ema_params"],), ()
        weights |= {"config": None, "identity": {}}
    for name, tree in (("params", weights["params"]), ("ema_params", weights["ema_params"][0])):
        where = f"{name} of {path}: not the weights of the configured model"
        trees.check_tree(shapes, tree, where)
    return weights


def choose(weights, name):
    """One set of weights by its name: `params`, `ema` (the first average) or `ema_DECAY`."""
    averages = weights["ema_params"]
    names = {"params": weights["params"], "ema": averages[0]}
    names |= {
        f"ema_{decay}": ema for decay, ema in zip(weights["ema_vals"], averages, strict=False)
    }
    if name not in names:
        raise ValueError(f"fid.weights: {name!r} is none of {', '.join(names)}")
    return names[name]


def place(weights, mesh):
    """The trees of `load` on the devices."""

    def on_devices(tree):
        return sharding.place(tree, sharding.by_parameter(mesh, tree))

    return weights | {name: on_devices(weights[name]) for name in ("params", "ema_params")}
