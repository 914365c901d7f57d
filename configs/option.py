"""What a line of default.py says of an option: its type, its range and its roles.

    batch_size: Free[Count] = 256  # images per step, over all devices of all hosts

A type is `bool`, `int`, `float`, `str`, `Literal["a", "b"]`, `tuple[T, ...]`, or `T | None` where
null stands for nothing given. `Annotated` adds rules and roles to it.
"""

import inspect
import types
import typing
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, Literal, NamedTuple, Union

import ml_collections
from ml_collections import config_dict

EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list",
}
OF_RECORDS = -1  # the value of an option that stands for what the records say
LARGEST_FLOAT = 3e38  # devices count and compute in 32 bits


class Role(Enum):
    """What is known of an option beside its values."""

    MAY_CHANGE = "a run goes on with another value; without this role it would be another run"
    PATH = "a file or folder: $VARIABLES and ~ are expanded"
    PLACE = "a place on a machine: comes with a run's weights where nothing sets it"
    PREFERENCE = "comes with a run's weights unless the command line sets it"
    FROM_RECORDS = "null or -1 stands for what the records say"
    UNSIGNED = "takes 32 bits, other whole numbers 31 and a sign"
    SIDES = "one number, or two: height and width"
    UNTOLD = "is not told among the options of a job that are not the default"


class Rule(NamedTuple):
    """Which values of an option are meant."""

    holds: Callable[[Any], bool]
    line: str  # what an error says behind the option's name, with {value}
    range: str = ""  # the same in the reference


def above(low):
    """Makes the rule that a number is larger than `low`."""
    return Rule(lambda x: x > low, f"must be above {low}, got {{value}}", f"above {low}")


def least(low, line="must not be negative, got {value}"):
    """Makes the rule that a number is `low` or more."""
    return Rule(lambda x: x >= low, line, f"at least {low}")


def below(high):
    """Makes the rule that a number is smaller than `high`."""
    return Rule(lambda x: x < high, f"must be below {high}", f"below {high}")


def within(low, high):
    """Makes the rule that a number lies in an interval with its ends."""
    line = f"must lie in {low}..{high}, got {{value}}"
    return Rule(lambda x: low <= x <= high, line, f"in {low}..{high}")


def each(low, high, line, some=False, differ=False):
    """Makes the rule that all elements of a list lie in an interval.

    Args:
      low, high: the ends, which belong to it.
      line: see `Rule`.
      some: whether there has to be one.
      differ: whether no two may be equal.
    """

    def holds(values):
        right = all(low <= x <= high for x in values) and (values or not some)
        return right and not (differ and len(set(values)) < len(values))

    words = ["one or more"] * some + ["different"] * differ + [f"in {low}..{high}"]
    return Rule(holds, line, ", ".join(words))


def sides(low):
    """Makes the rule of an option that is one number of `low` or more, or height and width."""

    def holds(x):
        return (len(x) == 2 and min(x) > 0) if isinstance(x, tuple) else x >= low

    line = f"must be {low} or more, or height and width, got {{value}}"
    return Rule(holds, line, f"at least {low}, or height and width")


def _one_of(choices):
    words = " | ".join(choices)
    return Rule(lambda x: x in choices, f"is one of {words}, not {{value!r}}", words)


class Option(NamedTuple):
    """All that is known of one option."""

    type: type  # bool, int, float, str or tuple
    element: type | None  # of the elements of a tuple
    may_be_null: bool
    default: Any
    rules: tuple[Rule, ...]
    roles: frozenset[Role]

    @property
    def may_change(self):
        """Tells whether a run goes on with another value."""
        return Role.MAY_CHANGE in self.roles

    def fault(self, value):
        """Says why a value of the right type cannot be meant; None where it can."""
        whole = self.type is not tuple  # a list is judged by its elements first
        checks = (self._broken, self._oversized) if whole else (self._oversized, self._broken)
        return next(filter(None, (check(value) for check in checks)), None)

    def _broken(self, value):
        for rule in self.rules:
            if value is not None and not rule.holds(value):
                return rule.line.format(value=list(value) if isinstance(value, tuple) else value)

    def _oversized(self, value):
        largest = 2**32 - 1 if Role.UNSIGNED in self.roles else 2**31 - 1
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, int) and abs(x) > largest:
                return f"is at most {largest}, got {x}"
            if isinstance(x, float) and abs(x) > LARGEST_FLOAT:
                return f"is too large: {x}"

    def range(self):
        """Describes the values that an option may have, for the reference."""
        kind = "path" if Role.PATH in self.roles else EXPECTED[self.type].removeprefix("a ")
        if self.type is tuple:
            kind = {int: "whole numbers", float: "numbers", str: "words"}[self.element]
        ranges = [rule.range for rule in self.rules if rule.range]
        if self.type is not str or not ranges:
            ranges.insert(0, kind)
        return ", ".join(ranges + ["null"] * self.may_be_null)


def read(schema, prefix="", roles=()):
    """Reads a class of options: {"section.option": `Option`}.

    Args:
      schema: a class whose annotated names are options, with their defaults, or without one a
        section: a class of the same kind, whose roles all of its options have.
    """
    options = {}
    for name, annotation in inspect.get_annotations(schema).items():
        kind, element, may_be_null, marks = _parts(annotation)
        if hasattr(schema, name):
            rules = tuple(mark for mark in marks if isinstance(mark, Rule))
            of_option = frozenset([*roles, *(mark for mark in marks if isinstance(mark, Role))])
            default = getattr(schema, name)
            options[prefix + name] = Option(kind, element, may_be_null, default, rules, of_option)
        else:
            options |= read(kind, f"{prefix}{name}.", marks)
    return options


def _parts(annotation):
    """Takes an annotation apart: (type, type of its elements, may be null, rules and roles)."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        kind, element, may_be_null, marks = _parts(args[0])
        return kind, element, may_be_null, [*marks, *args[1:]]
    if origin in (Union, types.UnionType):
        (one,) = (arg for arg in args if arg is not type(None))
        kind, element, _, marks = _parts(one)
        return kind, element, True, marks
    if origin is Literal:
        return str, None, False, [_one_of(args)]
    if origin is tuple:
        return tuple, args[0], False, []
    return annotation, None, False, []


def config(options):
    """Makes a `ConfigDict` of {"section.option": `Option`} with all defaults."""
    made = ml_collections.ConfigDict()
    for path, option in options.items():
        section, _, key = path.rpartition(".")
        if section and section not in made:
            made[section] = ml_collections.ConfigDict()
        value = option.default
        if value is None:
            value = config_dict.placeholder(option.type)
        elif Role.SIDES in option.roles:
            value = config_dict.FieldReference(value, field_type=object)
        (made[section] if section else made)[key] = value
    return made
