"""Compiling for chips that are not at hand, on a CPU; each time in a process of its own."""

import importlib.util
import json

import pytest

from benchmarks import compile as ahead
from benchmarks import cycles, hlo, program
from utils import chips

TINY = (
    "--config=configs/load_config.py:digits --config.model.depth=2 --config.model.hidden_size=128 "
    "--config.training.batch_size=32 --config.fid.device_batch_size=4 "
    "--config.method.guidance_eq=none"
).split()


def compile_for(run_python, topology, *options, **kwargs):
    command = ["-m", "benchmarks", "compile", f"--topology={topology}", *TINY, *options]
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


def test_no_product_is_cut_into_pieces(results):
    assert results["train"]["cycles"]["windowed"] == 0


def test_gradients_and_shards_are_exchanged(results):
    exchanged = results["train"]["collectives"]
    # 2.9 MB of parameters in float32 (fsdp), and their gradients; no activations.
    assert 2.5e6 < exchanged["all-gather"][1] < 3.5e6
    assert 5e6 < sum(size for _, size in exchanged.values()) < 2e7


@pytest.mark.slow
def test_what_does_not_fit_is_said(run_python):
    options = ["--config.training.batch_size=524288", "--steps", "train"]
    done = compile_for(run_python, "v5e:2x2", *options, check=False)
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT" in done.stdout and "of 16 GiB" in done.stdout


WRONG = {  # the options, and what the line names
    ("--topology=v5e:3x7",): "--topology v5e:3x7",
    ("--topology=h200:many",): "--topology h200:many",
    ("--topology=v3:2x2",): "TPU v3 is not known",
    ("--topology=v5e:2x2", "--config.mesh.fsdp=3"): "mesh.fsdp",
    ("--topology=v5e:2x2", "--config.training.batch_size=30"): "training.batch_size",
}


def test_wrong_options_are_one_line(run_python):
    """All in one process, as starting it takes longest."""
    commands = [["compile", *TINY, *options] for options in WRONG]
    code = f"from benchmarks.__main__ import main; print([main(c) for c in {commands}])"
    done = run_python(code, devices=1)
    assert done.stdout.splitlines()[-1] == str([2] * len(WRONG))
    lines = [line for line in done.stderr.splitlines() if line.startswith("measure: ")]
    for line, word in zip(lines, WRONG.values(), strict=True):
        assert word in line
    assert "Traceback" not in done.stderr


# Million cycles of a step with four blocks by the compiler for v5e, and GB of temporaries.
REACHED = {"run_b4": (512, 11.5, 0.32), "run_xl2": (256, 35.0, 0.82)}


@pytest.mark.slow
@pytest.mark.parametrize("name", REACHED)
def test_a_step_on_a_tpu_takes_no_more_cycles_than_it_did(run_python, tmp_path, name):
    """32 images of DiT-B/4, or 16 of XL/2, on each chip of a v5e slice."""
    file, (batch, cycles_then, temporaries) = tmp_path / "results.json", REACHED[name]
    command = ["-m", "benchmarks", "compile", f"--config=configs/load_config.py:{name}"]
    command += ["--topology=v5e:4x4", "--steps", "train", "--config.model.depth=4"]
    command += [f"--config.training.batch_size={batch}", f"--json={file}"]
    run_python(command, devices=1, timeout=900)
    found = json.loads(file.read_text())["train"]
    assert found["flops"] / found["flops_by_hand"] < 1.05
    assert found["cycles"]["windowed"] == 0
    assert found["cycles"]["cycles"] < 1.02e6 * cycles_then
    assert found["temporaries"] < 1.1e9 * temporaries


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins.xla_cuda13") is None
    if importlib.util.find_spec("jax_plugins")
    else True,
    reason='needs pip install "jax[cuda13]"',
)
def test_the_step_of_b4_on_a_card_stays_as_small_as_it_is(run_python, tmp_path):
    """Kernels, bytes and products of DiT-B/4's step, batch 256, on an H200."""
    file = tmp_path / "results.json"
    command = ["-m", "benchmarks", "compile", "--config=configs/load_config.py:run_b4"]
    options = ["--topology=h200", "--steps", "train"]
    run_python([*command, *options, f"--json={file}"], devices=1, timeout=900)
    found = json.loads(file.read_text())["train"]
    assert found["needed"] < 8.5e9  # 8.1e9, 2,130 and 74.8 measured
    kernels = found["kernels"]["all"]
    assert kernels["kernels"] < 2300 and kernels["GB"] < 78
    assert 12.5 < kernels["TFLOP"] < 13.2


