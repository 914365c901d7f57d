"""metrics/inception_weights.py: every format, strictness, finding and keeping the file."""

import json
import pickle
import struct

import jax
import numpy as np
import pytest
from inception_writer import FORMATS, random_weights, write_pth
from safetensors.numpy import save_file

from formats import weight_files
from metrics import inception, inception_weights

TOLERANCE = {"pool": 1.5e-4, "logits": 5e-4, "spatial": 1.5e-4}


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "inception"


@pytest.fixture(scope="module")
def maker(folder):
    return random_weights(folder)


@pytest.fixture(scope="module")
def weights(maker, folder):
    expected = json.loads((folder / "expected.json").read_text())
    found = maker.random_weights(expected["weight_seed"])
    assert maker.digest(found) == expected["weights_sha256"]
    return found


@pytest.fixture(scope="module")
def params(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    write_pth(path, weights)
    return inception_weights.read(path)


@pytest.fixture(scope="module")
def extract():
    return jax.jit(inception.features, static_argnames="resize")


@pytest.fixture(autouse=True)
def no_weights_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parity
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_golden_features(name, tmp_path, folder, weights, extract):
    FORMATS[name](tmp_path / name, weights)
    params = inception_weights.read(tmp_path / name)
    probe = np.load(folder / "probe.npz")
    size = min((k.split("/")[1] for k in probe.files), key=int)
    found = extract(params, probe[f"images/{size}"], resize="tf1")
    for output, tolerance in TOLERANCE.items():
        np.testing.assert_allclose(found[output], probe[f"tf1/{size}/{output}"], atol=tolerance)


def test_the_digest_is_that_of_the_weights_not_of_the_file(tmp_path, weights, params):
    digests = set()
    for name in ("legacy.pth", "inception_v3_weights_fid.pickle"):
        FORMATS[name](tmp_path / name, weights)
        digests.add(weight_files.digest(inception_weights.read(tmp_path / name)))
    assert digests == {weight_files.digest(params)} and len(digests.pop()) == 64
    other = params | {"fc": {"kernel": params["fc"]["kernel"], "bias": params["fc"]["bias"] + 1}}
    assert weight_files.digest(other) != weight_files.digest(params)


# --------------------------------------------------------------------------- strictness, errors


def test_every_array_must_be_there_once_in_its_shape(tmp_path, weights):
    faulty = dict(weights)
    del faulty["Mixed_5b.branch1x1.bn.bias"]
    faulty["AuxLogits.fc.weight"] = np.zeros((2, 2), np.float32)
    faulty["fc.weight"] = np.zeros((1000, 2048), np.float32)
    write_pth(tmp_path / "a.pth", faulty)
    with pytest.raises(ValueError) as caught:
        inception_weights.read(tmp_path / "a.pth")
    for part in (
        "a.pth: not the weights of the FID network",
        "missing: Mixed_5b.branch1x1.bn.bias",
        "left over: AuxLogits.fc.weight",
        "of another shape: fc.weight (1000, 2048) instead of (1008, 2048)",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    infinite = weights | {"fc.bias": np.full(1008, np.inf, np.float32)}
    write_pth(tmp_path / "b.pth", infinite)
    with pytest.raises(ValueError, match=r"b\.pth: fc\.bias has values that are not finite"):
        inception_weights.read(tmp_path / "b.pth")


def test_damaged_and_foreign_files_give_one_line(tmp_path, weights):
    for name in ("weights.pth", "legacy.pth"):
        FORMATS[name](tmp_path / name, weights)
        (tmp_path / f"cut {name}").write_bytes((tmp_path / name).read_bytes()[:-100])
    (tmp_path / "text").write_text("hello, this is no weight file")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "short.safetensors").write_bytes(struct.pack("<Q", 50) + b"{")
    (tmp_path / "number.pkl").write_bytes(pickle.dumps(3))
    (tmp_path / "graph.pb").write_bytes(b"\n\x2d\n\x05Sub/y\x12\x05Const")
    names = ["cut weights.pth", "cut legacy.pth", "text", "empty", "short.safetensors"]
    for name in (*names, "number.pkl", "graph.pb"):
        with pytest.raises(ValueError, match=f"{name}: ") as caught:
            inception_weights.read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_pickle_that_carries_code_is_refused_with_advice(tmp_path):
    content = b"\x80\x03ctorch_utils.persistence\n_reconstruct_persistent_obj\n}\x85R."
    (tmp_path / "inception-2015-12-05.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="refused, .*torch_utils.persistence.* use pt_inception"):
        inception_weights.read(tmp_path / "inception-2015-12-05.pkl")


# ------------------------------------------------------------------------------ finding, keeping


def test_weights_are_found(tmp_path, monkeypatch, weights, params):
    cache = tmp_path / "cache" / "meanflow"
    with pytest.raises(FileNotFoundError) as caught:
        inception_weights.load()
    for part in (inception_weights.PTH_NAME, inception_weights.PTH_SHA256, str(cache)):
        assert part in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="fid.inception_weights: no such file: .*none"):
        inception_weights.load(tmp_path / "none.pth")

    source = tmp_path / "weights.pth"
    write_pth(source, weights)
    monkeypatch.setenv("INCEPTION_WEIGHTS", str(source))
    digests = [weight_files.digest(inception_weights.load(path)) for path in (None, source)]
    monkeypatch.delenv("INCEPTION_WEIGHTS")
    cache.mkdir(parents=True)
    source.rename(cache / inception_weights.PTH_NAME)
    digests.append(weight_files.digest(inception_weights.load()))
    assert {*digests} == {weight_files.digest(params)}


def test_folded_weights_of_earlier_versions_are_read(tmp_path, params):
    save_file(weight_files.flatten(params), tmp_path / "inception-0123.safetensors")
    found = inception_weights.load(tmp_path / "inception-0123.safetensors")
    assert weight_files.digest(found) == weight_files.digest(params)
