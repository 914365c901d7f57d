"""Weights in the Hugging Face layout: `model.safetensors` beside `config.json` and `README.md`.

One set of weights under the names of models/, "." for "/"; config.json has the options that make
the network and its objective, what the run was made from, and a checksum of the weights. Paths of
the machine that trained are left out, and nothing is ever unpickled.
"""

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from utils import files, trees
from utils.checksums import checksums

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
MODEL_TYPE, VERSION = "meanflow-jax", 1
ENTRIES = ("model_type", "version", "step", "weights", "checksum", "options", "identity")
# Options of a machine or of a job, which mean nothing elsewhere.
LEFT_OUT = (
    "dataset.root fid.cache_ref fid.inception_weights fid.dinov2_weights load_from init_from "
    "training.wandb eval_only sample_only"
).split()


def find(path):
    """Finds the folder of weights in this layout at `path` or around its file, or None."""
    path = files.path(path)
    folder = path.parent if path.name == WEIGHTS else path
    return folder if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file() else None


def read_config(folder):
    """Reads config.json of a folder from `find`.

    Raises:
      ValueError: it is of another model or version, or lacks an entry; OSError.
    """
    file = files.path(folder) / CONFIG
    with files.reading(file, "not a configuration in JSON"):
        config = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        kind = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{file}: model_type {kind!r} is not {MODEL_TYPE}")
    trees.raise_problems(str(file), missing=sorted(set(ENTRIES) - config.keys()))
    if config["version"] != VERSION:
        raise ValueError(f"{file}: of version {config['version']}; this reads version {VERSION}")
    return config


def load(folder):
    """Reads the weights of a folder from `find`.

    Returns:
      {"step", "weights": their name, "tree": float32 numpy arrays, "options": nested, "identity"}.

    Raises:
      ValueError: a file of another kind, arrays of another type or not those that were written.
    """
    config, file = read_config(folder), Path(folder) / WEIGHTS
    with files.reading(file, "damaged or not a safetensors file"):
        arrays = load_file(file)
    others = [f"{name} of {a.dtype}" for name, a in arrays.items() if a.dtype != np.float32]
    trees.raise_problems(str(file), misfits=sorted(others))
    tree = trees.unflatten({name.replace(".", "/"): array for name, array in arrays.items()})
    if config["checksum"] != checksum(tree):
        raise ValueError(f"{file} is not what {CONFIG} beside it was written for (checksum)")
    return {"tree": tree} | {k: config[k] for k in ("step", "weights", "options", "identity")}


def checksum(tree):
    """Computes that of a tree of arrays, as `weights_checksum` in results.json."""
    return f"{checksums({'params': tree}, {})['params']:08x}"


def export(folder, tree, *, step, weights, options, identity, card):
    """Writes a folder in this layout.

    Args:
      folder: it appears only when it is complete.
      tree: nested dict of float32 arrays.
      step, weights: which they are, as `fid.weights` names them.
      options: nested, of the run; paths of its machine are left out.
      identity: what the run was made from, see run/checkpoint.py.
      card: the text of README.md.

    Raises:
      FileExistsError: it is there already.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: remove it or choose another folder")
    tree_of_names = {k: np.ascontiguousarray(a) for k, a in trees.flatten(tree).items()}
    arrays = {name.replace("/", "."): array for name, array in tree_of_names.items()}
    config = {"model_type": MODEL_TYPE, "version": VERSION, "step": int(step), "weights": weights}
    config |= {"checksum": checksum(trees.unflatten(tree_of_names))}
    config |= {"options": portable(options), "identity": without_folders(identity)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with files.complete(folder) as unfinished:
        unfinished.mkdir()
        (unfinished / WEIGHTS).write_bytes(save(arrays, metadata={"format": "flax"}))
        files.write_text(unfinished / CONFIG, json.dumps(config, indent=1) + "\n")
        files.write_text(unfinished / CARD, card)
    return folder


def portable(options):
    """Leaves the options of one machine out of nested options."""
    others = {}
    for name, part in options.items():
        if isinstance(part, dict):
            others[name] = {
                key: value
                for key, value in part.items()
                if f"{name}.{key}" not in LEFT_OUT and not _is_folder(name, key, value)
            }
        elif name not in LEFT_OUT:
            others[name] = part
    return others


def _is_folder(section, key, value):
    return (section, key) == ("dataset", "vae") and not re.fullmatch(r"\w*", value)


def without_folders(identity):
    """Shortens the names of an identity that are paths to their last parts."""
    if isinstance(identity, dict):
        return {name: without_folders(part) for name, part in identity.items()}
    return identity.rpartition("/")[2] if isinstance(identity, str) else identity
