"""Reads the config of a run: default.py <- NAME.yml <- command line.

`--config=configs/load_config.py:NAME --config.section.option=value ...`, or `--config=FILE.yml` for
a file anywhere, such as the `config.yml` of a run. YAML files and the command line obey the same
rules: an option that `default.py` does not name, or a value of another type, is refused by name.
Until all is read, the options are a dict {"section.option": value}.
"""

import contextlib
import difflib
import math
import os
import re
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

from configs import checks, default, strict_yaml
from configs.default import OPTIONS
from configs.option import EXPECTED, OF_RECORDS, Role
from configs.strict_yaml import shown

FOLDER = Path(__file__).resolve().parent
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
NAMES = {path.split(".")[0] for path in OPTIONS}  # that may stand at the left of a file
SECTIONS = NAMES - OPTIONS.keys()

# Options of the published code that mean nothing here: (values accepted, why it is dropped).
DROPPED = {
    "dataset.pin_memory": (None, "JAX has no pinned host memory to ask for"),
    "dataset.cache": (None, "the records stay in the operating system's page cache"),
    "sampling.num_classes": (None, "it is dataset.num_classes"),
    "sampling.schedule": (("default",), "only the default schedule exists"),
    "training.ema_type": (("const",), "only constant decays exist"),
}


def get_config(name=None):
    """Returns `default.py` overridden by `configs/NAME.yml`, paths expanded, as a ConfigDict.

    This is what ml_collections' `DEFINE_config_file` calls. Raises ValueError with one line.
    """
    return _config(_expand_paths(_from_file(name)))


def from_command_line(argv):
    """Reads `--config=...` and all `--config.section.option=value` of a command line.

    Returns (config, rest): a checked, locked ConfigDict, and argv without what was read here.
    Raises ValueError with one line that names the option and, if unknown, the nearest one.
    """
    name, overrides, rest = _split(argv)
    values = _from_file(name)
    for path, text in overrides:
        try:
            _set_from_text(values, path, text)
        except ValueError as error:
            raise ValueError(f"command line: {error}") from None
    return make(_expand_paths(values)), rest


def make(values):
    """Makes a checked, locked ConfigDict of {"section.option": value}; others keep their defaults.

    Raises:
      ValueError: values of the right types that cannot be meant, in one line.
    """
    config = _config(values)
    checks.validate(config)
    return config.lock()


def _config(values):
    config = default.get_config()
    config.update_from_flattened_dict(values)
    return config


def given(argv):
    """Says where options are set: {"section.option": "configs/NAME.yml" or "command line"}."""
    name, overrides, _ = _split(argv)
    places = {}
    for section, values in _read(name).items():
        paths = [f"{section}.{key}" for key in values] if isinstance(values, dict) else [section]
        places |= dict.fromkeys(paths, _where(name))
    return places | {path: "command line" for path, _ in overrides}


def source(argv):
    """Returns the file that a command line names: "configs/NAME.yml", or a path as it was given."""
    return _where(_split(argv)[0])


def text(config):
    """Writes a config as a YAML file: all of it, and it loads again as the very same values."""
    return strict_yaml.dump(config.to_dict())


