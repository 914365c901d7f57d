"""Reads YAML as options are written in it: numbers are what they look like; nothing explodes."""

import math
import re
import reprlib

import yaml

MOST_VALUES = 10_000  # in a text; every option many times over
LONGEST = 100  # characters of a value in a line for people
_SHORT = reprlib.Repr()


class Loader(yaml.SafeLoader):
    """The safe loader, stricter: numbers are what they look like, and a key stands once.

    YAML 1.1 takes 010 for 8 and 2:8 for 128; here both are text, which no number may be. Anchors
    may be used, but not to say more than MOST_VALUES values with few words.
    """

    yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if not tag.endswith((":int", ":float"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_data(self):
        node = self.get_single_node()
        if node is None:
            return None
        _check_size(node, {})
        return self.construct_document(node)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:  # the value of a list as key is no string
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value}' stands twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9_]*)\.[0-9_]*)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|nan)$",
               re.IGNORECASE),
    list("-+0123456789."),
)  # fmt: skip


def _check_size(node, sizes):
    """Counts the values below a node, those of aliases each time; refuses too many."""
    if sizes.setdefault(id(node)) is not None:
        return sizes[id(node)]
    parts = node.value if isinstance(node, yaml.CollectionNode) else ()
    sizes[id(node)] = MOST_VALUES + 1  # of one that holds itself
    size = 1
    for part in parts:
        size += sum(_check_size(x, sizes) for x in (part if isinstance(part, tuple) else (part,)))
        if size > MOST_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"more than {MOST_VALUES} values", node.start_mark
            )
    sizes[id(node)] = size
    return size


def parse(text):
    """Reads a text as YAML, by the rules of `Loader`. Raises ValueError with one short line."""
    try:
        return yaml.load(text, Loader)  # a subclass of the safe loader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or getattr(error, "reason", None)
        raise ValueError(
            f"{f'line {mark.line + 1}: ' if mark else ''}{shown(reason or str(error))}"
        ) from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    except (ValueError, TypeError, OverflowError, LookupError, AttributeError) as error:
        # a number or a date that cannot be one, a key that is a list
        raise ValueError(shown(str(error))) from None


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads as the same: lists in a line, text that looks like more quoted."""

    yaml_implicit_resolvers = {
        first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])
        + Loader.yaml_implicit_resolvers.get(first, [])
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *Loader.yaml_implicit_resolvers}
    }


Dumper.add_representer(
    tuple,
    lambda dumper, x: dumper.represent_sequence("tag:yaml.org,2002:seq", x, flow_style=True),
)


def dump(values):
    """Writes nested dicts of plain values and tuples as YAML, in their order: `parse` inverted."""
    return yaml.dump(
        values, Dumper=Dumper, default_flow_style=False, sort_keys=False, allow_unicode=True,
        indent=4, width=math.inf,
    )  # fmt: skip


def shown(value):
    """Writes a value in a line for people, however long it is."""
    text = " ".join((value if isinstance(value, str) else _SHORT.repr(value)).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
