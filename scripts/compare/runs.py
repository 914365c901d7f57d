"""What runs have left in their folders, finished or not, as numbers, series and pictures."""

import math
import pathlib
from typing import NamedTuple

from configs import saved, strict_yaml
from metrics import evaluators
from run import layout, results, spent
from utils import files

POINTS = 500  # of a curve; of a longer one each is the mean of several lines
NEEDED = {"checkpoint_step": int, "num_samples": int, "num_steps": int, "weights": str}
OF_LINES = ("step", "epoch")
UNKNOWN = "evaluator not known"  # of a metric that stands in the log alone


class Metric(NamedTuple):
    """A number that is compared between runs: only with the same name and the same `measure`."""

    name: str  # in the log: "fid@5k/ema_1step"
    measure: str  # evaluator, samples and reference in words; "" for a loss, UNKNOWN

    @property
    def higher_is_better(self):
        return self.name.split("/")[0].split("@")[0] in evaluators.HIGHER_IS_BETTER


class Run(NamedTuple):
    """One run. Numbers that are not finite are left out everywhere."""

    name: str  # as short as tells the runs apart
    path: pathlib.Path
    options: dict | None  # {"section.option": value as JSON has it}
    steps: list[int]  # of the curves
    curves: dict[str, list[float | None]]  # of training, {name: as long as `steps`}
    scores: dict[Metric, dict[int, float]]  # of evaluations, {metric: {step: value}}
    results: list[dict]  # as results.json has them
    grids: dict[str, dict[int, pathlib.Path]]  # {"" or what is special about them: {step: file}}
    facts: dict[str, float]  # {"steps": ..., "images/s": ...}
    notes: list[str]  # what is missing or broken, a line each


def read_all(paths):
    """Returns the runs at `paths`, and a line for each that is left out.

    Returns:
      A list of `Run`, and a list of lines.
    """
    paths = [files.path(path) for path in paths]
    there, lines = [], []
    for path in paths:
        try:
            line = "given twice" if resolved(path) in map(resolved, there) else why_not(path)
        except OSError as error:
            line = f"cannot be read ({error.strerror or files.line(error)})"
        if line:
            lines.append(f"{path}: {line}")
        else:
            there.append(path)
    whole = []
    for path, name in zip(there, names(there), strict=True):
        try:
            whole.append(read(path, name))
        except OSError as error:
            lines.append(f"{path}: cannot be read ({error.strerror or files.line(error)})")
    return whole, lines


def why_not(path):
    """Says why the folder at `path` holds no run; or ""."""
    if not path.is_dir():
        return "no folder" if path.exists() else "no such folder"
    left = (layout.METRICS, layout.RESULTS, layout.CHECKPOINTS, layout.SAMPLES, layout.CONFIG)
    if not any((path / name).exists() for name in left):
        return f"no run, for there is none of {', '.join(left)} in it"
    return ""


def resolved(path):
    """Resolves the links in a path, where there can be some."""
    return path if files.is_remote(path) else path.resolve()


def names(paths):
    """Returns the last parts of each path, as many as tell them all apart."""
    parts = [resolved(path).parts for path in paths]
    for count in range(1, max(map(len, parts), default=1) + 1):
        short = ["/".join(part[-count:]) for part in parts]
        if len({*short}) == len(short):
            break
    return short if paths else []


def read(path, name):
    """Returns the `Run` at `path`; what is missing or broken in it becomes one of its notes.

    Raises:
      OSError: the system does not let it be read.
    """
    notes = []
    options, said = options_of(path)
    notes += said
    lines, broken = layout.metric_lines(path)
    if broken:
        notes.append(f"{layout.METRICS}: {broken} broken line{'s' * (broken > 1)} left out")
    steps, curves = curves_of(lines)
    stored, said = results_of(path)
    grids = layout.grids(path)
    lacking = {"no metrics of training yet": steps, "no results yet": stored, "no grids": grids}
    notes += said + [line for line, there in lacking.items() if not there]
    scores = scores_of(lines, stored)
    return Run(
        name, path, options, steps, curves, scores, stored, grids, facts_of(lines, options), notes
    )


