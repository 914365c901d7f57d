"""The words in which default.py tells the kind of an option: types with a range, and roles.

`Free[Count]` is a number above 0 that may change within a run. Beside these stand Python's own:
`bool`, `int`, `float`, `str`, `Literal["a", "b"]`, `tuple[float, ...]`, and `T | None` where null
stands for nothing given.
"""

import re
from typing import Annotated, TypeVar

from configs.option import Role, Rule, above, below, each, least, sides, within

T = TypeVar("T")
MOST_STEPS = 10**6  # of a sampler

# Roles, around a type or a whole section.
Free = Annotated[T, Role.MAY_CHANGE]
Place = Annotated[T, Role.MAY_CHANGE, Role.PLACE]
Preference = Annotated[T, Role.PREFERENCE]

# Texts.
Path = Annotated[
    str,
    Role.PATH,
    Rule(
        lambda x: x is None or x.startswith("gs://") or not re.match(r"[A-Za-z][\w+.-]+:/", x),
        "names a place that cannot be read and written here, of addresses gs://BUCKET/... alone "
        "can: {value}",
    ),
]
Records = Annotated[Place[Path], Role.UNTOLD]

# Numbers.
Count = Annotated[int, above(0)]
Whole = Annotated[int, least(0)]
Size = Annotated[int, Role.SIDES, sides(1)]
SizeOrNone = Annotated[int, Role.SIDES, sides(0)]
Seed = Annotated[Whole, Role.UNSIGNED]
Positive = Annotated[float, above(0)]
NotNegative = Annotated[float, least(0)]
Share = Annotated[float, within(0, 1)]
Decay = Annotated[Share, below(1)]
Samples = Annotated[int, least(2, "a covariance needs at least 2 samples")]
Classes = Annotated[
    int, least(-1, "must not be negative, got {value} (-1: as the records say)"), Role.FROM_RECORDS
]

# Lists.
Texts = tuple[str, ...]
Ints = tuple[int, ...]
Floats = tuple[float, ...]
Steps = Annotated[Ints, each(1, MOST_STEPS, f"are numbers from 1 to {MOST_STEPS}, got {{value}}")]
SomeSteps = Annotated[
    Ints,
    each(
        1,
        MOST_STEPS,
        f"needs one or more numbers of at least 1, at most {MOST_STEPS}, got {{value}}",
        some=True,
    ),
]
Times = Annotated[Floats, Rule(bool, "needs one or more times", "one or more")]
Decays = Annotated[
    Floats,
    each(0, 1, "needs one or more different decays in 0..1, got {value}", differ=True),
]
Halves = Annotated[
    Floats,
    each(1e-3, 1e9, "are thousands of images, above 0 and different, got {value}", differ=True),
]
Span = Annotated[
    Ints,
    Rule(
        lambda x: not x or (len(x) == 2 and 2 <= x[0] <= x[1]),
        "is (first, last) with 1 < first <= last, or empty, got {value}",
        "first and last",
    ),
]
