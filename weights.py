"""Weights of any origin: loading, choosing a set, beginning with them, placing on devices."""

import numpy as np

from formats import published, sit, start
from models import dit
from utils import checkpoint, sharding, trees


def _run(path, optimizer):
    found = {"opt_state": None} | checkpoint.restore_weights(path, optimizer=optimizer)
    return found | {"ema_vals": found.pop("config").get("training", {}).get("ema_val", ())}


def _meanflow(path, optimizer):
    found = published.load(path)
    return found | {"ema_params": (found["ema_params"],), "ema_vals": ()}


# (recognises(path), read(path, optimizer) -> as `load`); the first that recognises a path reads it,
# and the last one says what there might have been.
READERS = (
    (checkpoint.steps, _run),
    (lambda path: True, _meanflow),
)


def read(path, optimizer=False):
    """`load` without a model: the weights are whatever the path holds."""
    return next(reader(path, optimizer) for recognises, reader in READERS if recognises(path))


def load(path, shapes, optimizer=False):
    """The weights of a run or of a published checkpoint, as numpy trees of the model's `shapes`.

    Args:
      path: a run's workdir, or a published checkpoint (its file, or the folder that holds it).
      shapes: the tree of the model's parameters as `ShapeDtypeStruct`.
      optimizer: whether to read Adam's moments too.

    Returns:
      A dict of `step`, `params`, `ema_params` (a tuple, one tree for each decay), `ema_vals` (their
      decays, empty where the file does not say) and `opt_state` ({"count", "mu", "nu"} of Adam
      where asked for and stored, else None).

    Raises:
      FileNotFoundError, ValueError: nothing there, or weights of another model.
    """
    weights = read(path, optimizer)
    for name, tree in (("params", weights["params"]), ("ema_params", weights["ema_params"][0])):
        where = f"{name} of {path}: not the weights of the configured model"
        trees.check_tree(shapes, tree, where)
    return weights


def begin(config, module, fresh):
    """Parameters to begin a run with, from the weights of another one.

    Args:
      config: the whole config, of which `init_from`, `init_weights` and `init_format` count.
      module: `models.network.Network`.
      fresh: its fresh parameters, a nested dict of numpy arrays.

    Returns:
      The parameters, and a line that says what was taken, what is new and what was left over.

    Raises:
      FileNotFoundError, ValueError: nothing there, or weights that do not fit, each by name.
    """
    path, name, kind = config.init_from, config.init_weights, config.init_format
    if sit.recognises(path):
        found = sit.load(path, name, kind)
        _check_positions(found.positions, path)
    elif kind:
        raise ValueError(f"init_format: {path} is no .pt file: leave it empty")
    else:
        chosen = choose(read(path), name, "init_weights")
        found = start.Start({k: np.asarray(v) for k, v in trees.flatten(chosen).items()})
    return start.merge(fresh, found, module.label_table, f"init_from {path}")


def _check_positions(positions, path):
    """Raises ValueError where the positions of a file are not those that the network computes."""
    _, tokens, width = np.shape(positions)
    ours = dit.position_embedding(width, round(tokens**0.5))
    if ours.shape != positions.shape[1:] or not np.allclose(ours, positions[0], atol=1e-4):
        raise ValueError(f"{path}: pos_embed is not the fixed embedding of sines and cosines")


def choose(weights, name, option="fid.weights"):
    """One set of weights by its name: `params`, `ema` (the first average) or `ema_DECAY`.

    Raises:
      ValueError: there is no such set; `option` asked for it.
    """
    averages = weights["ema_params"]
    names = {"params": weights["params"], "ema": averages[0]}
    names |= {
        f"ema_{decay}": ema for decay, ema in zip(weights["ema_vals"], averages, strict=False)
    }
    if name not in names:
        raise ValueError(f"{option}: {name!r} is none of {', '.join(names)}")
    return names[name]


def place(weights, mesh):
    """The trees of `load` on the devices."""

    def on_devices(tree):
        return sharding.place(tree, sharding.by_parameter(mesh, tree))

    return weights | {name: on_devices(weights[name]) for name in ("params", "ema_params")}