PROGRAM = """HloModule jit_step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%products (p0: bf16[64,32], p1: bf16[32,16]) -> bf16[64,16] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[32,16]{1,0} parameter(1)
  ROOT %d = bf16[64,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%stack (p0: bf16[12,64,16], p1: bf16[64,16], p2: s32[]) -> bf16[12,64,16] {
  %p0 = bf16[12,64,16]{2,1,0} parameter(0)
  %p1 = bf16[64,16]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %b = bf16[1,64,16]{2,1,0} bitcast(%p1)
  ROOT %u = bf16[12,64,16]{2,1,0} dynamic-update-slice(%p0, %b, %p2, %p2, %p2)
}

%rows (p0: bf16[64,16]) -> f32[64] {
  %p0 = bf16[64,16]{1,0} parameter(0)
  %c = f32[64,16]{1,0} convert(%p0)
  %z = f32[] constant(0)
  ROOT %r = f32[64]{0} reduce(%c, %z), dimensions={1}, to_apply=%sum
}

%body (t: (s32[], bf16[12,64,16])) -> (s32[], bf16[12,64,16]) {
  %t = (s32[], bf16[12,64,16]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %s = bf16[12,64,16]{2,1,0} get-tuple-element(%t), index=1
  %x = bf16[64,32]{1,0} constant({...})
  %w = bf16[32,16]{1,0} constant({...})
  %g = bf16[64,16]{1,0} fusion(%x, %w), kind=kCustom, calls=%products, metadata={op_name="fc1"}
  %r2 = f32[64]{0} fusion(%g), kind=kInput, calls=%rows
  %n = bf16[12,64,16]{2,1,0} fusion(%s, %g, %i), kind=kLoop, calls=%stack
  ROOT %o = (s32[], bf16[12,64,16]) tuple(%i, %n)
}

%condition (t: (s32[], bf16[12,64,16])) -> pred[] {
  %t2 = (s32[], bf16[12,64,16]) parameter(0)
  %bound = s32[] constant(12)
  %j = s32[] get-tuple-element(%t2), index=0
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

ENTRY %main (x: (s32[], bf16[12,64,16])) -> (s32[], bf16[12,64,16]) {
  %x = (s32[], bf16[12,64,16]) parameter(0)
  ROOT %loop = (s32[], bf16[12,64,16]) while(%x), condition=%condition, body=%body
}
"""


def test_kernels_of_a_program_are_counted_with_its_loops():
    """The expected figures are reckoned by hand."""
    product, rows, stack = program.kernels(hlo.parse(PROGRAM))
    assert (product.kind, product.runs, product.source) == ("products", 12, "fc1")
    assert product.flops == 2 * 64 * 32 * 16
    assert product.bytes == 2 * (64 * 32 + 32 * 16 + 64 * 16)
    assert (rows.kind, rows.bytes, rows.flops) == ("sums", 2 * 64 * 16 + 4 * 64, 0)
    # Of the stack that is updated in place only the update is read and written.
    assert (stack.kind, stack.bytes) == ("copies", 2 * 2 * 64 * 16 + 4)
    table = program.summary([product, rows, stack])
    assert table["all"]["kernels"] == 36
    assert table["all"]["ms"] == pytest.approx(sum(row["ms"] for row in table.values()) / 2)


def test_convolutions_and_their_derivatives_are_products():
    """A kernel of 3 x 3, stride 2, 64 to 128 channels, 8 images of 16 x 32: each costs as much."""
    call = """ENTRY %main (x: f32[8,16,32,64], w: f32[128,3,3,64], y: f32[8,8,16,128]) -> f32[8] {{
  %x = f32[8,16,32,64]{{3,2,1,0}} parameter(0)
  %w = f32[128,3,3,64]{{3,2,1,0}} parameter(1)
  %y = f32[8,8,16,128]{{3,2,1,0}} parameter(2)
  ROOT %c = ({}{{3,2,1,0}}, u8[0]{{0}}) custom-call({}), window={{size=3x3 stride=2x2}}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv{}"
}}
"""
    kinds = [
        ("f32[8,8,16,128]", "%x, %w", "Forward"),
        ("f32[8,16,32,64]", "%y, %w", "BackwardInput"),
        ("f32[128,3,3,64]", "%x, %y", "BackwardFilter"),
    ]
    for kind in kinds:
        (kernel,) = program.kernels(hlo.parse(call.format(*kind)))
        assert kernel.kind == "products"
        assert kernel.flops == 2 * 8 * 8 * 16 * 128 * 3 * 3 * 64, kind


