"""Small real sets for the worked examples of docs/conditions.md -> records.

`digits_pairs`: the digits of scikit-learn with what they may be drawn by: `upper`, the upper half
of the image; `low`, its means over 2 x 2 pixels, four of each; `word`, the name of the digit in one
of six languages by chance, letter by letter. Every fifth is in the split val.

`signals`: 1,096 days of 24 hourly values of Italy's electrical power demand, each of mean 0 and
deviation 1, from October to March (class 0) or from April to September (1): ItalyPowerDemand of
the UCR archive (Keogh et al., "Intelligent Icons", ICDM 2006), which the package aeon ships.
"""

import importlib.util
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from scripts.prepare import values

WORDS = (
    "zero one two three four five six seven eight nine",
    "null eins zwei drei vier fünf sechs sieben acht neun",
    "zéro un deux trois quatre cinq six sept huit neuf",
    "cero uno dos tres cuatro cinco seis siete ocho nueve",
    "zero uno due tre quattro cinque sei sette otto nove",
    "nul een twee drie vier vijf zes zeven acht negen",
)  # in English, German, French, Spanish, Italian and Dutch
LETTERS = sorted({*"".join(WORDS)} - {" "})
LONGEST = max(len(word) for words in WORDS for word in words.split())
SIGNALS = "datasets/data/ItalyPowerDemand"  # in the folder of aeon


def run(args):
    """Runs `prepare_dataset digits_pairs` and `signals`; returns whether it is done."""
    args.key = args.label_key = args.num_classes = args.conditions = None
    args.splits, args.layout, args.store = (), "nhwc", "float32"
    args.input = args.command
    pairs = args.command == "digits_pairs"
    tables = digits_pairs() if pairs else {"train": italy_power_demand()}
    return values.write(args, tables, args.command)


def digits_pairs():
    """Makes {split: {name: (N, ...)}} of the digits and their conditions."""
    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]  # (N, 8, 8, 1)
    upper, low = images.copy(), images.reshape(-1, 4, 2, 4, 2, 1).mean(axis=(2, 4))
    upper[:, 4:] = 0
    languages = np.random.default_rng(0).integers(len(WORDS), size=len(images))
    named = [WORDS[i].split()[y] for i, y in zip(languages, digits.target, strict=True)]
    columns = {
        "image": images,
        "label": digits.target,
        "upper": upper,
        "low": np.round(low).astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2),
        "word": np.stack([letters(word) for word in named]),
        "word_mask": np.array([[i < len(word) for i in range(LONGEST)] for word in named]),
    }
    val = np.arange(len(images)) % 5 == 0
    parts = {"train": ~val, "val": val}
    return {split: {k: v[rows] for k, v in columns.items()} for split, rows in parts.items()}


def letters(word):
    """Returns the letters of a word as tokens, uint8 (LONGEST, LETTERS), each a single 1."""
    tokens = np.zeros((LONGEST, len(LETTERS)), np.uint8)
    tokens[range(len(word)), [LETTERS.index(letter) for letter in word]] = 1
    return tokens


def italy_power_demand():
    """Reads the series of aeon's files: {"values": (1096, 24) float32, "label": (1096,)}.

    The package is not imported, so that nothing is needed that it needs.
    """
    package = importlib.util.find_spec("aeon")
    if package is None:
        raise ValueError("signals are read from the package aeon: pip install --no-deps aeon")
    rows = []
    for path in sorted(Path(package.origin).parent.joinpath(SIGNALS).glob("*.ts")):
        lines = path.read_text(encoding="utf-8").partition("@data\n")[2].splitlines()
        rows += [line.replace(":", ",").split(",") for line in lines if line]
    rows = np.array(rows, np.float32)
    return {"values": rows[:, :-1], "label": rows[:, -1].astype(np.int64) - 1}
