"""Measures what a person waits for on a host, beside an older version and beside other programs.

    python -m benchmarks hosts [--against CHECKOUT] [--pytorch PYTHON] [--rows digits images ...]

Each side is a process of its own (benchmarks/waits.py), in turn with the others; medians, extremes
and ratios of medians to this version's count, not the seconds of one machine.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import data

ROOT = Path(__file__).resolve().parent.parent
# Row -> (what is measured, program of the project, programs beside it, rounds).
ROWS = {
    "digits": ("a digits run of 50 steps, nothing cached", "digits", ("published_digits",), 2),
    "digits_step": ("its step", "digits_step", ("published_digits",), 1),
    "images": ("images of it from Python", "images", (), 2),
    "step": ("DiT-B/4, float32, batch 8", "step", ("published_step",), 1),
    "step_32": ("DiT-B/4, float32, batch 32", "step_32", ("published_step_32",), 1),
    "checkpoint": ("checkpoint of DiT-B/4 (2.1 GB)", "run_checkpoint", ("orbax_checkpoint",), 1),
    "fid": ("FID of 500 pictures in a folder", "fid", ("pytorch_fid", "torch_fidelity"), 1),
    "fid_fixed": ("FID of 20", "fid_fixed", (), 2),
    "records": ("1,500 JPEGs to records of 256 pixels", "records",
                ("pil_records", "torchvision"), 2),
    "raw": ("raw pictures of 256 pixels, batch 64, read", "raw", ("decoded",), 2),
    "latents": ("latents, batch 256, float32, read", "latents",
                ("lmdb_latents", "lmdb_pytorch"), 3),
}  # fmt: skip
# Programs for a Python that has torch: pytorch-fid with weights of our own, since nothing is
# downloaded, and what writes these.
PYTORCH = {
    "inception_weights": """
import sys, torch
from pytorch_fid import inception
inception.load_state_dict_from_url = lambda *args, **options: {}
torch.nn.Module.load_state_dict = lambda *args, **options: None
torch.save(inception.fid_inception_v3().state_dict(), sys.argv[1] + "/inception.pth")
print("{}")
""",
    "pytorch_fid": """
import sys, time
begin = time.perf_counter()
import torch
from pytorch_fid import fid_score, inception
folder = sys.argv[1]
inception.load_state_dict_from_url = lambda *args, **options: torch.load(folder + "/inception.pth")
paths = [folder + "/pictures", folder + "/stats.npz"]
fid_score.calculate_fid_given_paths(paths, 20, "cpu", 2048, 2)
print('{"whole process": %f}' % (time.perf_counter() - begin))
""",
    "torch_fidelity": """
import sys, time
begin = time.perf_counter()
import numpy
from torch_fidelity import metric_fid, utils
folder, layer = sys.argv[1], "2048"
how = {"feature_extractor_weights_path": folder + "/inception.pth", "cuda": False,
       "input1": folder + "/pictures", "batch_size": 20, "save_cpu_ram": True, "verbose": False}
network = utils.create_feature_extractor("inception-v3-compat", [layer], **how)
found = metric_fid.fid_input_id_to_statistics(1, network, layer, **how)
theirs = numpy.load(folder + "/stats.npz")
theirs = {name: theirs[name].astype(values.dtype) for name, values in found.items()}
metric_fid.fid_statistics_to_metric(found, theirs, False)
print('{"whole process": %f}' % (time.perf_counter() - begin))
""",
    "lmdb_pytorch": """
import itertools, sys, time
import lmdb, numpy, torch
class Latents(torch.utils.data.Dataset):
    env = None
    def __len__(self):
        return 8192
    def __getitem__(self, i):
        self.env = self.env or lmdb.open(sys.argv[1] + "/lmdb", readonly=True, lock=False)
        with self.env.begin() as transaction:
            content = bytearray(transaction.get(b"%08d" % i))
        moments = numpy.frombuffer(content, numpy.float32, 8192).reshape(32, 32, 8)
        return moments, int.from_bytes(content[-4:], "little")
loader = torch.utils.data.DataLoader(
    Latents(), 256, shuffle=True, num_workers=2, prefetch_factor=4, drop_last=True)
batches = itertools.chain.from_iterable(itertools.repeat(loader))
for _ in range(8):
    next(batches)
begin = time.perf_counter()
for _ in range(24):
    next(batches)
print('{"a batch": %f}' % ((time.perf_counter() - begin) / 24))
""",
    "torchvision": """
