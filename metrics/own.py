"""Metrics of one's own: functions that `fid.metrics` names (docs/evaluation.md)."""

import importlib

import numpy as np


def load(name):
    """Loads the function that `fid.metrics` names as `module:function`.

    Raises:
      ValueError: there is none; in a line.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"fid.metrics: {name}: no such function of a module: {error}") from error
    if not callable(found):
        raise ValueError(f"fid.metrics: {name} is no function but {type(found).__name__}")
    return found


def rises(name):
    """Says whether more of a function's number is better: its attribute `higher_is_better`."""
    module, _, function = name.partition(":")
    return bool(getattr(load(f"{module}:{function.split('.')[0]}"), "higher_is_better", False))


def numbers(name, samples, conditions, truth):
    """Computes the numbers of a function of one's own: {`module:function` or `...:function.key`}.

    Args:
      name: of `fid.metrics`.
      samples: uint8 (N, H, W, C), or values, float32.
      conditions: {name: (N, ...)} as the records have them; `label`, int32 (N,), among them.
      truth: like samples; None where they are drawn by labels alone.
    """
    found = load(name)(samples, conditions, truth)
    found = {f"{name}.{key}": x for key, x in found.items()} if isinstance(found, dict) else {
        name: found
    }  # fmt: skip
    for key, value in found.items():
        try:
            good = not np.ndim(value) and np.isfinite(float(value))
        except (TypeError, ValueError):  # text, None
            good = False
        if not good:
            told = np.shape(value) or repr(value)
            raise ValueError(f"fid.metrics: {key} is no finite number: {told}")
    return {key: float(value) for key, value in found.items()}
