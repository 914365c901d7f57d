"""Writes weights for others: in the layout of the published code, in that of Hugging Face, or under
the names of SiT.

python -m scripts.export_checkpoint --from WORKDIR --to DIR [--step N] [--format FORMAT] ...

  msgpack, orbax   DIR/checkpoint_STEP as the published code of MeanFlow (a DiT) and of improved
                   MeanFlow (an imfDiT) or pixel MeanFlow (a pmfDiT) reads it, these in orbax
                   alone: weights, first average (a pmfDiT: each half-life), the optimizer's state.
                   A published checkpoint is written as it is: one form becomes the other.
  safetensors      DIR/model.safetensors, config.json and README.md: one set of weights
                   (--weights) with its options, and a model card (--license)
  sit              DIR/sit_STEP_...pt for PyTorch: one set of weights of a DiT under SiT's names,
                   for sampling in --steps equal steps; 0: an instantaneous velocity
docs/python.md shows the last two.
"""

import shlex
import sys
from pathlib import Path

import jax
import numpy as np

import generator
from configs import default, load_config
from configs.saved import flat, of_run
from formats import (
    hugging_face,
    model_card,
    published,
    published_imf,
    published_pmf,
    sit,
    torch_writer,
)
from models import dit
from run import layout, results
from run import weights as weights_of
from utils import averages, commands, files, moments, signals, trees

FORMS = ("msgpack", "orbax", "safetensors", "sit")


def export(source, folder, step=None, form=None, **chosen):
    """Writes a checkpoint into a folder, or into a bucket, and returns its path; see the module.

    Args:
      source: the workdir of a run, or a published or exported checkpoint.
      step: of the run, default the newest.
      form: one of FORMS; None: that of the published code.
      chosen: `weights`, `license`, `steps`, `omega`, `config` of the forms that have them.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: one line.
    """
    with files.outgoing(folder) as here:
        path = _export(source, here, step, form, **chosen)
    return files.path(folder) / path.relative_to(here) if files.is_remote(folder) else path


def _export(source, folder, step, form, **chosen):
    if form == "safetensors":
        return export_safetensors(source, folder, step, **chosen)
    if form == "sit":
        return export_sit(source, folder, step, **chosen)
    found = weights_of.read(source, optimizer=True, step=step)
    if found.params is None:
        raise ValueError(f"{source} holds an average alone: choose --format=safetensors or sit")
    state = {"params": found.params, "step": found.step, "folder": folder}
    ema, kept = weights_of.choose(found, "ema"), found.opt_state
    if published_pmf.is_ours(ema):
        state |= {"ema_params": averages.by_half_life(found.ema_params), "opt_state": kept}
        write = published_pmf.export
    else:  # which know Adam alone
        state |= {"ema_params": ema, "opt_state": kept and moments.of_adam(kept)}
        if "u_blocks" not in ema:
            return published.export(**state, form=form or "msgpack")
        write = published_imf.export
    if form not in (None, "orbax"):
        raise ValueError(f"--format={form}: the published code of this network reads orbax alone")
    return write(**state)


def export_safetensors(source, folder, step=None, *, weights="ema", license="unknown", config=None):
    """Writes folder/{model.safetensors, config.json, README.md} and returns the folder."""
    model = generator.load(source, config=config, step=step, average=weights)
    tree = jax.tree.map(np.asarray, model.params)
    card = model_card.text(
        Path(folder).name, license=license, options=all_options(model.options),
        identity=model.identity, step=model.step, weights=weights,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(tree)),
        command=command(model.options), measured=measured(source, hugging_face.checksum(tree)),
    )  # fmt: skip
    return hugging_face.export(
        folder, tree, step=model.step, weights=weights, options=all_options(model.options),
        identity=model.identity, card=card,
    )  # fmt: skip


def all_options(saved):
    """Returns all options of a run, nested: one that it does not name had its default."""
    nested = {}
    for name, value in of_run(saved).items():
        section, _, key = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[key] = value
    return nested


def command(saved):
    """Writes the command that trains with these options, without what belongs to one machine."""
    usual = flat(default.get_config())
    words = ["python main.py --workdir=WORKDIR --config=configs/load_config.py:default"]
    for name, value in of_run(hugging_face.portable(all_options(saved))).items():
        if value != usual[name]:
            words.append(f"--config.{name}={shlex.quote(load_config.written(value))}")
    return " \\\n  ".join(words)


def measured(source, checksum):
    """Returns what results.json beside a run says of the weights with this checksum, as lines."""
    folder = files.path(source)
    folders = [folder, folder.parent] if folder.name == layout.BEST else [folder]
    known = [r for place in folders for r in results.load(place) if isinstance(r, dict)]
    return [
        results.report(result) for result in known if result.get("weights_checksum") == checksum
    ]


