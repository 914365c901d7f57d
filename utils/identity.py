"""What things are made of, and what to say where two are combined that do not belong together.

An identity is a flat dict of JSON values: digests of contents, settings, versions; never a path
that decides, so that folders may be moved. Whatever has one carries it along: a dataset in its
dataset_info.json, a checkpoint beside its options, reference statistics in their npz, a result in
results.json. What was made before has none, or less in it: only what both sides say is compared.
"""

import hashlib
import logging

import numpy as np

from utils import environment, trees

MODULUS = 2**128  # of the sums of digests
SHOWN = 12  # characters of a digest in a line
OF_RECORDS = (
    "content",
    "sample",
    "conditions",
)  # digests of the records themselves, see utils/contents.py


def of_arrays(tree, *more):
    """Digests (hex) a nested dict of arrays, and whatever else `repr` tells apart."""
    total = hashlib.sha256(repr(more).encode())
    for name, value in sorted(trees.flatten(tree).items()):
        value = np.ascontiguousarray(value)
        total.update(f"{name}{value.shape}{value.dtype}".encode())
        total.update(value.reshape(-1).view(np.uint8))  # bfloat16 is no buffer
    return total.hexdigest()[:32]


class Sum:
    """The digest of a set of byte strings: in any order, and in parts that are added up.

    Args:
      text: the hex form of another one, to go on from.
    """

    def __init__(self, text="0"):
        self.value = int(text, 16)

    def add(self, content):
        """Adds one byte string."""
        self.value += int.from_bytes(hashlib.sha256(content).digest()[:16], "big")

    def join(self, other):
        """Adds all of another sum."""
        self.value += other.value

    def __str__(self):
        return f"{self.value % MODULUS:032x}"


def differences(before, now, names=None):
    """Returns {name: "name A, now B"} for what both sides say and say differently.

    Args:
      names: which entries to compare; None: all.
    """
    both = [name for name in before if name in now and (names is None or name in names)]
    return {
        name: f"{name} {_short(before[name])}, now {_short(now[name])}"
        for name in both
        if before[name] != now[name]
    }


def _short(value):
    text = str(value)
    return text[:SHOWN] if len(text) == 32 and set(text) <= set("0123456789abcdef") else text


# Records, autoencoders and runs -----------------------------------------------------------------


def check_autoencoder(records, autoencoder, where):
    """Holds the autoencoder that is to decode against the one that latents were made by.

    Args:
      records: identity of the records, or of those that a run was trained on.
      autoencoder: identity of the autoencoder; {} where images are not latents.
      where: whose latents they are, for the line.

    Raises:
      ValueError: it has another encoder. Where that cannot be known, a line says so.
    """
    if not autoencoder:
        return
    name = autoencoder["name"]
    if "encoder" in records:
        if records["encoder"] != autoencoder["encoder"]:
            raise ValueError(
                f"dataset.vae {name} did not make the latents of {where}: their encoder is "
                f"{records['encoder'][:SHOWN]} ({records.get('vae', 'of another name')}), this one "
                f"{autoencoder['encoder'][:SHOWN]}; name the autoencoder that made them"
            )
    elif records.get("vae") != name:
        known = f"only its name then, {records['vae']}" if "vae" in records else "not its name"
        logging.info(
            "%s does not say which autoencoder made its latents (%s): dataset.vae %s is taken on "
            "trust", where, known, name,
        )  # fmt: skip


def check_run(before, now, where):
    """Compares what a checkpoint was made from with what the run is to go on with.

    Args:
      before: the item `identity` of the checkpoint, see run/checkpoint.py.
      now: the same of the run.
      where: the checkpoint, for the line.

    Returns:
      What only the checkpoint knows, a dict like `before`.

    Raises:
      ValueError: other records, or an environment that makes other numbers. What differs beside
        that is said.
    """
    if not before:
        logging.info(
            "%s is of a version that did not note on which records, with which autoencoder and in "
            "which environment it was made: those of now are taken on trust", where
        )  # fmt: skip
    records = differences(before.get("records", {}), now.get("records", {}), OF_RECORDS)
    if records:
        raise ValueError(
            f"{where} was made with other records than dataset.root holds now "
            f"({', '.join(records.values())}), and the place in the data is one in those; name the "
            "former dataset, or take another --workdir and these weights (load_from)"
        )
    around = differences(before.get("environment", {}), now.get("environment", {}))
    if refused := [line for name, line in around.items() if name in environment.MATTERS]:
        raise ValueError(
            f"{where} was made in an environment that makes other numbers ({', '.join(refused)}): "
            "start with the same settings of jax (variables JAX_...)"
        )
    others = list(around.values())
    others += differences(before.get("autoencoder", {}), now.get("autoencoder", {})).values()
    for line in others:
        logging.info("changed since %s: %s", where, line)
    return {part: value for part, value in before.items() if not now.get(part)}
