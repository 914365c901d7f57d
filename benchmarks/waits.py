"""What a person waits for on a host, each a program of its own for benchmarks/hosts.py.

    PYTHONPATH=CHECKOUT python -P benchmarks/waits.py NAME FOLDER

runs with the code of a checkout, which may be an older version, and prints {measure: seconds}, of
memory GB, as the last line. FOLDER has what `hosts.prepare` makes; the programs beside the project
need it alone.
"""

import collections
import concurrent.futures
import contextlib
import json
import logging
import multiprocessing
import runpy
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

BEGAN = time.perf_counter()
DIGITS = ("--config=configs/load_config.py:digits", "--config.training.num_steps=50",
          "--config.training.log_per_step=10")  # fmt: skip
LARGE = ("--config=configs/load_config.py:run_b4", "--config.dataset.root=none",
         "--config.fid.on_training=false")  # fmt: skip


def seconds():
    return time.perf_counter() - BEGAN


def command(module, *arguments):
    """Runs a module as from the command line."""
    sys.argv = [module, *arguments]
    with contextlib.redirect_stdout(sys.stderr):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                raise


def digits(folder):
    """Runs the digits, nothing cached."""
    found = {}

    class Note(logging.Handler):
        def emit(self, record):
            if record.msg.startswith("compiled: the first step"):
                found["first step"] = seconds()

    logging.getLogger().addHandler(Note())
    workdir = tempfile.mkdtemp(dir=folder)
    logging.getLogger().setLevel(logging.INFO)
    command("main", f"--workdir={workdir}", f"--config.dataset.root={folder / 'digits'}", *DIGITS)
    return found | {"whole run": seconds()}


def images(folder):
    """Draws the first images of a run, and another number of them."""
    import generator

    run = next(path.parent for path in sorted(folder.glob("*/results.json")))
    begin = time.perf_counter()
    model = generator.load(run)
    model.sample(range(8))
    first = time.perf_counter()
    model.sample(range(5))
    return {"load to the first images": first - begin, "5 after 8": time.perf_counter() - first}


def config_of(name, batch):
    from configs import load_config

    size = f"--config.training.batch_size={batch}"
    options = (f"--config=configs/load_config.py:{name}", size, *LARGE[1:])
    return load_config.from_command_line(options)[0]


def step(folder, name="run_b4", batch=8, steps=5):
    """Compiles and takes the train step of a config."""
    import jax

    import benchmarks.train
    from utils import sharding

    made = benchmarks.train.Step(config_of(name, batch), sharding.make_mesh(1, jax.devices()))
    found = {"compile": made.compile_seconds, "memory": made.bytes / 1e9}
    made.run(1)
    return found | timed(lambda: made.run(1), steps)


def timed(take, steps):
    """Takes a step so many times: the median by the clock, and the mean CPU."""
    begin, passed = time.process_time(), []
    for _ in range(steps):
        begun = time.perf_counter()
        take()
        passed.append(time.perf_counter() - begun)
    return {"step": float(np.median(passed)),
            "step, CPU": (time.process_time() - begin) / steps}  # fmt: skip


def published_step(folder, name="run_b4", batch=8, steps=5):
    """Does the same with the step as published (benchmarks/plain.py)."""
    import jax

    from benchmarks import costs, plain

    config = config_of(name, batch)
    init, take = plain.make(config)
    state = jax.jit(init)(jax.random.key(0))
    rng, shapes = np.random.RandomState(0), costs.batch_shapes(config)
    rows = jax.tree.map(lambda x: rng.uniform(0, 2, x.shape).astype(x.dtype), shapes)
    begin = time.perf_counter()
    program = jax.jit(take, donate_argnums=0).lower(state, rows).compile()
    found = {"compile": time.perf_counter() - begin, "memory": costs.peak_bytes(program) / 1e9}

    def run():
        nonlocal state
        state = jax.block_until_ready(program(state, rows))

    run()
    return found | {"first step": seconds()} | timed(run, steps)


step_32 = partial(step, batch=32, steps=2)
published_step_32 = partial(published_step, batch=32, steps=2)
digits_step = partial(step, name="digits", batch=128, steps=20)
published_digits = partial(published_step, name="digits", batch=128, steps=20)


def state():
    """Makes the state of a run of DiT-B/4 and a step that uses it up, of next to no cost."""
    import jax

    import parts
    import train
    from configs import load_config
    from utils import sharding

    config, _ = load_config.from_command_line(LARGE)
    made = parts.make(config)
    recipe, _ = train.make_recipe(config.training, made, 1)

    def init(key):
        return train.init_state(recipe, made.module, made.image_shape, key)

    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = sharding.by_parameter(made.mesh, shapes)
    rng = np.random.default_rng(0)

    def values(x):
        return rng.standard_normal(x.shape, np.float32).astype(x.dtype)

    begun = sharding.place(jax.tree.map(values, shapes), shardings)
    sums = jax.tree.map(lambda x: x * 0 - 1, begun.sums)
    begun = begun._replace(step=begun.step * 0, sums=sums)
    bump = jax.jit(
        lambda s: jax.tree.map(lambda x: x + 1, s)._replace(sums=s.sums),
        donate_argnums=0, out_shardings=shardings,
    )  # fmt: skip
    return (
        config,
        jax.block_until_ready(bump(begun)),
        bump,
        sharding.with_shardings(shapes, shardings),
    )


