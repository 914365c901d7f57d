"""What the lines of configs/default.py say, and that each says it of itself."""

from typing import Literal

import pytest

from configs import kinds, load_config
from configs.default import OPTIONS
from configs.option import Role, read


@pytest.mark.parametrize("path", OPTIONS)
def test_a_default_is_a_value_that_its_own_line_takes(path):
    option = OPTIONS[path]
    assert (option.default is None) == option.may_be_null
    if option.default is not None:
        assert type(option.default) is option.type
        assert option.fault(option.default) is None
    if option.type is tuple:
        assert option.element in (int, float, str)
        assert all(type(x) is option.element for x in option.default)


@pytest.mark.parametrize(
    "role, names",
    [
        (Role.PLACE, "dataset.condition_root dataset.name dataset.root dataset.vae"),
        (
            Role.PREFERENCE,
            "sampling.channels sampling.omega sampling.t_max sampling.t_min "
            "training.ema_half_life training.ema_val training.half_precision",
        ),
        (Role.FROM_RECORDS, "dataset.num_classes"),
        (Role.UNSIGNED, "sampling.seed training.seed"),
        (Role.UNTOLD, "dataset.root"),
    ],
)
def test_the_roles_that_the_reference_does_not_show(role, names):
    assert sorted(name for name in OPTIONS if role in OPTIONS[name].roles) == names.split()


def test_a_number_has_a_range():
    """But for those of networks and objectives, which know better."""
    numbers = {path for path, option in OPTIONS.items() if option.type in (int, float)}
    free = {path for path in numbers if not OPTIONS[path].rules}
    assert len(numbers) > 60 and all(path.startswith("method.") for path in free)
    assert not load_config.DROPPED.keys() & OPTIONS.keys()


def test_a_line_says_all_that_is_known_of_an_option():
    class Part:
        a: kinds.Decay = 0.5
        b: kinds.Free[kinds.Path | None] = None
        c: kinds.Preference[kinds.Times] = ()

    class Whole:
        part: kinds.Free[Part]
        kind: Literal["x", "y"] = "x"

    options = read(Whole)
    assert list(options) == ["part.a", "part.b", "part.c", "kind"]
    a, b, c, kind = options.values()
    assert (a.fault(0.0), a.fault(1.0), a.fault(-1.0), a.fault(1.5)) == (
        None, "must be below 1", "must lie in 0..1, got -1.0", "must lie in 0..1, got 1.5"
    )  # fmt: skip
    assert (b.type, b.may_be_null, b.default) == (str, True, None)
    assert b.roles == {Role.PATH, Role.MAY_CHANGE} and b.fault(None) is None
    assert (c.type, c.element) == (tuple, float) and c.fault(()) == "needs one or more times"
    assert c.roles == {Role.PREFERENCE, Role.MAY_CHANGE} and a.may_change
    assert kind.fault("z") == "is one of x | y, not 'z'" and not kind.may_change
    ranges = ["number, in 0..1, below 1", "path, null", "numbers, one or more", "x | y"]
    assert [option.range() for option in options.values()] == ranges
