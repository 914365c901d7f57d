"""The worked examples: their records, and the numbers that they are judged by."""

import importlib

import numpy as np
import pytest

from metrics import examples as judges
from scripts import prepare_dataset
from scripts.prepare import examples
from utils import dataset

TS = """#Days of electricity demand
@problemName ItalyPowerDemand
@classLabel true 1 2
@data
0.5,-1.25,2:1
1.5,0.25,-3:2
"""


def test_digits_and_what_they_are_drawn_by():
    """Each condition is of its own digit; the splits share none."""
    tables = examples.digits_pairs()
    assert [len(table["label"]) for table in tables.values()] == [1437, 360]
    for table in tables.values():
        image = table["image"].astype(float)
        np.testing.assert_array_equal(table["upper"][:, :4], table["image"][:, :4])
        assert not table["upper"][:, 4:].any()
        np.testing.assert_allclose(
            table["low"][:, ::2, ::2], image.reshape(-1, 4, 2, 4, 2, 1).mean(axis=(2, 4)), atol=0.5
        )
        spelled = [
            "".join(examples.LETTERS[i] for i in tokens[mask].argmax(axis=1))
            for tokens, mask in zip(table["word"], table["word_mask"], strict=True)
        ]
        assert not table["word"][~table["word_mask"]].any()
        names = [{words.split()[y] for words in examples.WORDS} for y in range(10)]
        assert all(word in names[y] for word, y in zip(spelled, table["label"], strict=True))
        assert len({*spelled}) > 40


def test_no_name_stands_for_two_digits():
    meant = {}
    for words in examples.WORDS:
        for digit, word in enumerate(words.split()):
            assert meant.setdefault(word, digit) == digit
    assert len(meant) > 40


def test_signals_come_from_a_package_that_is_not_imported(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "aeon" / examples.SIGNALS
    folder.mkdir(parents=True)
    (tmp_path / "aeon" / "__init__.py").write_text("raise ImportError('numba')")
    for split in ("TEST", "TRAIN"):
        (folder / f"ItalyPowerDemand_{split}.ts").write_text(TS)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    argv = ["signals", f"--output={tmp_path / 'records'}", "--preview=0"]
    assert prepare_dataset.main(argv) == 0
    records = dataset.open_records(tmp_path / "records")
    batch = records.read(np.arange(4))
    np.testing.assert_array_equal(batch["values"][1, 0, :, 0], np.float32([1.5, 0.25, -3]))
    assert batch["label"].tolist() == [0, 1, 0, 1] and records.num_classes == 2
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert prepare_dataset.main([argv[0], f"--output={tmp_path / 'other'}"]) == 1
    assert "pip install --no-deps aeon" in capsys.readouterr().err


def test_digits_are_read():
    table = examples.digits_pairs()["val"]
    given = {"label": table["label"]}
    assert judges.read_as_class(table["image"], given, None) > 0.97
    assert judges.read_as_class(np.roll(table["image"], 1, axis=0), given, None) < 0.3
    with pytest.raises(KeyError):
        judges.read_as_class(table["image"], {}, None)
