"""Whatever people bring: it is read, or refused in one short line. Nothing else."""

import io
import itertools
import json
import math
import zipfile
import zlib

import msgpack
import numpy as np
import pytest
import yaml
from flax import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch_writer import write_zip

from configs import default, load_config, strict_yaml
from formats import published, torch_files
from metrics import reference
from scripts.prepare import images, labels, latents, moments, pt
from utils import pictures

BOUNDED = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
OPTIONS = sorted(load_config.options(default.get_config()))
LONGEST = 600


def one_line(function, *args):
    """What the function returns, or the line of its refusal; any other exception fails."""
    try:
        return function(*args)
    except (ValueError, OSError) as error:
        line = str(error)
        assert line and "\n" not in line and len(line) <= LONGEST, line[:1000]
        return line


# Options and YAML -------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-(2**33), 2**33), st.floats(), st.integers(10**399, 10**400), st.booleans()
)
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=5), st.none(), NUMBERS), inner, max_size=3),
    ),
    max_leaves=5,
)


def command_line(*words):
    return load_config.from_command_line(["--config=configs/load_config.py:digits", *words])


@BOUNDED
@given(st.sampled_from(OPTIONS), st.one_of(VALUES.map(str), st.text()))
def test_any_value_on_the_command_line(option, text):
    one_line(command_line, f"--config.{option}={text}")


@BOUNDED
@given(st.dictionaries(st.sampled_from([*default.get_config(), "other"]), VALUES), st.text())
def test_any_yaml(tmp_path, monkeypatch, values, text):
    monkeypatch.setattr(load_config, "FOLDER", tmp_path)
    for content in (yaml.safe_dump(values), text, f"training: {text}"):
        (tmp_path / "x.yml").write_text(content, encoding="utf-8", errors="surrogatepass")
        one_line(load_config.from_command_line, ["--config=configs/load_config.py:x"])


@pytest.mark.parametrize(
    "content, line",
    [
        ("~: 1", "unknown option None; the name of an option is text"),
        ("[" * 20000, "nested too deep"),
        ("training: {seed: \0}", "special characters"),
        (f"training: {{batch_size: {'1' * 400}}}", "batch_size is at most 2147483647"),
        (f"training: {{batch_size: {'1' * 5000}}}", "Exceeds the limit"),
        ("training: {batch_size: 010}", "expects a whole number, got '010'"),
        ("training: {num_steps: 2:8}", "expects a whole number, got '2:8'"),
        ("training: {seed: 4294967296}", "training.seed is at most 4294967295"),
        ("training: {num_steps: 2147483648}", "training.num_steps is at most 2147483647"),
        ("sampling: {num_steps: [1, 2147483648]}", "sampling.num_steps is at most"),
        ("training: {learning_rate: 1.0e+200}", "training.learning_rate is too large"),
        (
            "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
            + "\n".join(
                f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]" for a, b in itertools.pairwise("abcdefgh")
            ),
            "more than 10000 values",
        ),
        ("training: &t {seed: *t}", "more than 10000 values"),
        (f"training: {{seed: {'x' * 10**6}}}", "expects a whole number, got 'xxx"),
    ],
)  # fmt: skip
def test_numbers_and_shapes_that_cannot_be_meant(tmp_path, monkeypatch, content, line):
    monkeypatch.setattr(load_config, "FOLDER", tmp_path)
    (tmp_path / "x.yml").write_text(content)
    assert line in one_line(load_config.from_command_line, ["--config=configs/load_config.py:x"])


def test_yaml_reads_as_ever():
    text = "{a: 1, b: -2, c: 1_000, d: 0.5, e: .5, f: -1.5e-3, g: yes, h: null, i: &x [1], j: *x}"
    assert strict_yaml.parse(text) == yaml.safe_load(text)
    assert math.isinf(strict_yaml.parse(".inf")) and strict_yaml.parse("1e-4") == "1e-4"


# Statistics -------------------------------------------------------------------------------------

ARRAYS = st.builds(
    lambda dtype, shape: np.arange(math.prod(shape)).reshape(shape).astype(dtype),
    st.sampled_from(["float32", "float64", "int64", "complex64", "bool", "U3"]),
    st.lists(st.integers(0, 3), max_size=3),
)
NAMES = st.sampled_from(
    "mu sigma mu_s sigma_s ref_mu ref_sigma arr_0 resize split number images size".split()
)


def mutated(content, cuts):
    """Bytes with some of them changed, and cut."""
    content = bytearray(content)
    for place, value in cuts:
        content[place % len(content)] = value
    return bytes(content[: len(content) - cuts[0][0] % 7])


CUTS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6)


@BOUNDED
@given(st.dictionaries(NAMES, ARRAYS), CUTS)
def test_any_statistics(tmp_path, arrays, cuts):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    found = one_line(reference.load_reference, path)
    assert isinstance(found, dict) or str(path) in found
    path.write_bytes(mutated(path.read_bytes(), cuts))
    one_line(reference.load_reference, path)


@pytest.mark.parametrize(
    "change, line",
    [
        ({"sigma": -np.eye(3)}, "sigma is no covariance: its smallest eigenvalue is -1"),
        ({"sigma": np.diag([1.0, 1.0, -0.5])}, "sigma is no covariance"),
        ({"sigma": np.eye(3) + 0j}, "sigma holds complex128, not real numbers"),
        ({"mu": np.array(["a", "b", "c"])}, "mu holds <U1, not real numbers"),
        ({"number": np.array([1, 2])}, "number is int64 (2,), not int"),
    ],
)
def test_statistics_that_are_none(tmp_path, change, line):
    path = tmp_path / "x.npz"
    np.savez(path, **({"mu": np.zeros(3), "sigma": np.eye(3)} | change))
    found = one_line(reference.load_reference, path)
    assert line in found and str(path) in found


