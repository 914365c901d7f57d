"""Caches of latents as other projects leave them, by one command; what does not fit is told."""

import io
import json
import pickle
import tarfile
import zipfile

import h5py
import lmdb
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from torch_writer import write_zip

from scripts import prepare_dataset
from utils import dataset

N, C, SIDE = 20, 4, 6
RNG = np.random.default_rng(0)
MEAN = RNG.normal(0, 5.5, (N, C, SIDE, SIDE)).astype(np.float32)
STD = np.exp(RNG.normal(-3, 0.3, MEAN.shape)).astype(np.float32)
MIRRORED = MEAN + 1  # no mirror image of a latent is the latent of a mirror image
LABELS = np.arange(N) % 5
PAIRS, PAIRS_FLIP = (np.concatenate([mean, STD], 1) for mean in (MEAN, MIRRORED))
LOGS, LOGS_FLIP = (np.concatenate([mean, 2 * np.log(STD)], 1) for mean in (MEAN, MIRRORED))
CLASSES = [f"n{i:08d}" for i in LABELS]
BUNDLES = [f"{i // 10:05d}/img-mean-std-{i:08d}.npy" for i in range(N)]


def at(*parts):
    path = parts[0].joinpath(*parts[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def fast_dit(root):
    for i in range(N):
        np.save(at(root, "imagenet256_features", f"{i}.npy"), MEAN[i : i + 1] * 0.18215)
        np.save(at(root, "imagenet256_labels", f"{i}.npy"), LABELS[i : i + 1])


def repa(root):
    for i, name in enumerate(BUNDLES):
        image = name.replace("-mean-std-", "").replace(".npy", ".png")
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(at(root, "images", image))
        np.save(at(root, "vae-sd", name), PAIRS[i])
    rows = list(zip(BUNDLES, LABELS.tolist(), strict=True))
    (root / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": rows}))
    rows = [(n.replace("-mean-std-", "").replace(".npy", ".png"), y) for n, y in rows]
    (root / "images" / "dataset.json").write_text(json.dumps({"labels": rows}))


def edm2(root):
    with zipfile.ZipFile(at(root, "img512-sd.zip"), "w") as archive:
        for i, name in enumerate(BUNDLES):
            archive.writestr(name, npy(PAIRS[i]))
        rows = list(zip(BUNDLES, LABELS.tolist(), strict=True))
        archive.writestr("dataset.json", json.dumps({"labels": rows}))


def mar(root):
    for i, name in enumerate(CLASSES):
        path = at(root, name, f"{name}_{i}.JPEG.npz")
        np.savez(path, moments=LOGS[i], moments_flip=LOGS_FLIP[i])


def dc_ae(root):
    for i, name in enumerate(CLASSES):
        np.save(at(root, name, f"{name}_{i}.npy"), MEAN[i])


def drifting(root):
    for i, name in enumerate(CLASSES):
        content = {"moments": LOGS[i], "moments_flip": LOGS_FLIP[i]}
        write_zip(at(root, name, f"{name}_{i}.pt"), content)


def lightningdit(root):
    for shard in range(2):
        rows = slice(10 * shard, 10 * shard + 10)
        path = at(root, "imagenet_train_256", f"latents_rank00_shard{shard:03d}.safetensors")
        parts = {"latents": MEAN, "latents_flip": MIRRORED, "labels": LABELS}
        save_file({key: np.ascontiguousarray(value[rows]) for key, value in parts.items()}, path)
    stats = {"mean": MEAN.mean((0, 2, 3), keepdims=True), "std": MEAN.std((0, 2, 3), keepdims=True)}
    write_zip(root / "imagenet_train_256" / "latents_stats.pt", stats)


def zhuyu(root):

    with lmdb.open(str(at(root, "train_lmdb")), map_size=2**24) as env, env.begin(write=True) as to:
        for i in range(N):
            record = {"moments": LOGS[i], "moments_flip": LOGS_FLIP[i]}
            record |= {"label": int(LABELS[i]), "filename": f"{i}.JPEG"}
            to.put(str(i).encode(), pickle.dumps(record))
        to.put(b"num_samples", str(N).encode())


def soflow(root):

    with h5py.File(at(root, "imagenet.hdf5"), "w") as file:
        file["latents"], file["labels"] = PAIRS, LABELS
        file["amount"], file["latent_size"] = N, SIDE


def maskdit(root):
    for shard in range(2):
        with tarfile.open(at(root, f"{shard:05d}.tar"), "w") as archive:
            for i in range(10 * shard, 10 * shard + 10):
                parts = {"latent": pickle.dumps(PAIRS[i]), "cls": b"%d" % LABELS[i]}
                for ending, content in parts.items():
                    member = tarfile.TarInfo(f"{i:08d}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def published(root):
    for i in range(N):
        write_zip(at(root, "train", f"{i:08d}.pt"), {"image": PAIRS[i], "label": int(LABELS[i])})


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


SAMPLES, MIRRORS = (fast_dit, dc_ae, lightningdit), (mar, drifting, lightningdit, zhuyu)
SAID = {
    fast_dit: "fast-DiT's", repa: "EDM2's or REPA's", edm2: "EDM2's or REPA's", mar: "MAR's",
    dc_ae: "DC-AE's", drifting: "drifting's", lightningdit: "LightningDiT's", zhuyu: "zhuyu",
    soflow: "SoFlow's", maskdit: "MaskDiT's", published: "the published",
}  # fmt: skip


def prepare(source, output, *more, status=0):
    argv = ["latents", f"--input={source}", f"--output={output}", "--workers=2", "--preview=0"]
    assert prepare_dataset.main([*argv, *more]) == status


def refused(capsys, source, output, *more):
    prepare(source, output, *more, status=1)
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def read(output):
    records = dataset.open_records(output)
    return records.read(np.arange(records.num_records))


@pytest.mark.parametrize("write", SAID)
def test_a_cache_by_one_command(tmp_path, write, capsys):
    write(tmp_path / "in")
    prepare(tmp_path / "in", tmp_path / "out", "--records_per_shard=8")
    found, out = read(tmp_path / "out"), capsys.readouterr().out
    order = np.argsort(np.moveaxis(found["moments"], -1, 1)[:, 0, 0, 0])
    expected = np.argsort(MEAN[:, 0, 0, 0])  # the order is that of the names
    views = {"moments": MEAN} | ({"moments_flipped": MIRRORED} if write in MIRRORS else {})
    assert views.keys() == found.keys() - {"label"}
    for key, mean in views.items():
        moments = np.moveaxis(found[key], -1, 1)[order]
        std = 0 * STD if write in SAMPLES else STD
        np.testing.assert_allclose(moments[:, :C], mean[expected], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(moments[:, C:], std[expected], rtol=1e-5)
    np.testing.assert_array_equal(found["label"][order], LABELS[expected])
    assert SAID[write] in out and "5 classes" in out and "bytes needed" in out
    if write in (mar, dc_ae, drifting):
        names = (tmp_path / "out" / "label.labels.txt").read_text().split()
        assert names == sorted(set(CLASSES))
    if write is lightningdit:
        assert "latent_mean: [" in out.split("says, for the YAML")[1]
    again = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").iterdir())]
    prepare(tmp_path / "in", tmp_path / "out", "--records_per_shard=8")
    assert "complete already" in capsys.readouterr().out
    assert again == [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").iterdir())]


def test_latents_without_labels(tmp_path, capsys):
    for i in range(N):
        np.save(at(tmp_path, "flat", f"{i:03d}.npy"), PAIRS[i])
    prepare(tmp_path / "flat", tmp_path / "out")
    assert dataset.open_records(tmp_path / "out").num_classes == 0
    repa(tmp_path / "repa")
    (tmp_path / "repa" / "vae-sd" / "dataset.json").write_text('{"labels": null}')
    prepare(tmp_path / "repa" / "vae-sd", tmp_path / "none")
    np.testing.assert_allclose(read(tmp_path / "none")["moments"], np.moveaxis(PAIRS, 1, -1))
    (tmp_path / "repa" / "vae-sd" / "dataset.json").unlink()
    assert "bundles of EDM2" in refused(capsys, tmp_path / "repa", tmp_path / "x")
    (tmp_path / "flat").rename(at(tmp_path, "one", "flat"))
    assert "flat: --labels=folders, if it" in refused(capsys, tmp_path / "one", tmp_path / "x")


def test_mirrored_views_in_files_of_their_own(tmp_path, capsys):
    root = tmp_path / "in"
    for i, name in enumerate(CLASSES):
        np.save(at(root, name, f"{i}.npy"), MEAN[i])
        np.save(at(root, name, f"{i}_flip.npy"), MIRRORED[i])
    prepare(root, tmp_path / "out")
    found = read(tmp_path / "out")
    shift = (found["moments_flipped"] - found["moments"])[..., :C]
    np.testing.assert_allclose(shift, 1, rtol=1e-5)
    (root / CLASSES[3] / "3_flip.npy").unlink()
    assert f"{CLASSES[3]}/3.npy has no _flip" in refused(capsys, root, tmp_path / "x")
    (root / CLASSES[3] / "3.npy").rename(root / CLASSES[3] / "9_flip.npy")
    assert "9_flip.npy is of a mirrored image" in refused(capsys, root, tmp_path / "x")
    np.savez(at(tmp_path, "orphan", "a", "0.npz"), moments_flip=LOGS[0])
    np.savez(at(tmp_path, "orphan", "b", "1.npz"), moments_flip=LOGS[0])
    assert "0.npz: holds moments_flip" in refused(capsys, tmp_path / "orphan", tmp_path / "x")


def test_what_contradicts_the_numbers_is_asked_for(tmp_path, capsys):
    for i, name in enumerate(CLASSES):
        np.savez(at(tmp_path, "mar", name, f"{i}.npz"), moments=PAIRS[i])
        np.save(at(tmp_path, "dc", name, f"{i}.npy"), MEAN[i] * 0.18215)
    line = refused(capsys, tmp_path / "mar", tmp_path / "x")
    assert "known for mean and log variance" in line and "0% are negative" in line
    prepare(tmp_path / "mar", tmp_path / "out", "--content=moments")
    assert read(tmp_path / "out")["moments"][..., C:].min() > 0
    line = refused(capsys, tmp_path / "dc", tmp_path / "x")
    assert "deviation of 1.0" in line and "--scaled_by=0.18215 divides" in line
    prepare(tmp_path / "dc", tmp_path / "scaled", "--scaled_by=0.18215")
    assert 5 < read(tmp_path / "scaled")["moments"][..., :C].std() < 6


def test_rows_of_anyone(tmp_path, capsys):
    np.savez(at(tmp_path, "in", "a.npz"), moments=LOGS, moments_flip=LOGS_FLIP, labels=LABELS)
    prepare(tmp_path / "in", tmp_path / "out")
    found = np.moveaxis(read(tmp_path / "out")["moments_flipped"], -1, 1)
    np.testing.assert_allclose(found, PAIRS_FLIP, rtol=1e-4)
    assert "log variance (converted), both views" in capsys.readouterr().out


def test_other_autoencoders_get_no_hint_about_0_18215(tmp_path, capsys):
    latents = RNG.normal(0.5, 1, (10, 32, 4, 4)).astype(np.float32)
    (tmp_path / "in").mkdir()
    rows = {"latents": latents, "labels": np.arange(10) % 2}
    save_file(rows, tmp_path / "in" / "latents_rank00_shard000.safetensors")
    prepare(tmp_path / "in", tmp_path / "out")
    out = capsys.readouterr().out
    mean = ", ".join(f"{x:.6g}" for x in latents.astype(np.float64).mean((0, 2, 3)))
    assert f"latent_mean: [{mean}]" in out and "0.18215" not in out
    assert prepare_dataset.main(["preview", f"--root={tmp_path / 'out'}"]) == 0
    assert "divided by 1" in (out := capsys.readouterr().out) and "0.18215" not in out


def test_the_axis_of_the_channels_is_known_of_writers(tmp_path, capsys):
    """32 channels of 32 x 32, as DC-AE and VA-VAE have them, in small."""
    cubes = RNG.normal(0, 1, (N, 6, SIDE, SIDE)).astype(np.float32)
    for i, name in enumerate(CLASSES):
        np.save(at(tmp_path, "dc", name, f"{i}.npy"), cubes[i])
        np.save(at(tmp_path, "flat", f"{i:03d}.npy"), cubes[i])
    prepare(tmp_path / "dc", tmp_path / "out")
    order = sorted(range(N), key=lambda i: (CLASSES[i], f"{i}.npy"))
    found = np.moveaxis(read(tmp_path / "out")["moments"], -1, 1)[:, :6]
    np.testing.assert_array_equal(found, cubes[order])
    assert "--layout=nchw or nhwc" in refused(capsys, tmp_path / "flat", tmp_path / "x")


def cut(path):
    path.write_bytes(path.read_bytes()[:-300])


def test_damage_and_what_does_not_fit_is_told_by_name(tmp_path, capsys):
    """One line each."""

    def told(write, harm, *said):
        root = tmp_path / f"{write.__name__}{len(list(tmp_path.iterdir()))}"
        write(root)
        harm(root)
        line = refused(capsys, root, root.with_suffix(".out"))
        assert all(text in line for text in said), line

    shard = "imagenet_train_256/latents_rank00_shard001.safetensors"
    told(
        mar, lambda r: cut(r / CLASSES[7] / f"{CLASSES[7]}_7.JPEG.npz"), f"{CLASSES[7]}_7.JPEG.npz"
    )
    told(drifting, lambda r: cut(r / CLASSES[7] / f"{CLASSES[7]}_7.pt"), f"{CLASSES[7]}_7.pt")
    told(dc_ae, lambda r: cut(r / CLASSES[7] / f"{CLASSES[7]}_7.npy"), f"{CLASSES[7]}_7.npy", "cut")
    told(edm2, lambda r: cut(r / "img512-sd.zip"), "img512-sd.zip")
    told(lightningdit, lambda r: cut(r / shard), shard, "damaged")
    told(soflow, lambda r: (r / "imagenet.hdf5").write_bytes(b"x" * 99), "imagenet.hdf5")
    told(
        fast_dit, lambda r: (r / "imagenet256_labels" / "3.npy").unlink(), "labels/3.npy is expect"
    )
    told(repa, lambda r: (r / "vae-sd" / BUNDLES[3]).unlink(), f"/{BUNDLES[3]}, which is not")
    told(dc_ae, lambda r: np.save(r / CLASSES[3] / "z.npy", MEAN[0, :2]), "z.npy", "(6, 6, 4)")

    def twice(root):
        with zipfile.ZipFile(root / "img512-sd.zip", "a") as archive, pytest.warns(UserWarning):
            archive.writestr(BUNDLES[3], npy(PAIRS[3]))

    told(edm2, twice, f"{BUNDLES[3]} is there twice")

    def fewer_labels(root):
        tensors = {"latents": MEAN[:10], "labels": LABELS[:9]}
        save_file(tensors, root / shard)

    told(lightningdit, fewer_labels, shard, "labels (9,) do not fit")

    class Malicious:
        def __reduce__(self):
            return (print, ("run",))

    def malicious(root):

        with lmdb.open(str(root / "train_lmdb"), map_size=2**24) as env, env.begin(write=True) as t:
            t.put(b"7", pickle.dumps(Malicious()))

    told(zhuyu, malicious, "record 7", "refused, its pickle asks for builtins.print")

    def lacking(root):

        with lmdb.open(str(root / "train_lmdb"), map_size=2**24) as env, env.begin(write=True) as t:
            t.delete(b"7")

    told(zhuyu, lacking, "num_samples is 20, and 19 records are there")


def test_kinds_side_by_side_are_asked_for(tmp_path, capsys):
    mar(tmp_path / "in" / "mar")
    drifting(tmp_path / "in" / "drifting")
    assert "files of .npz and .pt: --input" in refused(capsys, tmp_path / "in", tmp_path / "x")
    (tmp_path / "empty").mkdir()
    assert "holds no latents; known are" in refused(capsys, tmp_path / "empty", tmp_path / "x")


def test_a_full_disk_is_known_before(tmp_path, capsys, monkeypatch):
    import shutil

    dc_ae(tmp_path / "in")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1000))
    line = refused(capsys, tmp_path / "in", tmp_path / "out")
    assert "24,320 bytes are needed for 20 records, 1,000 are free" in line
