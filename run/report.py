"""Tells what a job is before anything is compiled: what it runs on, with what, how long.

Rows (name, text) are made by pure functions of shapes and options; nothing is allocated for them.
`tell` shows them where the log of a process is shown, which is in one process alone.
"""

import logging
import math
import os
import platform
import sys
import textwrap

import jax

from configs import load_config
from configs.default import OPTIONS
from configs.option import Role
from run import layout
from utils import environment, files

WIDTH, INDENT = 100, 14  # of the lines, and of what stands behind the names


def tell(rows):
    """Shows rows [(name, text)], long ones in several lines."""
    for name, text in rows:
        logging.info("%s", "\n".join(wrapped(name, text)))


def wrapped(name, text):
    """Returns the lines of one row."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"  {name:<{INDENT - 2}}", subsequent_indent=" " * INDENT,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


# Every job ------------------------------------------------------------------------------------


def job(options, source, given, workdir):
    """Returns the rows about any job: devices, options that are not the default, folder.

    options, source, given: from the functions of load_config of these names.
    """
    rows = [("devices", devices()), ("config", source)]
    sections = {}
    for path, value in options.items():
        if value != OPTIONS[path].default and Role.UNTOLD not in OPTIONS[path].roles:
            section, _, name = path.rpartition(".")
            sections.setdefault(section or "job", []).append(f"{name} {shown(value)}")
    rows += [(f"  {section}", ", ".join(values)) for section, values in sections.items()]
    if words := [path for path, place in given.items() if place == "command line"]:
        rows.append(("  set by", f"the command line: {', '.join(words)}"))
    return [*rows, ("folder", str(workdir))]


def devices():
    """Returns in words the devices of all processes, and the versions."""
    every = jax.devices()
    kinds = [f"{len(every)} x {every[0].device_kind} ({every[0].platform})"]
    if jax.process_count() > 1:
        kinds.append(f"{jax.process_count()} processes")
    if limit := (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"):
        kinds.append(f"{count(limit)}B each")
    return f"{', '.join(kinds)}; jax {jax.__version__}, Python {platform.python_version()}"


def network(cls, parts):
    """Returns the row of a network: its name `cls` and its number of parameters."""
    sizes = {name: number_of(tree) for name, tree in parts.param_shapes().items()}
    text = f"{cls}, {count(sum(sizes.values()))} parameters"
    drop = sum(sizes.get(name, 0) for name in parts.module.only_for_training)
    return [("network", text + (f", {count(drop)} of them only train" if drop else ""))]


def number_of(tree):
    """Returns the number of elements in a tree of arrays or `ShapeDtypeStruct`s."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


# The run's folder -----------------------------------------------------------------------------


def note(workdir, text):
    """Writes all options of a run, the `text` of its config, and its versions into its folder.

    Says which versions are others than at the start before.
    """
    head = (
        "# All options of this run, as of its last start; for the same again, or with others:\n"
        "# python main.py --workdir=DIR --config=THIS_FILE [--config.section.option=value ...]\n"
    )
    files.write_text(workdir / layout.CONFIG, head + text)
    path, now = workdir / layout.VERSIONS, environment.installed()
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else ()
    before = dict(line.split("==", 1) for line in lines if "==" in line)
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now
               if before.get(name, now[name]) != now[name]]  # fmt: skip
    if changed:
        logging.info("versions changed: %s", ", ".join(changed))
    lines = [f"# Python {platform.python_version()}", *(f"{n}=={v}" for n, v in now.items())]
    files.write_text(path, "\n".join(lines) + "\n")


# Training -------------------------------------------------------------------------------------


def training(cls, parts, records, options, when):
    """Returns the rows about a run whose network is `cls`, by the options `training`.

    when: `run.cadence.Cadences`.
    """
    kind = {"image": "images", "moments": "latents (mean, std)"}.get(records.key, records.key)
    shape = "x".join(map(str, records.shape))
    classes = f", {parts.num_classes} classes" if parts.num_classes else ""
    given = parts.codec.given

    def told(one):
        return f"{one.name} {one} ({one.kind}, {'kept' if one.kept else 'dropped'} for guidance)"

    return [
        *network(cls, parts),
        ("records", f"{records.num_records:,} {kind} {shape}{classes}: {records.root}"),
        *([("conditions", ", ".join(map(told, given)))] if given else []),
        ("length", length(options, when.steps_per_epoch, when.total)),
        ("cadence", cadences(when)),
    ]


def length(options, steps_per_epoch, total):
    """Returns in words how long a run is, in steps, epochs and images."""
    epochs = f"{total / steps_per_epoch:,.4g}"
    asked = "num_steps" if options.num_steps else "num_epochs"
    return (
        f"{total:,} steps = {epochs} epoch{'s' * (epochs != '1')} of {steps_per_epoch:,}, "
        f"{options.batch_size:,} images a step (training.{asked})"
    )


def cadences(when):
    """Returns in words what comes in which cadence, in steps, and what comes at the end alone."""
    rows = [f"metrics every {when.metrics.period:,} steps"]
    for name in ("checkpoint", "grid", "evaluation"):
        each = getattr(when, name)
        if each.on:
            regular = 0 < each.period < each.total
            rows.append(f"{name} {f'every {each.period:,}' if regular else 'at the end'}")
    return ", ".join(rows)


# The other jobs -------------------------------------------------------------------------------


def evaluating(origin, fid, root, settings, workdir):
    """Returns the rows about an evaluation of weights from `origin`, by the options `fid`.

    Args:
      root: folder of the records.
      settings: number of samplers, steps and guidances.
    """
    reference = fid.cache_ref or f"the training images, {root}"
    images = f"{fid.num_samples:,} images for each of {len(fid.weights) * settings} settings"
    return [
        ("weights", f"{origin}: {', '.join(fid.weights)}"),
        ("images", f"{images}, beside {reference}"),
        ("results", str(workdir / layout.RESULTS)),
    ]


def sampling(origin, options, workdir):
    """Returns the rows about a sampling job of weights from `origin`, by the options `sampling`."""
    steps = options.sampling_timesteps or options.num_steps[:1]
    text = f"times {shown(steps)}" if options.sampling_timesteps else f"steps {shown(steps)}"
    images = f"{options.num_images:,} by {options.method[0]}, {text}: {workdir / layout.SAMPLES}"
    return [("weights", origin), ("images", images)]


def origin(step, where):
    """Says in words of which step and of what path weights are."""
    return f"step {step:,} of {where}"


# Words ----------------------------------------------------------------------------------------


def shown(value):
    """Returns the value of an option as it is written on the command line."""
    return load_config.written(value) or "empty"


def count(number):
    """Returns a number in short: 1.32 M."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def not_a_command(file, options=""):
    """Says how the job of a module is run, with the `options` that choose it; returns status 2."""
    name = os.path.basename(file)
    how = f"bash scripts/launch.sh JOB_NAME [CONFIG]{options}, or python main.py --help"
    print(f"{name} is no command of its own: {how}", file=sys.stderr)
    return 2
