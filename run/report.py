"""What a job says of itself before anything is compiled: what it runs on, what it is, how long.

Rows (name, text) are made by pure functions of shapes and options; nothing is allocated for them.
`tell` shows them where the log of a process is shown, which is in one process alone.
"""

import logging
import math
import os
import platform
import re
import sys
import textwrap

import jax

from configs import default, load_config
from run import layout
from utils import environment, files, sharding

WIDTH, INDENT = 100, 14  # of the lines, and of what stands behind the names
MOST_PARTS = 12  # of a network, before those of one first word are put together
NOT_TOLD = ("dataset.root",)  # stands with the records


def tell(rows):
    """Shows rows [(name, text)], long ones in several lines."""
    for name, text in rows:
        logging.info("%s", "\n".join(wrapped(name, text)))


def wrapped(name, text):
    """The lines of one row."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"  {name:<{INDENT - 2}}", subsequent_indent=" " * INDENT,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


# Every job ------------------------------------------------------------------------------------


def job(config, source, given, workdir):
    """Rows about any job: devices, versions, options that are not the default, folder.

    Args:
      config: the whole config.
      source: from `load_config.source`.
      given: from `load_config.given`.
      workdir: folder of the run.
    """
    rows = [("devices", devices()), ("config", source)]
    told = different(config)
    for section in dict.fromkeys(path.rpartition(".")[0] for path in told):
        values = [
            f"{path.rpartition('.')[2]} {shown(value)}"
            for path, value in told.items() if path.rpartition(".")[0] == section
        ]  # fmt: skip
        rows.append((f"  {section or 'job'}", ", ".join(values)))
    if words := [path for path, place in given.items() if place == "command line"]:
        rows.append(("  set by", f"the command line: {', '.join(words)}"))
    return [*rows, ("folder", str(workdir))]


def devices():
    """The devices of all processes, and the versions."""
    found = jax.devices()
    kinds = [f"{len(found)} x {found[0].device_kind} ({found[0].platform})"]
    if jax.process_count() > 1:
        kinds.append(f"{jax.process_count()} processes")
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        kinds.append(f"{size(limit)} each")
    return f"{', '.join(kinds)}; jax {jax.__version__}, Python {platform.python_version()}"


def different(config):
    """{option: value} of those that are not the default, in the order of a config."""
    defaults, found = load_config.options(default.get_config()), load_config.options(config)
    return {
        path: value for path, value in found.items()
        if value != defaults[path] and path not in NOT_TOLD
    }  # fmt: skip


def network(config, model):
    """The row of a network: its parameters by part."""
    shapes = model.param_shapes()
    counts = parts_of(shapes)
    text = f"{config.model.cls}, {count(sum(counts.values()))} parameters: "
    text += ", ".join(f"{name} {count(number)}" for name, number in counts.items())
    drop = sum(number_of(shapes[name]) for name in model.module.only_for_training if name in shapes)
    return [("network", text + (f"; {count(drop)} of them only train" if drop else ""))]


def parts_of(shapes):
    """Number of parameters by first name, or where these are many, by their first words."""
    names = {name: name for name in shapes}
    if len(shapes) > MOST_PARTS:
        names = {name: re.split(r"[_\d]", name)[0] for name in shapes}
    counts = dict.fromkeys(names.values(), 0)
    for name, tree in shapes.items():
        counts[names[name]] += number_of(tree)
    return counts


def number_of(tree):
    """The number of elements in a tree of arrays or `ShapeDtypeStruct`s."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


# The run's folder -----------------------------------------------------------------------------


def note(workdir, config):
    """Writes into the folder of a run what it is made with now: all options, and the versions.

    Says which versions are others than at the start before.
    """
    written = (
        "# All options of this run, as of its last start; for the same again, or with others:\n"
    )
    written += (
        "# python main.py --workdir=DIR --config=THIS_FILE [--config.section.option=value ...]\n"
    )
    files.write_text(workdir / layout.CONFIG, written + load_config.text(config))
    path, now = workdir / layout.VERSIONS, environment.installed()
    before = versions(path.read_text(encoding="utf-8")) if path.exists() else now
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now
               if before.get(name, now[name]) != now[name]]  # fmt: skip
    if changed:
        logging.info("versions changed: %s", ", ".join(changed))
    lines = [f"# Python {platform.python_version()}", *(f"{n}=={v}" for n, v in now.items())]
    files.write_text(path, "\n".join(lines) + "\n")


def versions(text):
    """{name: version} of a requirements.lock."""
    return dict(line.split("==", 1) for line in text.splitlines() if "==" in line)


# Training -------------------------------------------------------------------------------------


def training(config, model, records, state, lengths, loaded=None):
    """Rows about a run.

    Args:
      config: the whole config.
      model: `parts.Parts`.
      records: the training records.
      state: `train.TrainState` of `ShapeDtypeStruct`s.
      lengths: (steps per epoch, steps of the run).
      loaded: {name: tree} of what else lies on every device.
    """
    kind = "images" if records.key == "image" else "latents (mean, std)"
    shape = "x".join(map(str, records.shape))
    classes = f", {config.dataset.num_classes} classes" if config.dataset.num_classes else ""
    parts = memory(model, records, state, config, loaded or {})
    text = f"{size(sum(parts.values()))} a device, expected: "
    text += ", ".join(f"{name} {size(number)}" for name, number in parts.items() if number)
    return [
        *network(config, model),
        ("records", f"{records.num_records:,} {kind} {shape}{classes}: {records.root}"),
        ("length", length(config.training, *lengths)),
        ("cadence", cadences(config, *lengths)),
        ("memory", f"{text}; activations and what is compiled come on top"),
    ]


