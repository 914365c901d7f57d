#!/usr/bin/env bash
# optax.contrib.muon decides by the number of axes what is a matrix. Blocks that flax's nn.scan has
# stacked have one axis more: their biases (depth, D) are taken for matrices and orthogonalised across
# the depth, so that the bias of one block depends on the gradients of the others, and their kernels
# (depth, D, F) are left to Adam. No error, no warning, and the training goes on: only the wrong half
# is trained by Muon. `muon_weight_dimension_numbers` says per array which axes are a matrix's.
#
#   bash findings/muon_scanned_blocks.sh    # installs all into a folder of its own, and fails if it changed
#
# optax 0.2.8, flax 0.12.8, jax 0.10.2, Python 3.11 (2026-11-30)
# seen (by whom an array is trained: Adam's first step has one size in all its numbers)
#   block by block  {'bias': 'Adam', 'kernel': 'Muon'}
#   scanned         {'bias': 'Muon', 'kernel': 'Adam'}
set -euo pipefail
case ${1:-} in
  -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit ;;
esac
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  optax==0.2.8 flax==0.12.8 jax==0.10.2 jaxlib==0.10.2
cat >"$folder/check.py" <<'PY'
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import muon

DEPTH, D = 3, 8


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(D, name="out")(nn.gelu(nn.Dense(4 * D, name="in")(x))), None


class Loop(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 0}
        blocks = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=DEPTH)
        return blocks(name="blocks")(x, None)[0]


def trained_by(module, *path):
    """Says by whom the arrays of `out` are trained."""
    x = jax.random.normal(jax.random.key(0), (16, D))
    params = module.init(jax.random.key(1), x)["params"]
    loss = lambda p: jnp.sum(jax.tree.leaves(module.apply({"params": p}, x))[0] ** 2)
    optimizer = muon(1.0, nesterov=False, adam_b1=0.0)
    updates, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params)
    for name in path:
        updates = updates[name]

    def name_of(update):
        sizes = np.abs(np.asarray(update)).ravel()
        return "Adam" if sizes.std() < 0.01 * sizes.mean() else "Muon"

    return {name: name_of(update) for name, update in updates["out"].items()}


seen = {
    "block by block": trained_by(Block()),
    "scanned": trained_by(Loop(), "blocks"),
}
print(f"optax {optax.__version__}")
for kind, arrays in seen.items():
    print(f"{kind:<15} {arrays}")
assert seen == {
    "block by block": {"kernel": "Muon", "bias": "Adam"},
    "scanned": {"kernel": "Adam", "bias": "Muon"},
}, seen
PY
cd "$folder" && JAX_PLATFORMS=cpu venv/bin/python check.py
