"""A run that is started again does not compile its step again."""

import contextlib

import bucket
import jobs
import pytest

RUN = """
import jax
import main

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
status = main.main({argv})
print("hits", hits.count("/jax/compilation_cache/cache_hits"))
raise SystemExit(status)
"""

NONE = {"JAX_COMPILATION_CACHE_DIR": ""}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_the_second_start_finds_what_the_first_compiled(place, tmp_path, run_python):
    records = jobs.write_records(tmp_path / "records")
    workdir, env = str(tmp_path / "run"), NONE

    def run(steps):
        options = (
            jobs.OPTIONS | jobs.STEPS_ALONE | {"dataset.root": records, "training.num_steps": steps}
        )
        argv = [f"--config.{name}={value}" for name, value in options.items()]
        argv += [f"--workdir={workdir}", "--config=configs/load_config.py:digits"]
        done = run_python(RUN.format(argv=argv), devices=1, env=env)
        kept = {path.name for path in (tmp_path / "run" / "compiled").glob("cpu-*/*-cache")}
        if place == "bucket":
            kept = {name for name in bucket.names(url, "run/compiled/") if name.endswith("-cache")}
        assert sum("train_step" in name for name in kept) == 1
        return int(done.stdout.split("hits")[1])

    with contextlib.ExitStack() as stack:
        if place == "bucket":
            url = stack.enter_context(bucket.started())
            workdir, env = f"gs://{bucket.BUCKET}/run", NONE | bucket.environment(url)
        run(2)
        assert run(4) > 0


def test_the_folder_of_the_user_comes_first(tmp_path, run_python):
    code = f"""
import jax, pathlib
from utils import compiling
before = jax.config.jax_compilation_cache_dir
compiling.keep(pathlib.Path("elsewhere"))
assert jax.config.jax_compilation_cache_dir == before == {str(tmp_path)!r}
"""
    run_python(code, devices=1, env={"JAX_COMPILATION_CACHE_DIR": str(tmp_path)})


def test_each_kind_of_cpu_has_a_folder_of_its_own(tmp_path, run_python):
    code = f"""
import jax, pathlib
from utils import compiling
compiling.PROCESSOR = file = pathlib.Path({str(tmp_path / "cpuinfo")!r})
folder = lambda: jax.config.jax_compilation_cache_dir
compiling.keep(pathlib.Path("kept"))
assert not folder()  # nobody knows which CPU it is
names = []
for text in ("flags: avx\\nMHz: 1", "flags: avx\\nMHz: 2", "flags: avx2\\nMHz: 1"):
    file.write_text("model name: A\\n" + text + "\\n\\nprocessor: 1")
    jax.config.update("jax_compilation_cache_dir", None)
    compiling.keep(pathlib.Path("kept"))
    names.append(folder())
assert names[0] == names[1] != names[2] and names[0].startswith("kept/cpu-"), names
"""
    run_python(code, devices=1, env=NONE)