TPU_PROGRAM = """HloModule jit_train_step, is_scheduled=true

%product (p0: bf16[64,32], p1: bf16[32,16]) -> bf16[64,16] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[32,16]{1,0} parameter(1)
  ROOT %d = bf16[64,16]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%outer (p0: bf16[64,32], p1: bf16[32,16]) -> bf16[64,16] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[32,16]{1,0} parameter(1)
  ROOT %f = bf16[64,16]{1,0} fusion(%p0, %p1), kind=kOutput, calls=%product
}

%pieces (t: (s32[], bf16[64,16])) -> (s32[], bf16[64,16]) {
  %t = (s32[], bf16[64,16]) parameter(0)
  %ps = (bf16[2,32], bf16[2,32]) collective-permute-start(%t), channel_id=1
  %q = bf16[64,16]{1,0} fusion(%t, %t), kind=kOutput, calls=%outer, \
metadata={op_name="jit(train_step)/transpose(jvp(jvp(DiT.together)))/fc1"}, \
backend_config={"estimated_cycles":"1000"}
  %pd = bf16[2,32] collective-permute-done(%ps)
  %n = bf16[64,16]{1,0} negate(%q), backend_config={"estimated_cycles":"50"}
  ROOT %o = (s32[], bf16[64,16]) tuple(%t, %q)
}

%body (t: (s32[], bf16[64,16])) -> (s32[], bf16[64,16]) {
  %t = (s32[], bf16[64,16]) parameter(0)
  %m = bf16[64,16] multiply(%t, %t), metadata={op_name="jit(step)/jvp(jvp(DiT.together))/m"}, \
backend_config={"estimated_cycles":"70"}
  ROOT %o = (s32[], bf16[64,16]) tuple(%t, %m)
}

%condition (t: (s32[], bf16[64,16])) -> pred[] {
  %t2 = (s32[], bf16[64,16]) parameter(0)
  %bound = s32[] constant(12)
  ROOT %less = pred[] compare(%t2, %bound), direction=LT
}

%condition_rs (t: (u32[], bf16[64,16])) -> pred[] {
  %t2 = (u32[], bf16[64,16]) parameter(0)
  %bound = u32[]{:T(128)} constant(8)
  ROOT %less = pred[] compare(%t2, %bound), direction=LT
}

ENTRY %main (x: (s32[], bf16[64,16])) -> (s32[], bf16[64,16]) {
  %x = (s32[], bf16[64,16]) parameter(0)
  %e = f32[64]{0} convert(%x), metadata={op_name="jit(train_step)/data/mul"}, \
backend_config={"estimated_cycles":"5"}
  %c = bf16[32,16]{1,0} convert(%x), metadata={op_name="jit(train_step)/jvp(DiT.cast)/c"}, \
backend_config={"estimated_cycles":"7"}
  %g = bf16[64,16]{1,0} fusion(%x, %c), kind=kOutput, calls=%product, \
metadata={op_name="jit(train_step)/jvp(DiT.together)/fc1"}, backend_config={"estimated_cycles":"11"}
  %k = bf16[64,16]{1,0} custom-call(%g), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(train_step)/jvp(jvp(DiT.together))/kernel"}, \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"19700000000","bytes_accessed":"64"}}}
  %s = (bf16[64,16], bf16[64,16]) all-reduce-start(%g), channel_id=2, to_apply=%add
  %d = bf16[64,16] all-reduce-done(%s)
  %loop = (s32[], bf16[64,16]) while(%x), condition=%condition_rs, body=%body, \
backend_config={"known_trip_count":{"n":"12"}}
  %windows = (s32[], bf16[64,16]) while(%loop), condition=%condition_rs, body=%pieces, \
metadata={op_name="jit(train_step)/transpose(jvp(jvp(DiT.together)))/fc1/dot_general"}
  %a = f32[64]{0} add(%e, %e), metadata={op_name="jit(train_step)/add"}, \
backend_config={"estimated_cycles":"13"}
  ROOT %r = (s32[], bf16[64,16]) copy(%windows), backend_config={"estimated_cycles":"3"}
}
"""


def test_cycles_of_a_program_are_those_counted_by_hand():
    """One loop runs 12 times and one 8; the kernel has 1e-4 s of products on a v5e at 1.5 GHz."""
    found = cycles.summary(hlo.parse(TPU_PROGRAM), chips.V5E)
    parts = {"data": 5, "casts": 7, "guidance": 11, "forward": 12 * 70 + 150_000,
             "backward": 8 * 1050, "optimizer and averages": 13, "other": 3}  # fmt: skip
    assert found["parts"] == pytest.approx(parts)
    kinds = {"products": 8011, "copies": 15, "elementwise": 1253, "custom kernels": 150_000}
    assert found["kinds"] == pytest.approx(kinds)
    total = sum(parts.values())
    assert found["cycles"] == pytest.approx(total) and found["seconds"] == total / 1.5e9
    assert found["windowed"] == pytest.approx(8400 / total)
    assert [row["runs"] for row in found["largest"][:3]] == [1, 8, 12]
    assert found["alone"] == {"all-reduce bf16[64,16]": 1}  # the pieces have a product beside them


def test_a_pass_without_tangents_is_the_forward_pass():
    text = TPU_PROGRAM.replace("jvp(jvp(DiT.together))", "jvp(DiT.together)")
    parts = cycles.summary(hlo.parse(text), chips.V5E)["parts"]
    assert "guidance" not in parts and parts["forward"] == pytest.approx(11 + 12 * 70 + 150_000)


def test_change_against_earlier_figures(capsys):
    before = {"train": {"needed": 2e9, "kernels": {"all": {"ms": 10.0}}, "fits": True}}
    now = {"train": {"needed": 2e9, "kernels": {"all": {"ms": 8.0}}, "fits": True}}
    ahead.compare(before, now, ["train"])
    printed = capsys.readouterr().out
    assert "kernels all ms" in printed and "(0.800)" in printed and "needed" not in printed
