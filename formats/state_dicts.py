"""State dicts of PyTorch as people keep them: inside of a training run's entries, under long names.

A script saves {"model": ..., "ema": ..., "opt": ...}, or one of them. What wraps a network
(DistributedDataParallel, torch.compile, FSDP, checkpointed blocks, an average of torch.optim) adds
a part to each name.
"""

import numpy as np

from utils import trees

AVERAGES = "ema ema_model model_ema ema_state_dict ema_params params_ema".split()
NETWORKS = "model state_dict model_state_dict net network params weights module".split()
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
NO_WEIGHTS = ("n_averaged", "_metadata")  # of an average; of a state dict that was copied


def find(content, path, average=True):
    """Finds the weights of a network in what a torch file holds.

    Args:
      content: from `torch_files.load`.
      path: of the file, for the error lines.
      average: whether an average is wanted, which the network itself stands in for where the file
        has none; else the network.

    Returns:
      {name: array} without the parts of `WRAPPERS`, and the entry where they lay; "": at the top.

    Raises:
      ValueError: no weights there, two under one name, or whole numbers in the place of weights.
    """
    entries = []
    while name := _entry(content, ": ".join([str(path), *entries]), average):
        content = content[name]
        entries.append(name)
    where = ": ".join([str(path), *entries])
    arrays = {}
    for name, array in content.items():
        if name in NO_WEIGHTS:
            continue
        short = ".".join(part for part in str(name).split(".") if part not in WRAPPERS)
        if short in arrays:
            raise ValueError(f"{where}: {short} is there twice, as {name} too")
        arrays[short] = array
    wrong = [f"{name} of {a.dtype}" for name, a in arrays.items() if _holds_no_weights(a)]
    trees.raise_problems(f"{where}: whole numbers in the place of weights", misfits=sorted(wrong))
    return arrays, ": ".join(entries)


def _entry(content, where, average):
    """Names the entry that holds the weights; None where `content` is a state dict."""
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{where}: holds {_kind(content)}, not weights by name")
    inner = [str(name) for name, value in content.items() if isinstance(value, dict) and value]
    for name in AVERAGES + NETWORKS if average else NETWORKS:
        if name in inner:
            return name
    if any(isinstance(value, np.ndarray) for value in content.values()):
        return None
    wanted = "an average or a network" if average else "a network"
    raise ValueError(
        f"{where}: holds {trees.listed(map(str, content))}, and nothing of the names by which "
        f"{wanted} is known ({', '.join(NETWORKS[:3])}, ...)"
    )


def _kind(content):
    return "nothing" if isinstance(content, dict) else f"a {type(content).__name__}"


def _holds_no_weights(array):
    return isinstance(array, np.ndarray) and array.ndim > 0 and array.dtype.kind in "biuc"
