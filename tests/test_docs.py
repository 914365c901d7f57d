"""What the README and docs/ say: commands run or at least parse, links lead somewhere."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs import load_config
from scripts import list_options

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
OPTIONS = load_config.options(load_config.default.get_config())

# Run as written, one after the other, in a copy of the project with a smaller digits.yml.
RUN = [
    "python -m scripts.prepare_dataset digits --output data/digits",
    "bash scripts/launch.sh quickstart digits",
    "bash scripts/launch.sh quickstart digits --config.sample_only=True "
    "--config.sampling.labels=3,1,4 --config.sampling.num_images=12 --config.sampling.num_steps=2",
    "python -m scripts.compare logs/$USER/*",
    "python -m scripts.compare logs/$USER/* --html compare.html",
    "python -m scripts.list_options > docs/options.md",
]

# Not run here, and why. Those that start a job still have to parse.
NOT_RUN = {
    r"\.\.\.\]$": "the form of a command",
    r"/path/to/|\$OUTPUT|/data/": "needs ImageNet, its latents or published weights",
    r"IMAGENET_ROOT=|OUTPUT_DIR=|prepare_data\.sh": "needs ImageNet; tests/test_prepare.py",
    r"prepare_dataset (arrays|latents|huggingface|webdataset|preview)": "tests/test_data_page.py",
    r"prepare_dataset (values|signals|digits_pairs)": "tests/test_values.py, test_examples.py",
    r"my_run NAME|cp configs": "needs data of one's own; tests/test_values.py",
    r"launch\.sh (restore|upscale|words|signals)": "minutes; tests/test_examples.py",
    r"prepare_dataset (pt|images)": "needs other people's files; tests/test_prepare.py",
    r"JOB_NAME digits --config.sampling.num_steps": "minutes; tests/test_members.py",
    r"digits_0_4|fm_0_4|launch.sh from_nothing": "minutes; tests/test_members.py",
    r"prepare_dataset tfds|cifar10": "needs a download; tests/test_experiments.py",
    r"quickstart_pmf": "minutes; tests/parity/test_pixel.py has the network and the objective",
    r"quickstart_imf": "minutes; tests/test_imf.py trains, kills and sweeps a smaller one",
    r"my_job my_exp": "needs ImageNet; its file is read below",
    r"scripts/test\.sh": "would run this test",
    r": tensorboard": "a server without an end; tests/test_monitoring.py reads the same files",
    r"profile_steps": "one more run; tests/test_monitoring.py",
    r"model\.cls=ConvNet": "needs the edit of its page; tests/test_extending.py",
    r"scripts\.demo": "a server without an end; tests/test_demo.py has a stand-in",
    r"wandb": "needs an account; tests/test_monitoring.py has a stand-in",
    r": (pip install|hf download)": "needs a network",
    r"(benchmarks|scripts\.(export_checkpoint|evaluate_images))": "has its own tests",
    r"^docs/pods\.md": "needs several machines; tests/test_processes.py runs several processes",
    r"JAX_KIND=|install\.sh": "installs; tests/test_install.py",
}


def commands(text):
    """The commands of the bash blocks, joined over their lines, without comments."""
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = re.sub(r"(^|\s)#.*", "", line).split()
            if words:
                yield " ".join(words)


def inline(text):
    """Commands in backticks within a line."""
    return re.findall(r"`((?:bash scripts|python -m scripts)[^`\n]*)`", text)


ALL = [(page, c) for page, text in TEXTS.items() for c in [*commands(text), *inline(text)]]
LAUNCHES = [c for _, c in ALL if re.search(r"scripts/launch\.sh \w", c)]


FOLDERS = (
    "configs",
    "docs",
    "formats",
    "methods",
    "metrics",
    "run",
    "benchmarks",
    "models",
    "scripts",
    "utils",
)


def test_every_command_runs_here_or_says_why_not():
    unknown = [
        f"{page}: {command}"
        for page, command in ALL
        if command not in RUN
        and len(command.split()) > 2
        and not any(re.search(pattern, f"{page}: {command}") for pattern in NOT_RUN)
        and not re.fullmatch(r"python -m scripts\.\w+|bash scripts/\w+\.sh", command)
    ]
    assert unknown == []
    said = {command for _, command in ALL}
    assert [command for command in RUN if command not in said] == []


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project whose digits train in seconds, and a function that runs a command."""
    folder = tmp_path_factory.mktemp("copy")
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".toml", ".txt"):
            shutil.copy(path, folder)
        elif path.name in FOLDERS:
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "install.sh").write_text(f"echo {sys.executable}\n")
    config = folder / "configs" / "digits.yml"
    small = config.read_text()
    for old, new in {
        r"depth: \d+": "depth: 1",
        r"hidden_size: \d+": "hidden_size: 32",
        r"num_steps: \d+": "num_steps: 20",
        r"num_samples: \d+": "num_samples: 100",
    }.items():
        small, count = re.subn(old, new, small)
        assert count == 1, old
    config.write_text(small)
    bin_folder = Path(sys.executable).parent
    env = {
        **os.environ,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "USER": "me",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    for name in ("DATA_ROOT", "LOG_DIR", "MAX_RESTARTS"):
        env.pop(name, None)

    def run(command):
        done = subprocess.run(
            command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    run.folder = folder
    return run


def test_the_commands_run(copy):
    before = (copy.folder / "docs" / "options.md").read_text()
    for command in RUN:
        copy(command)
    job = copy.folder / "logs" / "me" / "quickstart"
    assert (job / "results.json").exists() and (job / "metrics.jsonl").exists()
    assert len(list((job / "samples").rglob("*_class[134].png"))) == 12
    assert (copy.folder / "docs" / "options.md").read_text() == before
    # The Python of docs/monitoring.md, in the same place.
    (block,) = re.findall(r"^```python\n(.*?)^```", TEXTS["docs/monitoring.md"], re.M | re.S)
    assert "[(20, " in copy(f"python -c {shlex.quote(block + 'print(fid)')}")
    # That of docs/python.md, in another place.
    block, search, _ = re.findall(r"^```python\n(.*?)^```", TEXTS["docs/python.md"], re.M | re.S)
    block = block.replace("/path/to/meanflow", str(copy.folder))
    block = block.replace("logs/me/quickstart", str(job))
    said = "print(images.shape, between.shape, abs(walk - (noise - u)).max() > 0)\n"
    search += "print(values[-1] < values[0] / 10)"
    command = f"cd {copy.folder.parent} && python -c {shlex.quote(block + said + search)}"
    assert copy(command).split("\n")[:2] == ["(3, 8, 8, 1) (1, 8, 8, 1) True", "True"]


@pytest.mark.parametrize("command", sorted(set(LAUNCHES)))
def test_the_options_of_every_job_parse(command, tmp_path, monkeypatch):
    """Its config exists, its options too, and they fit together."""
    monkeypatch.setenv("DATA_ROOT", "/records")
    monkeypatch.setenv("USER", "me")
    text = re.split(r"[|<&]", command.split("scripts/launch.sh ")[1])[0]
    words = shlex.split(text.removesuffix("'") if text.count("'") % 2 else text)  # --command='...'
    config = words[1] if len(words) > 1 and not words[1].startswith("-") else "run_b4"
    options = [word for word in words if word.startswith("--config.") and "=" in word]
    if config in ("[CONFIG]", "CONFIG", "NAME"):
        config = "run_b4"
    if config == "my_exp":
        (text,) = re.findall(r"```yaml\n(# configs/my_exp.yml.*?)```", TEXTS["README.md"], re.S)
        (tmp_path / "my_exp.yml").write_text(text)
        monkeypatch.setattr(load_config, "FOLDER", tmp_path)
    if not any("cache_ref" in option for option in options):
        options.append("--config.fid.cache_ref=ref.npz")
    load_config.from_command_line([f"--config=configs/load_config.py:{config}", *options])


@pytest.mark.parametrize("page", TEXTS)
def test_the_options_that_a_page_names_exist(page):
    sections = {path.split(".")[0] for path in OPTIONS if "." in path}
    named = re.findall(
        rf"`(?:--config\.)?((?:{'|'.join(sections)})\.[a-z]\w+)\b(?!\()", TEXTS[page]
    )
    wrong = {name for name in named if name not in OPTIONS} - set(load_config.DROPPED)
    files = (".py", ".npz", ".json", ".safetensors")
    assert {name for name in wrong if not name.endswith(files)} == set()


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)|<img src=\"([^\":]+)\"", TEXTS[page])
    folder = (ROOT / page).parent
    assert [link for pair in links for link in pair if link and not (folder / link).exists()] == []


def test_the_options_reference_is_true():
    assert TEXTS["docs/options.md"] == list_options.reference()


def test_pictures_are_small():
    for path in (ROOT / "docs" / "images").iterdir():
        assert path.stat().st_size < 300_000, path


def test_nothing_speaks_of_paths_of_one_machine():
    for page, text in TEXTS.items():
        assert not re.search(r"/(home|root|Users|tmp|work)/\w", text), page
