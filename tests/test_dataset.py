"""The record format and its iterator."""

import json
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds

from benchmarks import __main__ as measure
from utils import dataset
from utils.iterator import RecordIterator, shuffled_indices

SHAPE = (4, 4, 8)


def make(root, lengths=(5, 3, 4), dtype=np.float32, flipped=False, key="moments", shape=SHAPE):
    """Writes a dataset whose record k holds known values and the label k mod 1000."""
    root.mkdir()
    start = 0
    for i, length in enumerate(lengths):
        examples = [example(k, dtype, flipped, key, shape) for k in range(start, start + length)]
        dataset.write_shard(dataset.shard_path(root, "train", i, len(lengths)), examples)
        start += length
    dataset.write_metadata(root, key, shape, dtype, 1000, {"train": lengths}, flipped)
    return root


def example(k, dtype=np.float32, flipped=False, key="moments", shape=SHAPE):
    values = (np.arange(np.prod(shape)).reshape(shape) + k).astype(dtype)
    return {key: values, "label": k % 1000} | ({"moments_flipped": -values} if flipped else {})


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """12 records in 3 shards."""
    return dataset.open_records(make(tmp_path_factory.mktemp("data") / "set"))


# The format


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip_of_moments(tmp_path, dtype):
    records = dataset.open_records(make(tmp_path / "set", dtype=dtype, flipped=True))
    assert (records.key, records.shape, records.dtype) == ("moments", SHAPE, np.dtype(dtype))
    assert (records.num_records, records.num_classes, records.has_flipped) == (12, 1000, True)
    batch = records.read(np.array([7, 0, 11, 7]))
    for row, k in enumerate([7, 0, 11, 7]):
        for key, value in example(k, dtype, flipped=True).items():
            np.testing.assert_array_equal(batch[key][row], value)
    assert "moments_flipped" not in records.read(np.array([1]), flipped=False)


