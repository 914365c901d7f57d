"""formats/torch_files.py against files made by hand, and latents that torch itself wrote."""

import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from torch_writer import MAGIC, Parameter, Raw, Strided, reference, write_legacy, write_zip

from formats import torch_files

WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy])
DTYPES = "float64 float32 float16 int64 int32 int16 int8 uint8 bool complex64 complex128".split()


def numbers(dtype, n=24):
    return (
        np.arange(n) % 2 if dtype == "bool" else np.arange(n) - n // 2 * (dtype != "uint8")
    ).astype(dtype)


@WRITERS
@pytest.mark.parametrize("dtype", [*DTYPES, ml_dtypes.bfloat16])
def test_every_dtype(tmp_path, write, dtype):
    array = numbers(dtype).reshape(2, 3, 4)
    write(tmp_path / "a.pt", {"x": array})
    read = torch_files.load(tmp_path / "a.pt")["x"]
    assert read.dtype == array.dtype and read.shape == array.shape
    np.testing.assert_array_equal(read, array)


@WRITERS
def test_nested_values(tmp_path, write):
    value = {"a": [1, 2.5, "text", None, True], "b": {"c": (-7, 2**40)}, "n": numbers("int64")}
    write(
        tmp_path / "a.pt",
        value | {"p": Parameter(numbers("float32")), "s": np.array(3, np.float32)},
    )
    read = torch_files.load(tmp_path / "a.pt")
    assert read["a"] == value["a"] and read["b"] == value["b"] and type(read) is dict
    np.testing.assert_array_equal(read["n"], value["n"])
    np.testing.assert_array_equal(read["p"], numbers("float32"))
    assert read["s"].shape == () and read["s"] == 3


@WRITERS
def test_strides(tmp_path, write):
    data = numbers("float32")
    cases = {
        "transposed": Strided(data, 0, (4, 6), (1, 4)),
        "window": Strided(data, 5, (2, 3), (8, 2)),
        "expanded": Strided(data, 3, (2, 2), (0, 1)),
        "empty": Strided(data, 0, (0, 5), (5, 1)),
    }
    write(tmp_path / "a.pt", cases)
    read = torch_files.load(tmp_path / "a.pt")
    np.testing.assert_array_equal(read["transposed"], data.reshape(6, 4).T)
    np.testing.assert_array_equal(read["window"], data[[[5, 7, 9], [13, 15, 17]]])
    np.testing.assert_array_equal(read["expanded"], data[[[3, 4], [3, 4]]])
    assert read["empty"].shape == (0, 5)


@WRITERS
@pytest.mark.parametrize(
    "fault",
    [
        Strided(numbers("float32"), 0, (5, 5), (5, 1)),
        Strided(numbers("float32"), 24, (1,), (1,)),
        Strided(numbers("float32"), -1, (2,), (1,)),
        Strided(numbers("float32"), 23, (2,), (-1,)),
        Strided(numbers("float32"), 0, (2, 2), (1,)),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, write, fault):
    write(tmp_path / "a.pt", [fault])
    with pytest.raises(ValueError, match="a.pt: damaged"):
        torch_files.load(tmp_path / "a.pt")


class Evil:
    """Pickles as a call of os.system, in the ways that a pickle can."""

    def __init__(self, path):
        self.command = f"touch {path}"

    def __reduce__(self):
        import os

        return os.system, (self.command,)


@WRITERS
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_file_is_refused_by_name_and_runs_nothing(tmp_path, write, protocol):
    call = pickle.dumps(Evil(tmp_path / "ran"), protocol)
    start = {0: 0, 2: 2, 4: 11}[protocol]  # without PROTO and FRAME
    write(tmp_path / "evil.pt", {"x": numbers("float32"), "e": Raw(call[start:-1])})
    with pytest.raises(ValueError, match=r"evil\.pt: refused, .* (posix|nt)\.system") as caught:
        torch_files.load(tmp_path / "evil.pt")
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "module, name",
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch._utils", "_rebuild_wrapper_subclass"),
        ("torch", "load"),
        ("formats.pickles", "_Function"),
        ("numpy", "load"),
        ("__torch__", "Layer"),  # of TorchScript
    ],
)
def test_every_other_global_is_refused(tmp_path, module, name):
    write_zip(tmp_path / "a.pt", [Raw(reference(module, name))])
    with pytest.raises(ValueError, match=f"a.pt: refused, its pickle asks for {module}.{name}"):
        torch_files.load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "target",
    [
        reference("torch._utils", "_rebuild_tensor_v2"),
        reference("torch", "FloatStorage"),
        reference("collections", "OrderedDict"),
        reference("numpy", "dtype"),
    ],
)
def test_a_pickle_cannot_write_into_the_reader(tmp_path, target):
    attributes = b"}(X\x04\x00\x00\x00callK\x01u"
    for state in (attributes, b"N" + attributes + b"\x86"):  # as __dict__ and as slots
        write_zip(tmp_path / "a.pt", [Raw(target + state + b"b")])
        with pytest.raises(ValueError, match="a.pt: damaged"):
            torch_files.load(tmp_path / "a.pt")
    write_zip(tmp_path / "b.pt", [numbers("float32")])
    np.testing.assert_array_equal(torch_files.load(tmp_path / "b.pt")[0], numbers("float32"))


