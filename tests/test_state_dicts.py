"""State dicts of PyTorch in all the wrappings that people have: read, or refused by name."""

import jax
import make
import ml_dtypes
import numpy as np
import pytest
import torch_writer
from torch_writer import Raw, Strided, reference, write_zip

from formats import sit, state_dicts, torch_files
from metrics import dinov2_weights, inception_weights
from models import dit
from utils import trees


@pytest.fixture(scope="module")
def state():
    """A DiT under the names of SiT."""
    module = dit.DiT(depth=2, hidden_size=16, num_heads=2, patch_size=2, num_classes=3)
    arrays = trees.flatten(make.params(module, (4, 4, 1)))
    return sit.state_of(arrays, {"h": 0.0}, dit.position_embedding(16, 2, 2))


def renamed(state, prefix):
    return {f"{prefix}{name}": array for name, array in state.items()}


def averaged(state):
    """As an average of torch.optim.swa_utils keeps it."""
    return renamed(state, "module.") | {"n_averaged": np.array(7)}


OTHER = {"opt": {"state": {0: {"exp_avg": np.ones(3, np.float32)}}}, "step": 7, "args": None}
WRAPPINGS = {
    "bare": lambda state: state,
    "module": lambda state: renamed(state, "module."),
    "_orig_mod": lambda state: renamed(state, "_orig_mod."),
    "both": lambda state: renamed(state, "_orig_mod.module."),
    "both, turned": lambda state: renamed(state, "module._orig_mod."),
    "ema": lambda state: {"ema": state} | OTHER,
    "state_dict": lambda state: {"state_dict": state} | OTHER,
    "model": lambda state: {"model": renamed(state, "module.")} | OTHER,
    "ema and model": lambda state: {"model": {"a": np.ones(1, np.float32)}, "ema": state} | OTHER,
    "twice": lambda state: {"state_dict": {"ema_model": averaged(state)}},
    "blocks compiled singly": lambda state: {
        name.replace(".attn.", "._orig_mod.attn."): array for name, array in state.items()
    },
    "a copy": lambda state: state | {"_metadata": {"": {"version": 1}}},
}
WRAPPED = pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)


@WRAPPED
def test_every_wrapping_begins_a_run(tmp_path, state, wrap):
    write_zip(tmp_path / "bare.pt", state)
    write_zip(tmp_path / "a.pt", wrap(state))
    expected = sit.load(tmp_path / "bare.pt", "ema", "sit")
    start = sit.load(tmp_path / "a.pt", "ema", "sit")
    jax.tree.map(np.testing.assert_array_equal, start.arrays, expected.arrays)


@WRAPPED
def test_every_wrapping_is_read_for_metrics(tmp_path, monkeypatch, state, wrap):
    counters = {"bn.num_batches_tracked": np.array(3)}
    write_zip(tmp_path / "a.pth", wrap(state | counters))
    monkeypatch.setattr(inception_weights, "_assemble", lambda path, arrays, names: arrays)
    assert inception_weights.read(tmp_path / "a.pth").keys() == state.keys()
    monkeypatch.setattr(dinov2_weights, "convert", lambda arrays, path: arrays)
    assert dinov2_weights.read(tmp_path / "a.pth").keys() == {*state, *counters}


def test_the_network_is_taken_where_it_is_asked_for(tmp_path, state):
    other = {name: array + 1 for name, array in state.items()}
    content = {"ema": state, "model": other}
    for average, expected, entry in ((True, state, "ema"), (False, other, "model")):
        arrays, name = state_dicts.find(content, "a.pt", average)
        assert name == entry
        np.testing.assert_array_equal(arrays["pos_embed"], expected["pos_embed"])
    write_zip(tmp_path / "a.pt", {"model": state})
    assert sit.load(tmp_path / "a.pt", "ema", "sit").entry == "model"