def options(config, prefix=""):
    """Returns {"section.option": value} of all options of a ConfigDict."""
    flat = {}
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            flat.update(options(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def written(value):
    """Writes the value of an option as it stands on the command line."""
    if isinstance(value, tuple | list):
        return ",".join(map(written, value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


# YAML files ------------------------------------------------------------------------------------


def _from_file(name):
    values, nested = {}, _read(name)
    try:
        _merge(values, nested)
    except ValueError as error:
        raise ValueError(f"{_where(name)}: {error}") from None
    return values


def _where(name):
    """Names the file of a config in a line; a `Path` is a file that is none of this folder."""
    return str(name) if isinstance(name, Path) else f"configs/{name}.yml"


def _file(name):
    if isinstance(name, Path):
        return name
    names = sorted(path.stem for path in FOLDER.glob("*.yml"))
    if name not in names:
        there = f"there are: {', '.join(['default', *names])}"
        if not name:
            raise ValueError(f"name a config: --config=configs/load_config.py:NAME; {there}")
        raise ValueError(f"no config '{shown(name)}'{_nearest(name, names)} ({there})")
    return FOLDER / f"{name}.yml"


def _read(name):
    """Reads the nested values of a YAML file."""
    if name == "default":
        return {}
    file, where = _file(name), _where(name)
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: cannot be read: {error}") from None
    try:
        values = strict_yaml.parse(content)
    except ValueError as error:
        space = " " if str(error).startswith("line ") else ": "
        raise ValueError(f"{where}{space}{error}") from None
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{where}: expected 'section:' and options below it")
    return values or {}


def _merge(values, nested, prefix=""):
    """Adds the `nested` values of a YAML file, or those of one of its sections, to `values`."""
    for key, value in nested.items():
        if not isinstance(key, str):
            raise ValueError(f"unknown option {prefix}{shown(key)}; the name of an option is text")
        path = f"{prefix}{key}"
        if path in SECTIONS:
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{path} is a section of options, not an option")
            _merge(values, value or {}, f"{path}.")
        elif isinstance(value, dict) and not prefix and path not in NAMES:
            raise ValueError(f"unknown section {shown(path)}{_nearest(path, NAMES)}")
        elif not _is_dropped(path, value):
            _set(values, path, value)


# Command line ----------------------------------------------------------------------------------


def _split(argv):
    """Returns (NAME or the Path of a file, [(option path, text), ...], the other arguments)."""
    name, overrides, rest = None, [], []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            return name, overrides, rest + [word] + words
        match = re.fullmatch(r"--?(no)?config(?:\.([^=]*))?(?:=(.*))?", word, re.DOTALL)
        if not match:
            rest.append(word)
            continue
        negated, path, text = match.groups()
        if text is None and not negated and words and not words[0].startswith("--"):
            text = words.pop(0)  # --config.option value
        if path is None:
            file, _, name = (text or "").partition(":")
            if Path(text or "").suffix in (".yml", ".yaml") and Path(file).name != "load_config.py":
                name = Path(os.path.expanduser(text))
            elif Path(file).name != "load_config.py" or negated:
                raise ValueError(
                    f"{word}: expected --config=configs/load_config.py:NAME or --config=FILE.yml"
                )
        elif negated:
            overrides.append((path, "false"))
        else:
            overrides.append((path, "true" if text is None else text))
    return name, overrides, rest


def _set_from_text(values, path, text):
    """Sets an option from the command line: `text` as it would stand in a YAML file."""
    if _is_dropped(path, text):
        return
    option = _option(path)
    if option.type is str and not (option.may_be_null and text in ("", "null", "None")):
        value = text  # as it is: a folder may be named 42
    elif option.type is tuple or (Role.SIDES in option.roles and "," in text):
        # 2 or 1,2 or (1, 2) or [1, 2]
        words = text.strip().removesuffix(",").strip("()[] ").removesuffix(",")
        value = [_scalar(path, word) for word in words.split(",")] if words else []
    else:
        value = _scalar(path, text)
    _set(values, path, value)


def _scalar(path, text):
    try:
        return strict_yaml.parse(text)
    except ValueError:
        raise ValueError(f"{path}: cannot read the value '{shown(text)}'") from None


# Values ----------------------------------------------------------------------------------------


def _is_dropped(path, value):
    """Says whether `path` is an option of the published code without a meaning here."""
    if path not in DROPPED:
        return False
    accepted, reason = DROPPED[path]
    if accepted is None:
        logging.warning("%s is not used: %s", path, reason)
    elif value not in accepted:
        raise ValueError(
            f"{path} can only be {' or '.join(accepted)}, not {shown(repr(value))}: {reason}"
        )
    return True


def _option(path):
    """Looks an option up; raises ValueError where there is no such option."""
    if path in SECTIONS:
        raise ValueError(f"{path} is a section of options, not an option")
    if path not in OPTIONS:
        same_name = [known for known in OPTIONS if known.split(".")[-1] == path.split(".")[-1]]
        raise ValueError(f"unknown option {shown(path)}{_nearest(path, OPTIONS, same_name)}")
    return OPTIONS[path]


def _set(values, path, value):
    option = _option(path)
    if value is None and Role.FROM_RECORDS in option.roles:
        values[path] = OF_RECORDS
    elif value is None and option.may_be_null:
        values[path] = None
    elif value is None and option.type is tuple and option.default:
        raise ValueError(f"{path} expects a list, got null")
    elif Role.SIDES in option.roles and isinstance(value, list | tuple):
        height, *width = (_convert(f"{path}[{i}]", x, int) for i, x in enumerate(value)) or [0]
        values[path] = height if [height] == width else (height, *width)
    elif option.type is tuple:
        items = value if isinstance(value, list) else [] if value is None else [value]
        values[path] = tuple(
            _convert(f"{path}[{i}]", item, option.element) for i, item in enumerate(items)
        )
    else:
        values[path] = _convert(path, value, option.type)


def _convert(path, value, kind):
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML takes 1e-4, without a point, for text
    if type(value) is not kind:
        got = "null" if value is None else shown(repr(value) if type(value) is str else value)
        raise ValueError(f"{path} expects {EXPECTED[kind]}, got {got}")
    if kind is str and CONTROL.search(value):
        raise ValueError(f"{path} holds control characters: {shown(repr(value))}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{path} expects a finite number, got {value}")
    return value


def _nearest(word, known, preferred=()):
    if len(word) > 100:
        return ""
    close = difflib.get_close_matches(word, preferred, n=1, cutoff=0)
    close = close or difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _expand_paths(values):
    """Expands variables and ~ in all paths, and names the dataset's folder; returns all options."""
    values = {path: option.default for path, option in OPTIONS.items()} | values
    root = values["dataset.root"]
    if not root:
        root = f"$DATA_ROOT/{values['dataset.name']}"
    elif "DATA_ROOT" in os.environ:
        root = root.replace(checks.DATA_PLACEHOLDER, "$DATA_ROOT")
    values["dataset.root"] = root
    variables = {**os.environ, "DATA_ROOT": os.environ.get("DATA_ROOT") or "data"}

    def variable(match):
        name = match.group(1).strip("{}")
        if name not in variables:
            raise ValueError(f"{path}: the environment variable {name} is not set")
        return variables[name]

    for path, option in OPTIONS.items():
        if Role.PATH in option.roles and values[path]:
            expanded = re.sub(r"\$(\w+|\{\w+\})", variable, values[path])
            values[path] = os.path.expanduser(expanded)
    return values
