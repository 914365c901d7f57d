"""The results of evaluations: results.json, the table, the plot, and their names in the log.

A result is a dict of its metrics and of all settings that they depend on. results.json is a list
of them, which is this module's alone.
"""

import json
import logging
import re

from metrics import evaluators
from run import layout
from utils import files

GUIDANCE = ("omega", "t_min", "t_max")


def numbers(result):
    """Returns the metrics of a result, {name: float}; the rest says what they depend on."""
    own = [name for name in result if evaluators.is_own(name)]
    return {name: result[name] for name in (*evaluators.NUMBERS, *own) if name in result}


def settings(result):
    """Returns what the metrics of a result depend on."""
    return {name: value for name, value in result.items() if name not in numbers(result)}


def guidance_of(result):
    """Returns the guidance of a result, where there was one: {name: float}."""
    return {name: result[name] for name in GUIDANCE if name in result}


def measure(result, metric):
    """Returns in words what a metric of a result depends on beside the images.

    Two numbers are compared only where these are the same. A reference is named by its contents
    where they are known, since one file lies in many places.
    """
    network, weights = "features", "feature_weights_sha256"
    if metric.startswith("fd_dinov2"):
        network, weights = "dinov2", "dinov2_weights_sha256"
    parts = ("arr_0",) if metric.split("@")[0] not in ("fid", "sfid", "fd_dinov2") else ()
    contents = [result.get(f"reference_{key}") for key in (*parts, "digest", "content", "images")]
    contents = [str(x)[:8] for x in contents if x] + [result.get("reference", "not known")]
    words = [
        (result.get("evaluator", "evaluator not known"), ""),
        (f"{result['num_samples']:,}", " samples"),
        (result.get("labels"), " labels"),
        (str(result.get("label_counts") or "")[:8], " counts of them"),
        (result.get("rounding"), " values"),
        (result.get(network), ""),
        (str(result.get(weights) or "")[:8], " weights"),
        (contents[0], " as the reference"),
    ]
    return ", ".join(f"{value}{what}" for value, what in words if value)


# For people -------------------------------------------------------------------------------------


def report(result):
    """Writes one result as a line for people."""
    count = result["num_samples"]
    words = ", ".join(
        f"{evaluators.tag(name, count)} {value:.4f}" for name, value in numbers(result).items()
    )
    guidance = "".join(f"{name} {value:g}, " for name, value in guidance_of(result).items())
    return (
        f"{words} ({result['weights']}, {result['num_steps']}-step{_sampler(result)}, {guidance}"
        f"{count} samples, {result['evaluator']}: {result.get('features', result.get('dinov2'))}, "
        f"checkpoint {result['checkpoint_step']})"
    )


def _sampler(result):
    method = result.get("sampling_method", "ode")
    return "" if method == "ode" else f" {method}"


def metric_name(result):
    """Returns what follows `fid/` and the others in the name of a metric: "ema_1step"."""
    guidance = [f"{name}{value:g}" for name, value in guidance_of(result).items()]
    steps = f"{result['num_steps']}step{_sampler(result).replace(' ', '_')}"
    return "_".join([result["weights"], steps, *guidance])


def scalars(results):
    """Names results as the log does: {"fid/ema_1step": 11.3, "fid@5k/ema_1step": 14.1, ...}."""
    return {
        f"{evaluators.tag(name, result['num_samples'])}/{metric_name(result)}": value
        for result in results
        for name, value in numbers(result).items()
    }


def is_score(name):
    """Tells whether a name in the log is one of those that `scalars` gives."""
    return bool(re.search(r"/.*_\d+step", name))


def table(results):
    """Writes several results as a table for people, the best first: a line for each."""
    guidance = [name for name in GUIDANCE if name in results[0]]
    lines = [["weights", "sampler", "steps", *guidance, *numbers(results[0])]]
    for result in by_first_metric(results):
        described = [result["weights"], result["sampling_method"], str(result["num_steps"])]
        described += [f"{result[name]:g}" for name in guidance]
        lines.append(described + [f"{value:.4f}" for value in numbers(result).values()])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def by_first_metric(results):
    """Sorts results of the same metrics by the first of them (the FID), the best first."""
    first = next(iter(numbers(results[0])))
    return sorted(results, key=lambda result: result[first], reverse=evaluators.rises(first))


def plot(results, path):
    """Draws the first metric over the guidance, or over sigma_rel of the average, as a PNG.

    A line for each number of steps, sampler, interval and set of weights. Returns whether there
    was something to draw: two values on the axis at least.
    """
    axis, lines = _lines(results)
    if not lines:
        return False
    try:
        from matplotlib.figure import Figure  # late: it takes a second, and is asked for here alone
    except ImportError:
        logging.warning("no plot of the results: pip install matplotlib")
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel=axis, ylabel=next(iter(numbers(results[0]))))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    with files.complete(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=150)
    return True


def _lines(results):
    """Returns the axis, and {label: [(x, y), ...]} with two different x at least, or {}."""
    first = next(iter(numbers(results[0])))
    for axis, value_of in (("omega", lambda r: r.get("omega")), ("sigma_rel", _sigma)):
        points = [(value_of(result), result) for result in results]
        points = [(x, result) for x, result in points if x is not None]
        if len({x for x, _ in points}) < 2:
            continue
        lines = {}
        for x, result in points:
            parts = [f"{result['num_steps']}-step{_sampler(result)}"]
            if axis != "sigma_rel":
                parts.append(result["weights"])
            elif "omega" in result:
                parts.append(f"omega {result['omega']:g}")
            if "t_min" in result:
                parts.append(f"{result['t_min']:g} to {result['t_max']:g}")
            lines.setdefault(", ".join(parts), []).append((x, result[first]))
        return axis, lines
    return None, {}


def _sigma(result):
    text = result["weights"]
    return float(text.removeprefix("ema_sigma")) if text.startswith("ema_sigma") else None


# The file ---------------------------------------------------------------------------------------


def load(workdir):
    """Reads the results in WORKDIR/results.json, [] where there are none.

    Raises:
      ValueError: it is no list of results.
    """
    file = files.path(workdir) / layout.RESULTS
    if not file.exists():
        return []
    try:
        stored = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not readable ({error}); take it away") from error
    if not isinstance(stored, list):
        raise ValueError(f"{file}: not a list of results; take it away")
    return stored


def has_all(result, metrics):
    """Says whether a result has numbers of all `metrics`."""
    return all(any(evaluators.gives(metric, x) for x in numbers(result)) for metric in metrics)


def find(workdir, described, metrics):
    """Finds the result with these settings and all `metrics`, or None. All processes ask."""
    from utils import processes  # late: it brings jax, which readers of the file do not need

    matches = None
    if processes.is_writer():
        wanted = json.loads(json.dumps(described))
        matches = [r for r in load(workdir) if settings(r) == wanted and has_all(r, metrics)]
    return processes.from_writer(matches[-1] if matches else None)


def save(workdir, result):
    """Adds a result to WORKDIR/results.json; the file is never half-written.

    It takes the place of one with the same settings.
    """
    from utils import processes  # late, as in `find`

    if not processes.is_writer():
        return
    described = json.loads(json.dumps(settings(result)))
    file = files.path(workdir) / layout.RESULTS
    with files.alone(file.with_name(f".{file.name}.lock")):
        known = [old for old in load(workdir) if settings(old) != described]
        files.write_text(file, json.dumps([*known, result], indent=1) + "\n")