@pytest.mark.parametrize(
    "content, line",
    [
        ({}, "holds nothing, not weights by name"),
        ([1], "holds a list, not weights by name"),
        ({"ema": {"ema": 3}}, "a.pt: ema: holds ema, and nothing of the names"),
        ({"opt": {"a": 1}, "step": 7}, "holds opt, step, and nothing of the names by which an av"),
        (
            {"a": np.ones(2), "module.a": np.ones(2)},
            "a is there twice, as module.a too",
        ),
        ({"a": np.ones(2, np.int8)}, "whole numbers in the place of weights: .*a of int8"),
        ({"a": np.ones(2, np.uint16)}, "whole numbers in the place of weights: .*a of uint16"),
        (
            {f"parameter.number.{i}.weight": {} for i in range(900)},
            "holds parameter.number.0.weight, .* and 89[0-9] more, and nothing",
        ),
    ],
)
def test_what_is_none_is_refused_in_a_line(content, line):
    with pytest.raises(
        ValueError, match=f"a.pt: .*{line}" if "ema: " not in line else line
    ) as error:
        state_dicts.find(content, "a.pt")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_foreign_network_is_refused_in_a_short_line(tmp_path, state):
    write_zip(tmp_path / "a.pt", renamed(state, "backbone.transformer."))
    with pytest.raises(ValueError, match="a.pt: not the weights of a SiT, REPA or DiT"):
        sit.load(tmp_path / "a.pt", "ema", "sit")
    more = {f"decoder.of.some.other.network.blocks.{i}.weight": np.ones(1) for i in range(90)}
    write_zip(tmp_path / "a.pt", state | more)
    with pytest.raises(ValueError, match="left over: decoder.* and 8[0-9] more") as error:
        sit.load(tmp_path / "a.pt", "ema", "sit")
    assert len(str(error.value)) < 400
    write_zip(tmp_path / "a.pt", {k: v for k, v in state.items() if k != "pos_embed"})
    with pytest.raises(ValueError, match="no pos_embed of 3 axes"):
        sit.load(tmp_path / "a.pt", "ema", "sit")


# Types and storages that torch files have beside the usual ones ---------------------------------


class Written(torch_writer._Writer):
    """Writes types that have no storage of their own as torch does: bytes, and a type beside."""

    def tensor(self, data, offset, shape, strides):
        if data.dtype.name in torch_writer.STORAGES:
            return super().tensor(data, offset, shape, strides)
        key = str(len(self.storages))
        self.storages.append(data.view(np.uint8))
        kind = Raw(reference("torch.storage", "UntypedStorage"))
        storage = Raw(self.tuple(["storage", kind, key, "cpu", data.nbytes]) + b"Q")
        hooks = Raw(reference("collections", "OrderedDict") + b")R")
        dtype = Raw(reference("torch", data.dtype.name))
        arguments = [storage, offset, shape, tuple(strides), False, hooks, dtype]
        return reference("torch._utils", "_rebuild_tensor_v3") + self.tuple(arguments) + b"R"


@pytest.mark.parametrize(
    "dtype",
    ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
     "float8_e5m2fnuz", "float8_e8m0fnu"],
)  # fmt: skip
def test_types_without_a_storage(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(torch_writer, "_Writer", Written)
    array = np.array([[1, 2, 4], [8, 16, 32]]).astype(getattr(ml_dtypes, dtype, dtype))
    write_zip(tmp_path / "a.pt", {"x": array, "window": Strided(array.ravel(), 1, (2,), (3,))})
    content = torch_files.load(tmp_path / "a.pt")
    assert content["x"].dtype == array.dtype
    np.testing.assert_array_equal(content["x"].astype(np.float32), array.astype(np.float32))
    np.testing.assert_array_equal(content["window"].astype(np.float32), [2, 16])
    if dtype.startswith("float"):
        state_dicts.find(content, "a.pt")
    else:
        with pytest.raises(ValueError, match=f"window of {dtype}, x of {dtype}"):
            state_dicts.find(content, "a.pt")


def test_a_type_that_is_not_known_is_refused_by_name(tmp_path):
    kind = Raw(reference("torch", "quint8"))
    write_zip(tmp_path / "a.pt", {"x": kind})
    with pytest.raises(ValueError, match="a.pt: refused, its pickle asks for torch.quint8"):
        torch_files.load(tmp_path / "a.pt")


def test_a_few_numbers_of_a_large_storage(tmp_path):
    storage = np.arange(2**20, dtype=np.float32)
    write_zip(tmp_path / "a.pt", {"x": Strided(storage, 1000, (2, 4), (4, 1))})
    array = torch_files.load(tmp_path / "a.pt")["x"]
    np.testing.assert_array_equal(array, np.arange(1000, 1008).reshape(2, 4))
    assert array.base is None or array.base.nbytes < 1000  # the rest of it is free again


def test_attributes_of_a_state_dict_are_no_weights(tmp_path):
    """torch pickles `_metadata` as an attribute of the ordered dictionary."""
    entry = torch_writer._Writer(False).value({"": {"version": 1}})
    state = torch_writer._Writer(False).value({"a": 1.0})
    attributes = b"}X\x09\x00\x00\x00_metadata" + entry + b"sb"
    write_zip(tmp_path / "a.pt", {"model": Raw(state + attributes)})
    assert torch_files.load(tmp_path / "a.pt") == {"model": {"a": 1.0}}
