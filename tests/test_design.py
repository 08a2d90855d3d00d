"""What every script in the root has in common. Scripts to come are held to it without a change here."""

import ast
import csv
import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, load

README = ROOT / "README.md"
OPTIONAL = {"wandb", "swanlab", "envpool"}  # imported only where a run asks for one
DISTRIBUTIONS = {"ale_py": "ale-py", "cv2": "opencv-python-headless", "stable_baselines3": "stable-baselines3"}
SECTIONS = ["Arguments", "Environment", "Network", "Replay memory|Rollout", "Equations", "Training", "Evaluation"]
# What an algorithm is made of. Any other function or class that two scripts have is the same text in both.
MAY_DIFFER = {"Args", "make_env", "QNetwork", "ReplayMemory", "Batch", "td_loss", "train", "evaluate"}
MAX_PLUMBING_LINES = 545
# Without the docstring and what stands before it.
MAX_ALGORITHM_LINES = defaultdict(lambda: 400, dqn_vecenv=441, ppo_cartpole=410, dqn_lstm_cartpole=558, dqn_atari=673)
RUN_FILES = {"args.json", "progress.csv", "best.pt", "last.pt", "result.json", "curves.png"}
RESULTS = {
    *("global_step", "gradient_steps", "seconds", "wall_seconds", "steps_per_second", "final_return_mean"),
    *("final_return_min", "final_return_std", "best_return_mean", "solved_step", "solved_seconds"),
}

each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)


def split(path):
    """Return the text of a script up to the divider, and from there to `if __name__`."""
    algorithm, rule, plumbing = path.read_text().partition("\n# " + "#" * 118 + "\n")
    assert rule, "no divider"
    plumbing, guard, _ = plumbing.rpartition("\nif __name__")
    assert guard, "no main guard"
    return algorithm, plumbing


def imports(tree):
    """Yield (package, whether it stands inside a function, whole name) of every import."""
    in_functions = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import needs a package"
            names = [node.module]
        else:
            continue
        for name in names:
            yield name.split(".")[0], node in in_functions, name


def third_party(path):
    packages = {package for package, _, _ in imports(ast.parse(path.read_text()))}
    return {DISTRIBUTIONS.get(package, package) for package in packages - sys.stdlib_module_names - OPTIONAL}


def pins(lines):
    """Return {distribution: version} of requirement lines, all of which must be exact."""
    requirements = [line.split("#")[0].strip() for line in lines]
    return dict(requirement.split("==") for requirement in requirements if requirement)


def metadata(path):
    block = re.search(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+)^# ///$", path.read_text())  # the regex of PEP 723
    return tomllib.loads("".join(line[2:] for line in block[1].splitlines(keepends=True)))


def definitions(path):
    """Return {name: text} of the functions and classes above the divider, with their decorators."""
    algorithm, _ = split(path)
    lines = algorithm.splitlines()
    found = {}
    for node in ast.parse(algorithm).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def args_read(path):
    """Return every X of args.X or self.args.X outside the class Args."""
    tree = ast.parse(path.read_text())
    inside = {node for top in tree.body if getattr(top, "name", "") == "Args" for node in ast.walk(top)}
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node not in inside
        if getattr(node.value, "id", getattr(node.value, "attr", "")) == "args"
    }


def commands(path):
    """Return (script, arguments) of every command in the README or a docstring that runs a script."""
    text = path.read_text() if path.suffix == ".md" else ast.get_docstring(ast.parse(path.read_text())) or ""
    text = text.replace("\\\n", " ")
    # A command ends with its line, or where the shell or Markdown ends it.
    found = re.findall(r"\b(?:python3?|uv run|pipx run) ([\w/.-]+\.py)((?:[^\n`&|;#<>()]|(?<=\w)#)*)", text)
    return [(script, shlex.split(arguments)) for script, arguments in found]


SOURCES = [*SCRIPTS, *([README] if README.exists() else [])]
COMMANDS = [(source, *command) for source in SOURCES for command in commands(source)]


# --- One file, and what it needs ---


@each_script
def test_imports_are_the_standard_library_and_the_requirements(path):
    assert third_party(path) <= pins((ROOT / "requirements.txt").read_text().splitlines()).keys()


@each_script
def test_optional_packages_are_imported_only_inside_a_function(path):
    assert [name for name, inside, _ in imports(ast.parse(path.read_text())) if name in OPTIONAL and not inside] == []


@each_script
def test_no_script_imports_another(path):
    local = {file.stem for file in ROOT.rglob("*.py") if not file.relative_to(ROOT).parts[0].startswith(".")}
    assert {name for name, _, _ in imports(ast.parse(path.read_text()))} & local == set()


@each_script
def test_the_licence_is_the_first_line(path):
    assert path.read_text().splitlines()[0] == "# SPDX-License-Identifier: MIT"


@each_script
def test_metadata_pins_what_requirements_pin(path):
    required = pins((ROOT / "requirements.txt").read_text().splitlines())
    listed = pins(metadata(path)["dependencies"])
    assert listed == {name: required.get(name) for name in listed}
    assert metadata(path)["requires-python"] == ">=3.11"


@each_script
def test_metadata_covers_what_the_script_imports(path):
    # tensorboard hides behind torch.utils.tensorboard; Gymnasium draws with pygame and films with moviepy.
    indirect = {"tensorboard", "pygame", "moviepy"}
    assert third_party(path) | indirect <= pins(metadata(path)["dependencies"]).keys()


# --- One shape ---


@each_script
def test_sections_stand_in_the_agreed_order(path):
    algorithm, plumbing = split(path)
    banners = re.findall(r"(?m)^# === (.+?) =+$", algorithm)
    assert len(banners) == len(SECTIONS)
    assert all(re.fullmatch(section, banner) for section, banner in zip(SECTIONS, banners, strict=True)), banners
    assert "# ===" not in plumbing


