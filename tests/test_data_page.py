"""The commands of docs/data.md for what people bring, on small files of the names that it uses."""

import re
import shlex

import numpy as np
import pytest
import test_caches as caches
import test_docs
import test_prepare_foreign as foreign
import test_prepare_tables as tables
from PIL import Image
from pyarrow import parquet

from scripts import prepare_dataset
from utils import dataset

COMMANDS = [
    command
    for page, command in test_docs.ALL
    if page == "docs/data.md"
    and re.search(
        r"prepare_dataset (arrays|latents|huggingface|webdataset|preview) --\w+ \w", command
    )
]


@pytest.fixture
def brought(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("flowers", "latents"):
        (tmp_path / name).mkdir()
    parquet.write_table(tables.table(), tmp_path / "flowers" / "train.parquet")
    foreign.pairs_of_npy(tmp_path / "latents")
    foreign.wds(tmp_path / "shards")
    caches.mar(tmp_path / "cache")


def test_there_is_one_for_each():
    assert len(COMMANDS) == len(set(COMMANDS)) == 5


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page(brought, command, capsys):
    words = shlex.split(command)[3:]
    folder = words[words.index("--root" if words[0] == "preview" else "--output") + 1]
    if words[0] == "preview":
        assert prepare_dataset.main(["digits", f"--output={folder}", "--preview=0"]) == 0
    assert prepare_dataset.main(words) == 0
    records = dataset.open_records(folder)
    assert records.num_records == {"preview": 1797, "latents": 20}.get(words[0], 12)
    assert np.asarray(Image.open(f"{folder}/preview.png")).std() > 10
    assert f"{folder}/preview.png" in capsys.readouterr().out.splitlines()[-1]