def test_a_bomb_of_statistics_is_not_inflated(tmp_path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("mu.npy", "w", force_zip64=True) as member:
            for _ in range(1100):
                member.write(bytes(2**20))
        archive.writestr("sigma.npy", b"")
    assert "mu.npy would take 1153433600 bytes" in one_line(reference.load_reference, path)


# Pictures ---------------------------------------------------------------------------------------


@BOUNDED
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM"]), CUTS)
def test_any_picture(tmp_path, kind, cuts):
    content = io.BytesIO()
    Image.new("RGB", (9, 7), (1, 2, 3)).save(content, kind)
    path = tmp_path / "x.png"
    path.write_bytes(mutated(content.getvalue(), cuts))
    image, _, problem, _ = images._decode(
        lambda name: (tmp_path / name, None), 4, pictures.read, (path.name, 0)
    )
    assert image.shape == (4, 4, 3) if problem is None else "\n" not in problem
    found = one_line(pictures.read, path)
    assert isinstance(found, Image.Image) or str(path) in found


def test_a_picture_too_large_to_be_one(tmp_path):
    path, size = tmp_path / "x.png", 30_000

    def chunk(kind, content):
        body = kind + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = size.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    assert "cannot read the image" in one_line(pictures.read, path)


# Latents and torch archives ---------------------------------------------------------------------

LABELS = st.one_of(st.none(), NUMBERS, st.text(max_size=3), st.lists(st.integers(), max_size=2))


@BOUNDED
@given(st.one_of(ARRAYS, st.none(), st.lists(st.integers(), max_size=2)), LABELS, CUTS)
def test_any_latent(tmp_path, image, label, cuts):
    path = tmp_path / "x.pt"
    if isinstance(label, int) and not -(2**31) <= label < 2**31:
        label = float(label) if abs(label) < 2**40 else "large"
    if isinstance(image, np.ndarray) and image.dtype.kind == "U":
        image = "text"
    write_zip(path, {"image": image, "label": label})
    found = one_line(pt.load, path)
    assert isinstance(found, tuple) or str(path) in found
    path.write_bytes(mutated(path.read_bytes(), cuts))
    one_line(pt.load, path)


def latent(label=1, **changes):
    mean, std = np.ones((4, 2, 2), np.float32), np.full((4, 2, 2), 0.1, np.float32)
    for name, value in changes.items():
        (mean if name == "mean" else std)[0, 0, 0] = value
    return {"image": np.concatenate([mean, std]), "label": label}


@pytest.mark.parametrize(
    "content, line",
    [
        (latent(mean=np.nan), "latents that are not finite"),
        (latent(std=np.inf), "latents that are not finite"),
        (latent(std=-9.0), "the standard deviations, has -9; are they logarithms of variances"),
        (latent(mean=1e5), "1e+05 is more than float16 can hold"),
        (latent(label=1.7), "'label' is 1.7, not a whole number"),
        (latent(label=None), "'label' is None, not a whole number"),
        (latent(label=[1]), "'label' is [1], not a whole number"),
        ({"image": np.ones((8, 2, 2), np.complex64), "label": 1}, "holds complex64"),
        (latent(label=10), "label 10; --num_classes is 10"),
    ],
)
def test_a_latent_that_is_none_is_refused_by_its_file(tmp_path, content, line):
    write_zip(tmp_path / "7.pt", content)
    spread = moments.Spread()

    def find(name):
        found = pt.load(tmp_path / name)
        moved = np.moveaxis(found.latent, 0, -1)
        label = labels.whole_number(tmp_path / name, found.label)
        return tmp_path / name, {"moments": moved}, label

    dtype = np.dtype("float16")
    read = latents.examples(find, (2, 2, 8), dtype, 10, 1, spread, ["7.pt"])
    found = one_line(list, read)
    assert line in found and str(tmp_path / "7.pt") in found


def test_latents_that_are_scaled_already_are_told(capsys):
    latents = np.random.default_rng(0).standard_normal((50, 4, 4, 8))
    for scale, said in ((1 / 0.18215, "about 1 is right)\n"), (1.0, "scaled already?"),
                        (20.0, "another autoencoder?")):  # fmt: skip
        spread = moments.Spread()
        spread.add(latents * scale)
        spread.report()
        assert said in capsys.readouterr().out


def test_a_bomb_is_not_inflated(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as member:
            for _ in range(200):
                member.write(bytes(2**20))
    assert "would inflate to 209715200" in one_line(torch_files.load, path)


@pytest.mark.parametrize("step", [-1, 2**31, 1.5, "ten", [1, 2], None, float("nan")])
def test_a_forged_step_is_refused(golden, tmp_path, step):
    def pack(state):  # flax's own writer sorts, and so knows no forged keys
        return msgpack.packb(state, default=serialization._msgpack_ext_pack, strict_types=True)

    (file,) = (golden / "released_checkpoint" / "msgpack").iterdir()
    state = serialization.msgpack_restore(file.read_bytes())
    path = tmp_path / "checkpoint_1"
    path.write_bytes(pack(state | {"step": step}))
    assert "number" in one_line(published.load, path)
    for forged in ({1: 2}, {"params": {"net": "text"}}, {"params": 3}, {"opt_state": 7}):
        path.write_bytes(pack(state | forged))
        found = one_line(published.load, path)
        assert str(path) in found, json.dumps(str(found)[:200])