@each_script
def test_banners_are_as_wide_as_a_line(path):
    assert {len(line) for line in path.read_text().splitlines() if line.startswith(("# ===", "# ###"))} == {120}


def test_plumbing_is_one_text():
    texts = defaultdict(list)
    for path in SCRIPTS:
        texts[split(path)[1]].append(path.stem)
    assert len(texts) == 1, f"these differ from one another: {list(texts.values())}"


def test_what_scripts_share_is_one_text():
    texts = defaultdict(lambda: defaultdict(list))
    for path in SCRIPTS:
        for name, text in definitions(path).items():
            texts[name][text].append(path.stem)
    different = {name: list(by_text.values()) for name, by_text in texts.items() if len(by_text) > 1}
    assert {name: scripts for name, scripts in different.items() if name not in MAY_DIFFER} == {}


@each_script
def test_lines_fit(path):
    assert max(len(line) for line in path.read_text().splitlines()) <= 120


@each_script
def test_the_parts_stay_short(path):
    algorithm, plumbing = split(path)
    code = algorithm.splitlines()[ast.parse(algorithm).body[0].end_lineno :]
    assert len(code) <= MAX_ALGORITHM_LINES[path.stem]
    assert len(plumbing.splitlines()) <= MAX_PLUMBING_LINES


# --- Flags ---


@each_script
def test_every_flag_has_help(path):
    lines = path.read_text().splitlines()
    (args,) = (node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == "Args")
    fields = {node.target.id: lines[node.end_lineno - 1] for node in args.body if isinstance(node, ast.AnnAssign)}
    assert fields
    assert [name for name, line in fields.items() if not re.search(r" # \w", line)] == []


@each_script
def test_every_flag_is_read(path):
    assert {field.name for field in dataclasses.fields(load(path).Args)} - args_read(path) == set()


@each_script
def test_nothing_reads_a_flag_that_does_not_exist(path):
    assert [name for name in args_read(path) if not hasattr(load(path).Args, name)] == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_commands_are_documented(source):
    assert commands(source)


@pytest.mark.parametrize("source, script, arguments", COMMANDS)
def test_documented_commands_parse(source, script, arguments, monkeypatch, tmp_path):
    assert (ROOT / script).exists(), f"{source.name} runs {script}"
    if "/" in script:
        return
    module = load(ROOT / script)
    monkeypatch.chdir(tmp_path)  # where no --run-dir exists yet
    # A command may ask for a GPU, a tracker or more memory than this machine has.
    monkeypatch.setattr(module, "select_device", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: True)))
    monkeypatch.setattr(module, "free_memory", lambda: 2**50, raising=False)
    if importlib.util.find_spec("Box2D") is None:  # optional, and installed by the line above the command
        arguments = ["CartPole-v1" if word == "LunarLander-v3" else word for word in arguments]
    tyro.cli(module.Args, args=arguments)


# --- Behaviour ---

IMPORT = """
import importlib, multiprocessing, os, random, signal, sys, threading
import numpy, torch

def state():
    return {
        "torch": torch.get_rng_state().tolist(), "numpy": str(numpy.random.get_state()), "random": random.getstate(),
        "signals": [signal.getsignal(s) for s in signal.valid_signals()], "threads": threading.enumerate(),
        "processes": multiprocessing.active_children(), "torch threads": torch.get_num_threads(),
        "files": os.listdir(), "start method": multiprocessing.get_start_method(allow_none=True),
    }

before = state()
sys.path.append(sys.argv[1])
importlib.import_module(sys.argv[2])
after = state()
assert after == before, [name for name in before if after[name] != before[name]]
assert not {"matplotlib", "wandb", "swanlab", "moviepy", "pygame"} & sys.modules.keys()
"""


@each_script
def test_importing_has_no_side_effect(path, python, tmp_path):
    done = python("-c", IMPORT, ROOT, path.stem)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def tiny(path) -> dict:
    """Return flags for a run of a second or two, as far as the script has them."""
    flags = {
        "total_timesteps": 400,
        "num_envs": 2,
        "time_limit": 20,
        "vec_env": "dummy",
        "seed": 3,
        "learning_starts": 100,
        "train_frequency": 4,
        "buffer_size": 1_000,
        "batch_size": 16,
        "num_steps": 50,  # of a rollout
        "eval_every": 200,
        "eval_episodes": 1,
        "final_eval_episodes": 2,
    }
    names = {field.name for field in dataclasses.fields(load(path).Args)}
    return {name: value for name, value in flags.items() if name in names}


@each_script
def test_a_script_copied_alone_trains(path, python, tmp_path):
    shutil.copy(path, tmp_path)
    flags = tiny(path)
    arguments = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    done = python(path.name, *arguments)
    assert done.returncode == 0, done.stderr

    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, "runs"}
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"[\w-]+__{path.stem}__3__[\d-]+", run_dir.name)
    files = {file.name for file in run_dir.iterdir()}
    assert {name for name in files if not name.startswith("events.out.tfevents")} == RUN_FILES < files

    result = json.loads((run_dir / "result.json").read_text())
    assert result.keys() >= RESULTS | ({"target_syncs"} if path.stem.startswith("dqn") else set())
    assert result["global_step"] >= 400
    assert result["gradient_steps"] > 0
    assert json.loads((run_dir / "args.json").read_text()).items() >= flags.items()

    rows = list(csv.DictReader((run_dir / "progress.csv").open()))
    assert [int(row["step"]) for row in rows if row["metric"] == "eval/return_mean"] == [200, 400]
    for name in ("best.pt", "last.pt"):
        torch.load(run_dir / name, weights_only=True)
