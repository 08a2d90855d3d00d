"""What every script in the root has in common: its shape, its sections, its plumbing, its length."""

import ast
import dataclasses
import difflib
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections import defaultdict
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, load, rows_of, small, words

README = ROOT / "README.md"
OPTIONAL = {"wandb", "swanlab", "envpool", "ray"}  # imported only where a run asks for one
DISTRIBUTIONS = {"ale_py": "ale-py", "cv2": "opencv-python-headless", "stable_baselines3": "stable-baselines3"}
SECTIONS = ["Arguments", "Network", "Replay memory|Rollout", "Equations", "Training", "Evaluation", "Environment"]
# What an algorithm is made of. Any other function or class that two scripts have is the same text in both.
# (ppo_cartpole.py's FlatEnv takes continuous actions too.)
MAY_DIFFER = {"Args", "make_env", "QNetwork", "ReplayMemory", "Batch", "td_loss", "train", "evaluate"}
# How many lines of dqn_cartpole.py's functions the others' lack: where the algorithms differ, and nowhere else.
OWN_LINES = {
    "dqn_vecenv": {"train": 1, "evaluate": 0},
    "dqn_atari": {"train": 22, "evaluate": 4},
    "dqn_lstm_cartpole": {"train": 10, "evaluate": 2, "make_env": 1},
    "ppo_cartpole": {"train": 49, "evaluate": 1, "make_env": 0},
}
# Of the plumbing: all lines, and those that are neither blank nor comment nor docstring.
MAX_PLUMBING, MAX_PLUMBING_CODE = 240, 190
MAX_LINES = {"dqn_cartpole": 620, "dqn_vecenv": 717, "ppo_cartpole": 654, "dqn_lstm_cartpole": 783, "dqn_atari": 912}
MAX_DOCSTRING = defaultdict(lambda: 50, dqn_cartpole=30, dqn_vecenv=30, ppo_cartpole=30)
RUN_FILES = {"args.json", "progress.csv", "best.pt", "last.pt", "result.json"}
RESULTS = {
    *("global_step", "gradient_steps", "seconds", "final_return_mean", "final_return_min", "final_return_std"),
    *("best_return_mean", "evaluations", "run_dir"),
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
    """Return {name: text} of functions, classes (with their decorators) and constants above the divider."""
    algorithm, _ = split(path)
    lines = algorithm.splitlines()
    found = {}
    for node in ast.parse(algorithm).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign) and node.targets[0].id != "SCRIPT":
            found[node.targets[0].id] = lines[node.lineno - 1]
    return found