import sys, tempfile, time
begin = time.perf_counter()
import torch
from torchvision import datasets, transforms
size = transforms.Resize(256, transforms.InterpolationMode.BICUBIC)
how = transforms.Compose([size, transforms.CenterCrop(256), transforms.PILToTensor()])
images = datasets.ImageFolder(sys.argv[1] + "/jpegs", how)
with tempfile.TemporaryFile(dir=sys.argv[1]) as file:
    for batch, _ in torch.utils.data.DataLoader(images, 32, num_workers=2):
        file.write(batch.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
print('{"whole process": %f}' % (time.perf_counter() - begin))
""",
}


def add_arguments(parser):
    """Adds the options of `run`."""
    parser.add_argument("--against", type=Path, help="checkout of an older version")
    theirs = "torch, torchvision, pytorch-fid, torch-fidelity and lmdb"
    parser.add_argument("--pytorch", help=f"Python that has {theirs}")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[])
    parser.add_argument("--rounds", type=int, help="of each row; default: by row")
    parser.add_argument("--folder", help="where to put the temporary data; default: the system's")


def run(args):
    """Measures the rows; prints a table, returns {row: {side: {measure: [seconds or GB]}}}."""
    rows = args.rows or [row for row in ROWS if args.pytorch or not row.startswith("fid")]
    if not args.pytorch and any(row.startswith("fid") for row in rows):
        raise ValueError("--rows fid needs --pytorch, which writes the weights of its network")
    if "latents" in rows and importlib.util.find_spec("lmdb") is None:
        raise ValueError("the row latents needs lmdb: pip install -r requirements-data.txt")
    if "images" in rows and "digits" not in rows:
        raise ValueError("--rows images draws from the run that the row digits makes: ask for both")
    if args.against and not (args.against / "main.py").is_file():
        raise ValueError(f"--against={args.against}: no checkout of this project")
    found = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        prepare(Path(folder), rows, args.pytorch)
        for row in rows:
            title, ours, theirs, rounds = ROWS[row]
            sides = {"now": (ours, ROOT, sys.executable)}
            if args.against:
                sides["before"] = ours, args.against.resolve(), sys.executable
            for other in theirs:
                python = args.pytorch if other in PYTORCH else sys.executable
                if python:
                    sides[other] = other, ROOT, python
            found[row] = measured(sides, args.rounds or rounds, folder)
            report(title, found[row])
    return found


def measured(sides, rounds, folder):
    """Runs each side in turn, `rounds` times; returns {side: {measure: [seconds or GB]}}."""
    found = {side: {} for side in sides}
    for number in range(rounds):
        order = list(sides)[:: -1 if number % 2 else 1]
        for side in order:
            for name, value in program(*sides[side], folder).items():
                found[side].setdefault(name, []).append(value)
    return found


def program(name, checkout, python, folder):
    """Runs a program of benchmarks/waits.py with the code of a checkout; its measures."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(checkout)}
    file, before = str(ROOT / "benchmarks" / "waits.py"), os.times()
    what = ["-I", "-c", PYTORCH[name]] if name in PYTORCH else ["-P", file, name]
    done = subprocess.run(
        [python, *what, folder], cwd=checkout, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ValueError(f"{name} in {checkout}: {last}")
    after = os.times()
    cpu = sum(after[2:4]) - sum(before[2:4])
    return json.loads(done.stdout.splitlines()[-1]) | {"CPU of the process": cpu}


def report(title, found):
    """Prints the measures of a row: median, lowest and highest of each side, and ratios."""
    print(title)
    now = found["now"]
    for side, measures in found.items():
        for name, values in measures.items():
            middle = np.median(values)
            line = f"  {name:26} {side:18} {middle:8.3f} [{min(values):.3f} to {max(values):.3f}] "
            line += "GB" if name == "memory" else "s "
            if side != "now" and name in now:
                line += f"   now / {side} {np.median(now[name]) / max(middle, 1e-9):.2f}"
            print(line, flush=True)


# Data ------------------------------------------------------------------------------------------


def prepare(folder, rows, pytorch):
    """Makes what the rows need in a folder; random, and the same each time."""
    rng = np.random.default_rng(0)
    if {"digits", "images"}.intersection(rows):
        command = [sys.executable, "-m", "scripts.prepare_dataset", "digits"]
        output = f"--output={folder / 'digits'}"
        subprocess.run([*command, output], cwd=ROOT, check=True, capture_output=True)
    if {"records", "raw"}.intersection(rows):
        pictures(rng, folder / "jpegs" / "class", 1500, (500, 375), "jpg")
    if "raw" in rows:
        command = [sys.executable, "-m", "scripts.prepare_dataset", "images", "--vae=none"]
        command += [f"--input={folder / 'jpegs'}", f"--output={folder / 'raw'}", "--preview=0"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    if {"fid", "fid_fixed"}.intersection(rows):
        pictures(rng, folder / "pictures", 500, (256, 256), "png")
        pictures(rng, folder / "few", 20, (256, 256), "png")
        np.savez(folder / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
        program("inception_weights", ROOT, pytorch, str(folder))
    if "latents" in rows:
        data.write_records(folder / "latents", 8192, 32, "float32")
        plain_lmdb(folder / "lmdb", 8192)


def plain_lmdb(path, count):
    """Writes an LMDB of latents: their bytes, and behind them those of the label."""
    import lmdb

    with lmdb.open(str(path), map_size=2**30) as env, env.begin(write=True) as transaction:
        for i, (moments, label) in enumerate(data.latents(count, 32, 0)):
            transaction.put(b"%08d" % i, moments.tobytes() + label.to_bytes(4, "little"))


def pictures(rng, folder, count, size, ending):
    """Writes pictures with details of all sizes, as photographs have."""
    folder.mkdir(parents=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        fine = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
        noise = rng.integers(-12, 13, fine.shape, np.int16)
        image = Image.fromarray(np.clip(fine + noise, 0, 255).astype(np.uint8))
        image.save(folder / f"{i:05d}.{ending}", **({"quality": 90} if ending == "jpg" else {}))