def options_of(path):
    """Returns a run's options, {"section.option": value} or None, and what is wrong, a line each.

    They are those of its newest checkpoint or, before there is one, of its config.yml.
    """
    nested, file = layout.options(path), path / layout.CONFIG
    try:
        if nested is None and file.exists():
            nested = strict_yaml.parse(file.read_text("utf-8"))
            if not isinstance(nested, dict):
                raise ValueError("no options in it")
    except ValueError as error:
        return None, [f"{layout.CONFIG}: {error}"]
    if nested is None:
        return None, [
            f"its options are not known: there is neither a checkpoint nor {layout.CONFIG}"
        ]
    return saved.of_run(nested), []


def curves_of(lines):
    """Returns the numbers of training: steps, and {name: values}, at most POINTS of each."""
    lines = [{k: v for k, v in line.items() if is_of_training(k)} for line in lines]
    lines = [line for line in lines if line.keys() - set(OF_LINES)]
    size = max(1, -(-len(lines) // POINTS))
    parts = [lines[i : i + size] for i in range(0, len(lines), size)]
    columns = dict.fromkeys(name for line in lines for name in line if name not in OF_LINES)
    for name in columns:
        columns[name] = [
            mean([line[name] for line in part if number(line.get(name))]) for part in parts
        ]
    return [part[-1]["step"] for part in parts], columns


def is_of_training(name):
    """Tells whether a name of the log is of training, not of an evaluation or of time."""
    return not (results.is_score(name) or name.startswith(spent.PREFIX) or name == spent.GOODPUT)


def scores_of(lines, stored):
    """Returns the metrics of all evaluations, {Metric: {step: value}}, without their spreads.

    What results.json says comes first: it has those of `eval_only` too.
    """
    rows = [(result["checkpoint_step"], results.scalars([result]), result) for result in stored]
    known = {(name, step) for step, scores, _ in rows for name in scores}
    for line in lines:
        step = line["step"]
        left = {n: x for n, x in line.items() if results.is_score(n) and (n, step) not in known}
        rows.append((step, left, None))
    of_metric = {}
    for step, scores, result in rows:
        for name, value in scores.items():
            if number(value) and "_std" not in name.split("/")[0]:
                how = results.measure(result, name) if result else UNKNOWN
                of_metric.setdefault(Metric(name, how), {})[step] = value
    return {metric: dict(sorted(points.items())) for metric, points in of_metric.items()}


def results_of(path):
    """Returns the results of a run, and what is wrong with results.json, a line each."""
    try:
        stored = results.load(path)
    except ValueError as error:
        return [], [str(error)]
    whole = [
        result
        for result in stored
        if isinstance(result, dict)
        and all(type(result.get(name)) is kind for name, kind in NEEDED.items())
    ]
    lost = len(stored) - len(whole)
    return whole, [f"{layout.RESULTS}: {lost} of {len(stored)} are no results"] if lost else []


def facts_of(lines, options):
    """Returns how far a run has come, and how fast: {what: number}."""
    facts = {}
    if lines:
        facts["steps"] = lines[-1]["step"]
        epochs = [line["epoch"] for line in lines if number(line.get("epoch"))]
        if epochs:
            facts["epochs"] = round(epochs[-1], 1)
        if batch := batch_size(options):
            facts["images seen"] = facts["steps"] * batch
    for what, name in {"images/s": "images_per_second", "MFU": "mfu"}.items():
        values = sorted(line[name] for line in lines if number(line.get(name)))
        if values:
            facts[what] = float(
                f"{values[len(values) // 2]:.3g}"
            )  # the median: pauses do not count
    peaks = [x for line in lines if number(x := line.get("memory_gb/peak"))]
    facts |= {"memory, GB": max(peaks)} if peaks else {}
    for kind, share in spent.shares(spent.of_lines(lines)).items():
        name = spent.GOODPUT if kind == spent.STEPS else kind
        facts[f"{name}, % of time"] = round(100 * share, 1)
    return facts


def batch_size(options):
    """Returns the images of a step, where the options are known, or None."""
    size = (options or {}).get("training.batch_size")
    return size if type(size) is int and size > 0 else None


def number(value):
    """Tells whether this is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def mean(values):
    """Returns the mean of numbers, None of none."""
    return sum(values) / len(values) if values else None