def lines_of_code(text):
    """Return how many lines are neither blank nor comment nor docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented) and ast.get_docstring(node)]
    docstrings = {line for node in nodes for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    lines = enumerate(text.splitlines(), start=1)
    return sum(bool(re.match(r"\s*[^\s#]", line)) and number not in docstrings for number, line in lines)


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


SOURCES = [*SCRIPTS, README, *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [(source, *command) for source in SOURCES for command in commands(source)]


# --- One file, and what it needs ---


@each_script
def test_optional_packages_are_imported_only_inside_a_function(path):
    assert [name for name, inside, _ in imports(ast.parse(path.read_text())) if name in OPTIONAL and not inside] == []


@each_script
def test_the_licence_is_the_first_line(path):
    assert path.read_text().splitlines()[0] == "# SPDX-License-Identifier: MIT"


@each_script
def test_metadata_pins_what_requirements_pin(path):
    required = pins((ROOT / "requirements.txt").read_text().splitlines())
    listed = pins(metadata(path)["dependencies"])
    assert listed == {name: required.get(name) for name in listed}
    assert metadata(path)["requires-python"] == ">=3.11,<3.14"


@each_script
def test_metadata_lists_what_the_script_needs(path):
    # tensorboard hides behind torch.utils.tensorboard; Gymnasium draws with pygame and films with moviepy.
    indirect = {"tensorboard", "pygame", "moviepy"}
    assert third_party(path) | indirect == pins(metadata(path)["dependencies"]).keys()


# --- One shape ---


@each_script
def test_sections_stand_in_the_agreed_order(path):
    algorithm, plumbing = split(path)
    banners = re.findall(r"(?m)^# === (.+?) =+$", algorithm)
    assert len(banners) == len(SECTIONS)
    assert all(re.fullmatch(section, banner) for section, banner in zip(SECTIONS, banners, strict=True)), banners
    assert "# ===" not in plumbing


def test_plumbing_is_one_text():
    texts = defaultdict(list)
    for path in SCRIPTS:
        texts[split(path)[1]].append(path.stem)
    assert len(texts) == 1, f"these differ from one another: {list(texts.values())}"


def test_what_scripts_share_is_one_text():
    texts = defaultdict(lambda: defaultdict(list))
    for path in SCRIPTS:
        for name, text in definitions(path).items():
            if (path.stem, name) != ("ppo_cartpole", "FlatEnv"):
                texts[name][text].append(path.stem)
    different = {name: list(by_text.values()) for name, by_text in texts.items() if len(by_text) > 1}
    assert {name: scripts for name, scripts in different.items() if name not in MAY_DIFFER} == {}


@pytest.mark.parametrize("name, function", [(name, function) for name, own in OWN_LINES.items() for function in own])
def test_the_loops_differ_only_where_the_algorithms_do(name, function):
    base, other = (definitions(ROOT / f"{script}.py")[function].splitlines() for script in ("dqn_cartpole", name))
    lacking = [line for line in base if line not in other]
    assert len(lacking) == OWN_LINES[name][function], "\n".join(lacking)


def test_dqn_vecenv_is_dqn_cartpole_with_other_vector_environments():
    """What is tested on the one need not be tested on the other."""
    base, other = (definitions(ROOT / f"{name}.py") for name in ("dqn_cartpole", "dqn_vecenv"))
    assert other.keys() - base.keys() == {"EnvPoolVecEnv", "RayVecEnv"} and base.keys() <= other.keys()
    lines = {name: difflib.ndiff(text.splitlines(), other[name].splitlines()) for name, text in base.items()}
    changed = {name: [line[2:].split() for line in lines if line[0] in "+-"] for name, lines in lines.items()}
    starts = {name: [line[0] for line in lines] for name, lines in changed.items() if lines}
    assert starts == {"Args": ["vec_env:"] * 2, "train": ["envs"] * 2}


@each_script
def test_the_parts_stay_short(path):
    text, (_, plumbing) = path.read_text(), split(path)
    docstring = ast.parse(text).body[0]
    assert len(plumbing.splitlines()) <= MAX_PLUMBING
    assert lines_of_code(plumbing) <= MAX_PLUMBING_CODE
    assert docstring.end_lineno - docstring.lineno + 1 <= MAX_DOCSTRING[path.stem]
    assert len(text.splitlines()) <= MAX_LINES[path.stem]


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
    if "class Args" not in (text := (ROOT / script).read_text()):
        assert all(word in text for word in arguments if word.startswith("--"))
        return
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = load(ROOT / script)
    monkeypatch.chdir(tmp_path)  # where no --run-dir exists yet
    for name in OPTIONAL:  # a command may ask for one that is not installed
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    args = tyro.cli(module.Args, args=arguments)
    if script == "benchmarks/run_seeds.py":  # the flags that it hands on
        tyro.cli(load(ROOT / args.script).Args, args=shlex.split(args.flags))


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
for script in sys.argv[2:]:
    importlib.import_module(script)
    after = state()
    assert after == before, (script, [name for name in before if after[name] != before[name]])
    assert not {"matplotlib", "wandb", "swanlab", "moviepy", "pygame"} & sys.modules.keys(), script
"""


def test_importing_has_no_side_effect(python, tmp_path):
    done = python("-c", IMPORT, ROOT, *(path.stem for path in SCRIPTS))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@each_script
def test_a_script_copied_alone_trains(path, python, tmp_path):
    shutil.copy(path, tmp_path)
    flags = small(path.stem)
    done = python(path.name, *words(flags))
    assert done.returncode == 0, done.stderr

    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, "runs"}
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"[\w-]+__{path.stem}__3__[\d-]+", run_dir.name)
    assert "steps/s" not in done.stderr  # no bar where there is no terminal
    files = {file.name for file in run_dir.iterdir()}
    assert {name for name in files if not name.startswith("events.out.tfevents")} == RUN_FILES < files

    result = json.loads((run_dir / "result.json").read_text())
    assert result.keys() >= RESULTS
    assert result["global_step"] == 400
    assert result["gradient_steps"] > 0
    assert json.loads((run_dir / "args.json").read_text()).items() >= flags.items()

    evaluations = [[step, value] for step, metric, value in rows_of(run_dir) if metric == "eval/return_mean"]
    assert [step for step, _ in evaluations] == [200, 400]
    assert [row[:2] for row in result["evaluations"]] == evaluations
    for name in ("best.pt", "last.pt"):
        torch.load(run_dir / name, weights_only=True)
