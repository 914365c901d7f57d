"""Moments of an optimizer: taken out of what a checkpoint holds, and put into a fresh state.

Adam has `mu` and `nu` of every array. Muon has `mu` alone of matrices; all else is Adam's. Together
both are {"count": int32 (), "mu": tree, "nu": tree, None where Muon has the array}.
"""

import jax
import optax


def find(tree):
    """Finds the moments in a state of dicts and lists, as orbax reads it; None: it has none."""
    parts = list(_parts(tree))
    if not any("nu" in part for part in parts):
        return None
    adam = next(part for part in parts if "nu" in part)
    mu = adam["mu"]
    for part in parts:
        if part is not adam:
            mu = jax.tree.map(_either, mu, part["mu"], is_leaf=_absent)
    return {"count": adam["count"], "mu": mu, "nu": adam["nu"]}


def _parts(tree):
    """Yields the dicts with a first moment."""
    if isinstance(tree, dict) and {"count", "mu"} <= tree.keys():
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _parts(part)


def _absent(leaf):
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def _either(a, b):
    return b if _absent(a) else a


def of_adam(moments):
    """Returns the moments where each array has both; else None."""
    has_muon = any(map(_absent, jax.tree.leaves(moments["nu"], is_leaf=_absent)))
    return None if has_muon else moments


def put(opt_state, moments):
    """Puts moments from `find` into the fresh state of an optimizer of optax, and its counts.

    Returns:
      The state; None where the moments are those of another optimizer, by array.
    """
    for name in ("nu", "mu"):
        for path, old in optax.tree.get_all_with_path(opt_state, name):
            new, structure = moments[name], jax.tree.structure(old, is_leaf=_absent)
            if structure != jax.tree.structure(new, is_leaf=_absent):
                return None
            fits = jax.tree.map(lambda a, b: _absent(a) == _absent(b), old, new, is_leaf=_absent)
            if name == "nu" and not all(jax.tree.leaves(fits)):
                return None
            new = jax.tree.map(lambda a, b: a if _absent(a) else b, old, new, is_leaf=_absent)
            here = {name: new}
            opt_state = optax.tree.set(opt_state, lambda at, _, path=path: at == path, **here)
    return optax.tree.set(opt_state, count=moments["count"])
