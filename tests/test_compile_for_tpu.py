"""Compiling for a TPU slice, by libtpu on a CPU; each time in a process of its own."""

import json

import pytest

TINY = (
    "--config=configs/load_config.py:digits --config.model.depth=2 --config.model.hidden_size=128 "
    "--config.training.batch_size=32 --config.fid.device_batch_size=4"
).split()


def compile_for(run_python, topology, *options, **kwargs):
    command = ["-m", "scripts.measure.compile_for_tpu", f"--topology={topology}", *TINY, *options]
    return run_python(command, devices=1, **kwargs)


@pytest.fixture(scope="module")
def results(run_python, tmp_path_factory):
    """A small model on four hosts."""
    file = tmp_path_factory.mktemp("compiled") / "results.json"
    done = compile_for(run_python, "v5e:4x4", "--config.mesh.fsdp=4", f"--json={file}")
    print(done.stdout)
    assert "16 devices on 4 hosts, data 4 x fsdp 4" in done.stdout
    return json.loads(file.read_text())


def test_both_steps_fit(results):
    for name in ("train", "eval"):
        assert results[name]["fits"] and 0 < results[name]["needed"] < 1e8, name
        assert results[name]["compile_seconds"] > 0


def test_flops_are_those_counted_by_hand(results):
    train = results["train"]
    assert 1 < train["flops"] / train["flops_by_hand"] < 1.15


def test_gradients_and_shards_are_exchanged(results):
    exchanged = results["train"]["collectives"]
    # 2.9 MB of parameters in float32 (fsdp), and their gradients; no activations.
    assert 2.5e6 < exchanged["all-gather"][1] < 3.5e6
    assert 5e6 < sum(size for _, size in exchanged.values()) < 2e7


def test_what_does_not_fit_is_said(run_python):
    options = ["--config.training.batch_size=524288", "--steps", "train"]
    done = compile_for(run_python, "v5e:2x2", *options, check=False)
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT" in done.stdout and "of 16 GiB" in done.stdout


@pytest.mark.parametrize(
    "topology, options, word",
    [
        ("v5e:3x7", [], "--topology v5e:3x7"),
        ("v3:2x2", [], "TPU v3 is not known"),
        ("v5e:2x2", ["--config.mesh.fsdp=3"], "mesh.fsdp"),
        ("v5e:2x2", ["--config.training.batch_size=30"], "training.batch_size"),
    ],
)
def test_wrong_options_are_one_line(run_python, topology, options, word):
    done = compile_for(run_python, topology, *options, check=False)
    assert done.returncode == 2
    assert word in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