def length(options, steps_per_epoch, total):
    """How long a run is, in steps, epochs and images."""
    epochs = f"{total / steps_per_epoch:,.4g}"
    asked = "num_steps" if options.num_steps else "num_epochs"
    return (
        f"{total:,} steps = {epochs} epoch{'s' * (epochs != '1')} of {steps_per_epoch:,}, "
        f"{options.batch_size:,} images a step (training.{asked})"
    )


def cadences(config, steps_per_epoch, total):
    """What comes in which cadence, in steps; what comes at the end alone, too."""
    training = config.training
    kinds = [("checkpoint", training.checkpoint_per_step, training.checkpoint_per_epoch)]
    if training.sample_on_training:
        kinds.append(("grid", training.sample_per_step, training.sample_per_epoch))
    if config.fid.on_training:
        kinds.append(("evaluation", training.fid_per_step, training.fid_per_epoch))
    found = [f"metrics every {training.log_per_step:,} steps"]
    for name, steps, epochs in kinds:
        cadence = steps or epochs * steps_per_epoch
        regular = 0 < cadence < total
        found.append(f"{name} {f'every {cadence:,}' if regular else 'at the end'}")
    return ", ".join(found)


def memory(model, records, state, config, loaded):
    """Bytes on each device by what they hold, so far as shapes tell.

    Not counted: activations, which depend on what the compiler keeps, and its programs. Weights are
    gathered and rounded for the products of a step (`models.network.function`), which is a copy
    where they are sharded or in another type.
    """
    mesh = model.mesh
    cast = jax.eval_shape(model.module.cast, state.params)
    copied = [
        x for x, y in zip(jax.tree.leaves(cast), jax.tree.leaves(state.params), strict=True)
        if mesh.shape["fsdp"] > 1 or x.dtype != y.dtype
    ]  # fmt: skip
    keys = 2 if config.dataset.use_flip and records.has_flipped else 1
    image = math.prod(records.shape) * records.dtype.itemsize * keys + 4  # and its label
    found = {
        "weights": on_device(mesh, state.params),
        "averages": on_device(mesh, state.ema_params),
        "moments": on_device(mesh, state.opt_state),
        "gradients": on_device(mesh, state.params),
        "weights for products": sum(bytes_of(x.shape, x) for x in copied),
        "two batches": 2 * image * config.training.batch_size // mesh.size,
    }
    whole = {name: sum(bytes_of(x.shape, x) for x in jax.tree.leaves(tree))
             for name, tree in loaded.items()}  # fmt: skip
    return found | whole


def on_device(mesh, tree):
    """Bytes of a tree on one device, divided as `sharding.by_parameter` says."""
    shardings = jax.tree.leaves(sharding.by_parameter(mesh, tree))
    pairs = zip(jax.tree.leaves(tree), shardings, strict=True)
    return sum(bytes_of(s.shard_shape(x.shape), x) for x, s in pairs)


def bytes_of(shape, x):
    """Bytes of an array of this shape and the type of `x`."""
    return math.prod(shape) * x.dtype.itemsize


# The other jobs -------------------------------------------------------------------------------


def evaluating(config, model, weights, settings, workdir):
    """Rows about an evaluation: of `weights` from `weights.load`, in so many `settings`."""
    fid = config.fid
    text = f"step {weights['step']:,} of {config.load_from or workdir}: {', '.join(fid.weights)}"
    reference = fid.cache_ref or f"the training images, {config.dataset.root}"
    images = f"{fid.num_samples:,} images for each of {len(fid.weights) * settings} settings"
    return [
        *network(config, model),
        ("weights", text),
        ("images", f"{images}, beside {reference}"),
        ("results", str(workdir / layout.RESULTS)),
    ]


def sampling(config, model, weights, workdir):
    """Rows about a sampling job, of `weights` from `weights.load`."""
    options = config.sampling
    steps = options.sampling_timesteps or options.num_steps[:1]
    text = f"times {shown(steps)}" if options.sampling_timesteps else f"steps {shown(steps)}"
    return [
        *network(config, model),
        ("weights", f"step {weights['step']:,} of {config.load_from or workdir}"),
        (
            "images",
            f"{options.num_images:,} by {options.method[0]}, {text}: {workdir / layout.SAMPLES}",
        ),
    ]


# Words ----------------------------------------------------------------------------------------


def shown(value):
    """The value of an option, as it is written on the command line."""
    return load_config.written(value) or "empty"


def count(number):
    """A number in short: 1.32 M."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def size(number):
    """Bytes in short: 5.28 MB."""
    return f"{count(number)}B" if number >= 1000 else f"{number} bytes"


def not_a_command(file, options=""):
    """Says how the job of a module is run, which was run by itself; returns the exit status.

    Args:
      file: of the module.
      options: those that choose the job.
    """
    print(
        f"{os.path.basename(file)} is no command of its own: bash scripts/launch.sh JOB_NAME "
        f"[CONFIG]{options}, or python main.py --help",
        file=sys.stderr,
    )
    return 2