def test_round_trip_of_images_and_large_labels(tmp_path):
    root = make(tmp_path / "set", (200,), np.uint8, key="image", shape=(2, 3, 1))
    records = dataset.open_records(root)
    batch = records.read(np.arange(200))
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["label"], np.arange(200))  # one and two bytes in protobuf
    np.testing.assert_array_equal(batch["image"][:, 0, 2, 0], np.arange(200) + 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tfds_reads_it_without_tensorflow(tmp_path, dtype):
    root = make(tmp_path / "set", dtype=dtype)
    source = tfds.builder_from_directory(root).as_data_source(split="train")
    assert len(source) == 12 and "tensorflow" not in sys.modules
    for k in (0, 6, 11):
        np.testing.assert_array_equal(source[k]["moments"], example(k, dtype)["moments"])
        assert source[k]["moments"].dtype == dtype and source[k]["label"] == k


def test_reads_what_tfds_serialises(tmp_path):
    # Another writer may order the features otherwise: nothing may rest on our own layout.
    root = make(tmp_path / "set")
    features = tfds.builder_from_directory(root).info.features
    serialised = features.serialize_example(example(3))
    read = dataset.open_records(root)
    batch = {"moments": np.empty((1, *SHAPE), np.float32), "label": np.empty(1, np.int32)}
    read._parse(serialised, 0, batch)
    np.testing.assert_array_equal(batch["moments"][0], example(3)["moments"])
    assert batch["label"][0] == 3


def test_a_shard_appears_only_when_complete(tmp_path):
    path = dataset.shard_path(tmp_path, "train", 0, 1)

    def examples():
        yield example(0)
        assert not path.exists()
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        dataset.write_shard(path, examples())
    assert list(tmp_path.iterdir()) == []


# What is wrong is said by name


def test_missing_and_foreign_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: the folder does not exist"):
        dataset.open_records(tmp_path / "nowhere")
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="no dataset_info.json"):
        dataset.open_records(tmp_path)
    (tmp_path / "train" / "0.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"\.pt files; .*prepare_dataset pt --input"):
        dataset.open_records(tmp_path)
    dataset.write_shard(dataset.shard_path(tmp_path, "train", 0, 2), [example(0)])
    with pytest.raises(FileNotFoundError, match="not finished"):
        dataset.open_records(tmp_path)
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="not a dataset of this project") as error:
        dataset.open_records(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_missing_split(records):
    with pytest.raises(ValueError, match="no split 'val', only: train"):
        dataset.open_records(records.root, "val")


@pytest.mark.parametrize("how", ["cut", "cut by a byte", "empty", "missing", "fewer records"])
def test_damaged_shard_is_named_when_opened(tmp_path, how):
    root = make(tmp_path / "set", lengths=(40, 60, 50), shape=(16, 16, 8))
    path = dataset.shard_path(root, "train", 1, 3)
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "fewer records":
        dataset.write_shard(path, [example(k, shape=(16, 16, 8)) for k in range(59)])
    else:
        stop = {"cut": len(content) // 2, "cut by a byte": len(content) - 1, "empty": 0}[how]
        path.write_bytes(content[:stop])
    with pytest.raises((ValueError, FileNotFoundError), match=path.name) as error:
        dataset.open_records(root)
    assert len(str(error.value).splitlines()) == 1


def test_other_shape_than_the_metadata_says(tmp_path):
    root = make(tmp_path / "set")
    features = json.loads((root / "features.json").read_text())
    tensor = features["featuresDict"]["features"]["moments"]["tensor"]
    tensor["shape"]["dimensions"] = ["4", "8", "8"]
    (root / "features.json").write_text(json.dumps(features))
    with pytest.raises(ValueError, match="00000-of-00003"):
        dataset.open_records(root)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_found_while_reading_reaches_the_caller(tmp_path, num_workers):
    root = make(tmp_path / "set", lengths=(40, 60, 50), shape=(16, 16, 8))
    path = dataset.shard_path(root, "train", 1, 3)
    content = bytearray(path.read_bytes())
    for start in range(70_000, len(content) // 2, 5_000):  # the index at the end stays whole
        content[start : start + 100] = bytes(100)
    path.write_bytes(content)
    iterator = RecordIterator(dataset.open_records(root), 10, seed=0, num_workers=num_workers)
    caught = []

    def run():
        try:
            take(iterator, 15)
        except ValueError as error:
            caught.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "hangs"
    assert path.name in str(caught[0]) and len(str(caught[0]).splitlines()) == 1
    for _ in range(20):  # no batch is passed over after it
        with pytest.raises(ValueError, match=path.name):
            next(iterator)


# Iteration


@pytest.mark.parametrize("batch_size", [1, 4, 5, 12, 30])
def test_every_record_once_per_epoch(records, batch_size):
    iterator = RecordIterator(records, batch_size, seed=1)
    labels = np.concatenate([b["label"] for b in take(iterator, -(-60 // batch_size))])[:60]
    epochs = labels.reshape(5, 12)
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_images_keep_their_labels(records):
    for batch in take(RecordIterator(records, 5, seed=0), 6):
        for row, label in enumerate(batch["label"]):
            np.testing.assert_array_equal(batch["moments"][row], example(label)["moments"])


def test_order_depends_on_the_seed_alone(records):
    first = take(RecordIterator(records, 5, seed=3, num_workers=0), 9)
    assert_same(first, take(RecordIterator(records, 5, seed=3, num_workers=3), 9))
    other = take(RecordIterator(records, 5, seed=4), 9)
    assert [tuple(b["label"]) for b in first] != [tuple(b["label"]) for b in other]
    # Neither is the next epoch of one seed an epoch of another.
    orders = {
        tuple(shuffled_indices(12 * epoch, 12 * epoch + 12, 12, seed))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_order_is_well_mixed():
    order = shuffled_indices(0, 5000, 5000, seed=0)
    assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    later = shuffled_indices(5000, 10000, 5000, seed=0)
    assert abs(np.corrcoef(order, later)[0, 1]) < 0.05


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_batches_of_one(records, count):
    whole = take(RecordIterator(records, 6, seed=2), 7)
    parts = [take(RecordIterator(records, 6, 2, p, count), 7) for p in range(count)]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)
    assert len(parts[0][0]["label"]) == 6 // count


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_place_is_that_of_the_whole_run(records, count):
    for p in range(count):
        iterator = RecordIterator(records, 6, 2, p, count, num_workers=2, prefetch=4)
        take(iterator, 5)
        assert iterator.get_state() == {"position": 30, "seed": 2, "num_records": 12}


def test_batch_not_divisible_over_processes(records):
    with pytest.raises(ValueError, match="batch_size 5 is not divisible by 2 processes"):
        RecordIterator(records, 5, 0, 0, 2)


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 1000])
def test_resumes_anywhere(records, steps):
    iterator = RecordIterator(records, 5, seed=7, num_workers=2, prefetch=3)
    take(iterator, steps)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 8)
    again = RecordIterator(records, 5, seed=7)
    take(again, 2)
    again.set_state(state)
    assert_same(take(again, 8), expected)


def test_resumes_under_other_process_counts_and_batch_sizes(records):
    iterator = RecordIterator(records, 6, seed=7)
    take(iterator, 3)
    state = iterator.get_state()
    expected = take(iterator, 4)
    for p in range(3):
        part = RecordIterator(records, 6, 7, p, 3)
        part.set_state(state)
        rows = slice(2 * p, 2 * p + 2)
        assert_same(take(part, 4), [{k: v[rows] for k, v in b.items()} for b in expected])
    larger = RecordIterator(records, 12, seed=7)
    larger.set_state(state)
    labels = np.concatenate([b["label"] for b in take(larger, 2)])
    np.testing.assert_array_equal(labels, np.concatenate([b["label"] for b in expected]))


def test_a_place_in_other_data_is_refused(records):
    iterator = RecordIterator(records, 6, seed=7)
    for name, value in (("seed", 8), ("num_records", 13)):
        with pytest.raises(ValueError, match=f"{name} {value}, here it is"):
            iterator.set_state(iterator.get_state() | {name: value})


def test_a_far_place_costs_nothing(records):
    iterator = RecordIterator(records, 6, seed=7)
    iterator.set_state(iterator.get_state() | {"position": 6 * 10**14})
    assert len(next(iterator)["label"]) == 6


def test_close_ends_the_threads(records):
    before = set(threading.enumerate())
    iterator = RecordIterator(records, 6, seed=7, num_workers=3)
    next(iterator)
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()


def test_benchmark(tmp_path, capsys):
    words = "--num_records=64 --latent_size=4 --batch_size=16 --rounds=1".split()
    words += ["--seconds=0.02", f"--folder={tmp_path}", f"--json={tmp_path / 'out.json'}"]
    assert measure.main(["data", *words]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    names = ["float32", "float16"]
    assert list(results["latents_per_second"]) == names
    assert min(results["latents_per_second"].values()) > 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


EPOCHS = """
import sys
from utils import dataset
from utils.iterator import RecordIterator, shuffled_indices
records = dataset.open_records(sys.argv[1])
iterator = RecordIterator(records, 64, seed=0, num_workers=2, prefetch=4)
peaks = []
for epoch in range(4):
    for _ in range(records.num_records // 64):
        next(iterator)
    # Not getrusage: its figure goes on from that of the process that started this one.
    status = open("/proc/self/status").read()
    peaks.append(int(status.split("VmHWM:")[1].split()[0]) / 1024)
print(*peaks)
"""


def test_memory_stays_flat(tmp_path):
    # 2,048 records of 32 KB: 64 MB; a loader that kept them would grow by as much.
    root = make(tmp_path / "set", lengths=(512,) * 4, shape=(32, 32, 8))
    command = [sys.executable, "-c", EPOCHS, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    peaks = [float(word) for word in done.stdout.split()]  # MiB
    assert peaks[3] - peaks[0] < 20, peaks  # holding one epoch would add 64