@WRITERS
def test_a_truncated_file_is_named_wherever_it_ends(tmp_path, write):
    write(tmp_path / "a.pt", {"x": numbers("float32"), "y": [numbers("int64")]})
    whole = (tmp_path / "a.pt").read_bytes()
    for size in range(0, len(whole), 7):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.pt: ") as caught:
            torch_files.load(tmp_path / "cut.pt")
        assert "\n" not in str(caught.value)


def test_a_damaged_byte_gives_one_line_if_it_is_noticed(tmp_path):
    rng = np.random.default_rng(0)
    for write in (write_zip, write_legacy):
        write(tmp_path / "a.pt", {"x": numbers("float32"), "y": {"a": [numbers("int64")]}})
        whole = np.frombuffer((tmp_path / "a.pt").read_bytes(), np.uint8)
        for _ in range(300):
            damaged = whole.copy()
            damaged[rng.integers(len(whole))] = rng.integers(256)
            (tmp_path / "bad.pt").write_bytes(damaged.tobytes())
            try:
                torch_files.load(tmp_path / "bad.pt")
            except ValueError as error:
                assert str(error).startswith(f"{tmp_path / 'bad.pt'}: ") and "\n" not in str(error)


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such file"):
        torch_files.load(tmp_path / "none.pt")
    for name, content in (("text.pt", b"hello"), ("empty.pt", b""), ("int.pt", pickle.dumps(3))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: not a torch file"):
            torch_files.load(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(ValueError, match="is no torch file"):
        torch_files.load(tmp_path / "other.zip")
    (tmp_path / "new.pt").write_bytes(pickle.dumps(MAGIC) + pickle.dumps(1002))
    with pytest.raises(ValueError, match="unknown version"):
        torch_files.load(tmp_path / "new.pt")


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_plain_pickles_of_numpy(tmp_path, protocol):
    value = {
        "c": numbers("float32").reshape(4, 6),
        "fortran": np.asfortranarray(numbers("float64").reshape(4, 6)),
        "big": numbers("int32").astype(">i4"),
        "scalar": np.float64(2.5),
        "list": [np.int8(3), "a", {"b": (1, None)}],
    }
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(value, protocol))
    read = torch_files.load_pickle(tmp_path / "a.pickle")
    for name in ("c", "fortran", "big"):
        np.testing.assert_array_equal(read[name], value[name])
    assert read["scalar"] == 2.5 and read["list"] == value["list"]


def test_a_plain_pickle_is_refused_by_name_too(tmp_path):
    (tmp_path / "evil.pickle").write_bytes(pickle.dumps({"e": Evil(tmp_path / "ran")}))
    with pytest.raises(ValueError, match=r"evil\.pickle: refused, .*system"):
        torch_files.load_pickle(tmp_path / "evil.pickle")
    (tmp_path / "object.pickle").write_bytes(pickle.dumps(np.array([{}, []], dtype=object)))
    with pytest.raises(ValueError, match="object.pickle: damaged"):
        torch_files.load_pickle(tmp_path / "object.pickle")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parity
def test_latents_that_torch_wrote(golden):
    expected = np.load(golden / "latents_pt" / "expected.npz")
    files = sorted((golden / "latents_pt" / "train").glob("*.pt"))
    assert len(files) == len(expected["labels"])
    for file, moments, label in zip(files, expected["moments"], expected["labels"], strict=True):
        record = torch_files.load(file)
        np.testing.assert_array_equal(record["image"].transpose(1, 2, 0), moments)
        assert record["label"] == label