def saves(save, wait, begun, bump):
    """Saves twice, a step after each: how long a loop is blocked, and all of it."""
    import jax

    found = {}
    for name in ("first", "second"):
        begin = time.perf_counter()
        save(begun)
        found[f"{name} save: blocked"] = time.perf_counter() - begin
        begun = jax.block_until_ready(bump(begun))
        wait()
        found[f"{name} save: in all"] = time.perf_counter() - begin
    return found


def run_checkpoint(folder):
    """Writes a checkpoint of DiT-B/4, and restores it with all checks."""
    import jax

    from run import checkpoint, resume

    config, begun, bump, targets = state()
    options = config.to_dict()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        with checkpoint.Checkpointer(Path(place)) as saver:
            found = saves(
                lambda s: resume.save(saver, s, {"position": 1}, options), saver.wait, begun, bump
            )
        begin = time.perf_counter()
        jax.block_until_ready(resume.restore(options, Path(place), targets, {}).state)
        return found | {"restore": time.perf_counter() - begin}


def orbax_checkpoint(folder):
    """Does the same by orbax alone, unchecked."""
    import jax
    import orbax.checkpoint as ocp

    _, begun, bump, targets = state()
    with tempfile.TemporaryDirectory(dir=folder) as place, ocp.CheckpointManager(place) as manager:
        found = saves(
            lambda s: manager.save(int(s.step), args=ocp.args.StandardSave(s)),
            manager.wait_until_finished, begun, bump,
        )  # fmt: skip
        begin = time.perf_counter()
        args = ocp.args.StandardRestore(targets)
        jax.block_until_ready(manager.restore(manager.latest_step(), args=args))
        return found | {"restore": time.perf_counter() - begin}


def fid(folder, name="pictures"):
    """Computes the FID of a folder of pictures."""
    command(
        "scripts.evaluate_images", f"--images={folder / name}", *LARGE,
        f"--config.fid.cache_ref={folder / 'stats.npz'}",
        f"--config.fid.inception_weights={folder / 'inception.pth'}",
    )  # fmt: skip
    return {"whole process": seconds()}


def fid_fixed(folder):
    """Does the same with 20 pictures."""
    return fid(folder, "few")


def records(folder):
    """Makes 1,500 JPEGs into records of 256 pixels."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        command(
            "scripts.prepare_dataset", "images", f"--input={folder / 'jpegs'}",
            f"--output={output}/records", "--vae=none", "--image_size=256",
        )  # fmt: skip
    return {"whole process": seconds()}


def adm_crop(path):
    """Crops as ADM does, by PIL alone: uint8 (256, 256, 3) as bytes."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    while min(image.size) >= 512:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = 256 / min(image.size)
    size = tuple(round(side * scale) for side in image.size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = ((side - 256) // 2 for side in size)
    return image.crop((left, top, left + 256, top + 256)).tobytes()


def pil_records(folder):
    """Does the same by a loop of PIL in two processes, into one file."""
    paths = sorted((folder / "jpegs").rglob("*.jpg"))
    with (
        tempfile.TemporaryFile(dir=folder) as file,
        multiprocessing.get_context("fork").Pool(2) as pool,
    ):
        for content in pool.imap(adm_crop, paths, 16):
            file.write(content)
    return {"whole process": seconds()}


def latents(folder, name="latents", size=256, batches=60):
    """Reads batches of records, shuffled, from the page cache."""
    from utils import dataset, iterator

    records = dataset.open_records(folder / name)
    reader = iterator.RecordIterator(records, size, seed=0, num_workers=2, prefetch=4)
    with contextlib.closing(reader):
        return batches_of(reader, batches)


def batches_of(reader, count):
    """Reads a third of `count` batches, then all of them: the seconds of one."""
    for _ in range(count // 3):
        next(reader)
    begin = time.perf_counter()
    for _ in range(count):
        next(reader)
    return {"a batch": (time.perf_counter() - begin) / count}


def ahead(read, size, total):
    """Yields batches of shuffled indices below `total`, read by two threads, four ahead."""
    rng = np.random.default_rng(0)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = collections.deque()
        while True:
            while len(waiting) < 4:
                waiting.append(pool.submit(read, rng.integers(0, total, size)))
            yield waiting.popleft().result()


def lmdb_latents(folder):
    """Does the same from an LMDB of plain bytes, by two threads."""
    import lmdb

    with lmdb.open(str(folder / "lmdb"), readonly=True, lock=False, readahead=False) as env:
        total = env.stat()["entries"]

        def read(index):
            batch, labels = np.empty((len(index), 32, 32, 8), np.float32), []
            with env.begin(buffers=True) as transaction:
                for row, i in zip(batch, index.tolist(), strict=True):
                    content = transaction.get(b"%08d" % i)
                    row[:] = np.frombuffer(content, np.float32, row.size).reshape(row.shape)
                    labels.append(int.from_bytes(content[-4:], "little"))
            return batch, np.array(labels, np.int32)

        return batches_of(ahead(read, 256, total), 60)


def raw(folder):
    """Reads batches of raw pictures of 256 pixels."""
    return latents(folder, "raw", 64, 30)


def decoded(folder):
    """Makes the same batches of the JPEGs, by two processes that decode and crop."""
    paths = sorted((folder / "jpegs").rglob("*.jpg"))
    with multiprocessing.get_context("fork").Pool(2) as pool:

        def read(index):
            contents = pool.map(adm_crop, [paths[i] for i in index], 8)
            return np.frombuffer(b"".join(contents), np.uint8).reshape(-1, 256, 256, 3)

        return batches_of(ahead(read, 64, len(paths)), 12)


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