def export_sit(source, folder, step=None, *, weights="ema", steps=None, omega=None, config=None):
    """Writes folder/sit_STEP_...pt and returns its path.

    Args:
      steps: equal steps that it is sampled in, h = 1 / steps; 0: h = 0, the instantaneous
        velocity; None: 1, or 0 where the network is no other.
      omega: guidance scale, for a network that is told one.
    """
    model = generator.load(source, config=config, step=step, average=weights)
    if steps is None:
        steps = 0 if model.parts.method.instantaneous else 1
    arrays = jax.tree.map(np.asarray, model.params)
    arrays = weights_of.without(arrays, model.parts.module.only_for_training)
    arrays = trees.flatten(arrays)
    p, q, _, width = np.shape(arrays.get("x_embedder/kernel", np.zeros((1, 1, 1, 4))))
    h, w, _ = model.image_shape
    if (p, h) != (q, w):
        raise ValueError(f"--format=sit has square images and patches, not {h} x {w}, {p} x {q}")
    positions = dit.position_embedding(width, h // p, w // q)
    state = sit.state_of(arrays, constants(model, steps, omega), positions)
    kind = f"{steps}step" if steps else "velocity"
    path = Path(folder) / f"sit_{model.step}_{kind}.pt"
    if path.exists():
        raise FileExistsError(f"{path} is there already: remove it or choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.complete(path) as unfinished:
        torch_writer.write_zip(unfinished, state)
    return path


def constants(model, steps, omega=None):
    """Returns what the embedders beside that of t are told throughout sampling: {name: number}.

    Raises:
      ValueError: a network that is told more than t, which a SiT is not.
    """
    method, embedded = model.parts.method, model.config.model.time_cond.split(",")
    embedded = [name.strip() for name in embedded]
    if steps < 0 or (steps and method.instantaneous):
        only = " other than 0: its network is the velocity" if method.instantaneous else " below 0"
        raise ValueError(f"--steps {steps}: method.name {model.config.method.name} has none{only}")
    constant = {"h": 1 / steps if steps else 0.0} | ({"r": 0.0} if steps == 1 else {})
    constant = {name: value for name, value in constant.items() if name in embedded}
    if unknown := set(embedded) - {"t"} - constant.keys():
        raise ValueError(
            f"--steps {steps}: model.time_cond embeds {', '.join(unknown)} beside t, which is "
            "constant in one step alone: SiT has one embedder"
        )
    guidance = model.guidance(omega)
    if method.conditions:
        given = dict.fromkeys(method.conditions, 1.0) | {"t_min": 0.0}
        given |= guidance._asdict() if guidance else {}
        numbers = dit.guidance_numbers({name: float(given[name]) for name in method.conditions})
        constant |= {name: float(value) for name, value in numbers.items()}
    return constant


def parse(argv):
    parser = commands.parser("scripts.export_checkpoint", __doc__)
    parser.add_argument("--from", dest="source", required=True, help="workdir or checkpoint")
    parser.add_argument("--to", dest="folder", required=True, help="folder to write into")
    parser.add_argument("--step", type=int, help="checkpoint of the run, default the newest")
    parser.add_argument("--format", dest="form", choices=FORMS)
    own = parser.add_argument_group("safetensors and sit")
    own.add_argument("--weights", help="which: ema (default), ema_DECAY, ema_sigmaS, params")
    own.add_argument("--config", help="of configs/, for weights that tell no options")
    own.add_argument("--license", help="safetensors: of the weights, for the card (unknown)")
    own.add_argument("--steps", type=int, help="sit: of sampling; 0: an instantaneous velocity")
    own.add_argument("--omega", type=float, help="sit: guidance, for a network that is told it")
    return parser.parse_args(argv)


# Which of the options beside the first each form has.
OWN = {
    "safetensors": {"weights", "config", "license"},
    "sit": {"weights", "config", "steps", "omega"},
}


def main(argv=None):
    args = vars(parse(argv))
    jax.config.update("jax_platforms", "cpu")  # a run on this machine may hold its accelerators
    chosen = {name: args.pop(name) for name in ("weights", "config", "license", "steps", "omega")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    try:
        files.check_arguments(args)
        if others := chosen.keys() - OWN.get(args["form"], set()):
            raise ValueError(f"--{min(others)} is no option of --format={args['form']}")
        path = export(**args, **chosen)
    except (ValueError, OSError) as error:
        print(f"export_checkpoint: {files.line(error)}", file=sys.stderr)
        return 1
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    signals.outlive_readers()
    sys.exit(main())
