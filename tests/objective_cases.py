"""Cases of objectives in golden data of the form of family.npz, and what they are held to."""

import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from formats import published
from methods import path
from models import dit, network


class Cases:
    """NAME.npz and NAME.json of MEANFLOW_GOLDEN, or of tests/golden where that has none."""

    def __init__(self, name):
        own = pathlib.Path(__file__).parent / "golden"
        folder = pathlib.Path(os.environ.get("MEANFLOW_GOLDEN") or own)
        folder = folder if (folder / f"{name}.json").is_file() else own
        self.info = json.loads((folder / f"{name}.json").read_text())
        self.file = folder / f"{name}.npz"
        model = self.info["model"]
        self.classes = model["num_classes"]
        sizes = ("depth", "hidden_size", "num_heads", "patch_size")
        self.net = dit.DiT(**{n: model[n] for n in sizes}, num_classes=self.classes)

    def arrays(self):
        with np.load(self.file) as file:
            return dict(file)

    def predict(self, params, z, t, h, y):
        """u of the network, compiled."""
        return _predict(self.net, params, (z, {"t": t, "h": h, "y": y}))

    def check(self, arrays, params, name, build):
        """Holds loss, errors, weights, targets and gradients of a case against the goldens.

        Args:
          arrays: of the file.
          params: the parameters as our tree.
          name: of the case.
          build: (the case of the json, number of rows with r = t, arrays of the case by name, the
            permutation into our order) -> the objective and its draws.
        """
        case, prefix = self.info["cases"][name], f"objective/{name}/"
        a = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        a |= {key: arrays[f"batch/{key}"] for key in ("x", "noise", "labels")}
        equal = a["flow"] if "flow" in a else a["t"] == a["r"]
        num_equal = int(equal.sum())
        order = np.asarray(path.merge_rows(np.flatnonzero(~equal), np.flatnonzero(equal)))
        method, draws = build(case, num_equal, a, order)
        assert method.equal_count(len(order)) == num_equal
        x, y = a["x"][order], a["labels"][order]
        if case.get("unconditional"):
            y = np.full_like(y, self.info["null_label"])
        held = {"ema_params": tree(arrays, "ema_params/")}

        @jax.jit
        def step(params, draws, held):
            def loss(params):
                net = shifted(network.function(self.net), num_equal)
                return method.loss(net, params, x, {"y": y}, draws, held)

            return jax.value_and_grad(loss, has_aux=True)(params | {"shift": jnp.zeros_like(x)})

        (loss, rows), grads = jax.device_get(step(params, draws, held))
        z = path.z_t(x, draws.noise, draws.t)
        labels = np.where(draws.drop, self.classes, y)
        u = np.asarray(self.predict(params, z, draws.t, draws.t - draws.r, labels))
        shift = grads.pop("shift") * len(x)  # 2 weight (u - target)
        np.testing.assert_allclose(loss, a["loss"], rtol=1e-5)
        # What float32 leaves of u counts where u is near its target: divided by 2 epsilon in a
        # difference, and twice where the target is another prediction.
        rounding = 1e-5 if "epsilon" in case else 2e-6 if case["objective"] == "lsd" else 1e-6
        expected = np.sqrt(a["error"][order])
        spread = rounding * row_norm(a["target"][order])
        assert np.all(abs(np.sqrt(rows["error"]) - expected) <= 1e-5 * expected + spread)
        np.testing.assert_allclose(rows["v_loss"], a["v_loss"][order], rtol=1e-5)
        weight = row_norm(shift) / (2 * np.sqrt(rows["error"]))
        allowed = 1e-4 + 2 * case["norm_p"] * spread / expected
        assert np.all(abs(weight / a["weight"][order] - 1) <= allowed)
        target = u - shift / (2 * a["weight"][order][:, None, None, None])
        assert distance(target, a["target"][order]) <= 10 * rounding
        check_gradients(grads, a, case["grad_norm"], 1e-4 + np.max(spread / expected))


def tree(arrays, prefix):
    """The arrays below a prefix, in the names of the published checkpoint, as our tree."""
    flat = {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
    return published.from_published(traverse_util.unflatten_dict(flat, sep="/"), prefix)


def shifted(net, num_equal):
    """`net` plus p["shift"], by row; its gradient is that of the loss by the prediction u."""

    def shifted_net(p, *batches, **how):
        weights = {name: value for name, value in p.items() if name != "shift"}
        out = net(weights, *batches, **how)
        parts = (
            [s for s in path.split_rows(p["shift"], num_equal) if len(s)] if "shift" in p else []
        )
        if [len(o.u) for o in out if len(o.u)] != [len(s) for s in parts]:
            return out  # a pass without gradient
        parts = iter(parts)
        return tuple(o._replace(u=o.u + next(parts)) if len(o.u) else o for o in out)

    return shifted_net


def check_gradients(grads, a, whole, rtol):
    """Holds gradients against the goldens of a case, by norm and where there are some, by entry."""
    grads = published.to_published(grads, "gradients")
    grads = traverse_util.flatten_dict(grads, sep="/")
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
    np.testing.assert_allclose(norm, whole, rtol=rtol)
    compared = set()
    for key, expected in a.items():
        kind, _, key = key.partition("/")
        if kind == "grad_norm":
            # Parameters without a true gradient hold rounding noise: measured against the whole.
            np.testing.assert_allclose(
                np.linalg.norm(grads[key]), expected, rtol=rtol, atol=1e-7 * norm, err_msg=key
            )
            compared.add(key)
        elif kind == "grad":
            assert distance(grads[key], expected) <= rtol, key
    assert compared == set(grads)


def row_norm(a):
    return np.linalg.norm(a.reshape(len(a), -1), axis=1)


def distance(a, b):
    """|a - b| / |b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@functools.partial(jax.jit, static_argnums=0)
def _predict(net, params, batch):
    return network.function(net)(params, batch)[0].u
