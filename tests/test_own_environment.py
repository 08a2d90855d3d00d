"""docs/own_environment.md shows the files that were run, the figures of the raw data, the messages as printed."""

import csv
import json
import re
import shlex
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import tyro
from conftest import ROOT, load

EXAMPLES = ROOT / "docs" / "examples"
RESULTS = ROOT / "benchmarks" / "results"
ENGLISH, CHINESE = ((ROOT / "docs" / f"own_environment{language}.md").read_text() for language in ("", ".zh-CN"))
RUNS = ["own_corridor", "own_minigrid", "own_arm"]

each_language = pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["en", "zh"])


def blocks(text, kind):
    return re.findall(rf"(?ms)^```{kind}\n(.*?)^```", text)


def make(monkeypatch, needs, env_id):
    pytest.importorskip(needs)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return gym.make(env_id)


# --- What is shown ---


@each_language
def test_each_block_is_the_text_of_its_file(text):
    names = ("minigrid_pixels", "nine_torques", "own_program")
    assert blocks(text, "python") == [(EXAMPLES / f"{name}.py").read_text() for name in names]


# --- What was run ---


def test_the_commands_shown_are_those_of_the_raw_data():
    shown = [line for block in blocks(ENGLISH, "bash") for line in block.splitlines()]
    for name in RUNS:
        command = json.loads((RESULTS / name / "command.json").read_text())["command"]
        assert f"PYTHONPATH=docs/examples {command.replace(' --seed N', '')}" in shown


@each_language
@pytest.mark.parametrize("name", RUNS)
def test_the_returns_shown_are_those_of_the_raw_data(name, text):
    digits = 2 if name in ("own_corridor", "own_minigrid") else 1
    rows = csv.DictReader((RESULTS / name / "summary.csv").open())
    assert f"| {', '.join(format(float(row['final_return_mean']), f'.{digits}f') for row in rows)} |" in text


@each_language
def test_the_estimates_shown_are_those_of_the_raw_data(text):
    last = []
    for path in sorted((RESULTS / "own_arm").glob("seed_*.csv")):
        values = [float(row["value"]) for row in csv.DictReader(path.open()) if row["metric"] == "train/q_taken"]
        assert max(values) < 0
        last.append(f"{values[-1]:.1f}")
    assert f" {', '.join(last)}" in text


@each_language
def test_the_baselines_shown_are_those_of_the_raw_data(text):
    for row in csv.DictReader((RESULTS / "own_baselines" / "baselines.csv").open()):
        assert re.search(rf"\| *{re.escape(row['mean'])} *(\||,)", text), row


@pytest.mark.parametrize("env_id, flags, mean", [
    ("corridor:Corridor-v0", (), "-27.81"), ("corridor:Corridor-v0", ("--always", "1"), "-4.52"),
    ("Pendulum-v1", ("--always", "0"), "-1180.29"),  # no torque
])  # fmt: skip
def test_the_baselines_come_from_their_command(env_id, flags, mean):
    command = [sys.executable, EXAMPLES / "baselines.py", env_id, *flags]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.startswith(f"return {mean} over 100 episodes")


# --- What the examples do ---


def test_pixels_are_one_frame(monkeypatch):
    env = make(monkeypatch, "minigrid", "minigrid_pixels:EmptyRoomPixels-v0")
    frames = [env.reset(seed=seed)[0] for seed in range(5)]
    assert env.observation_space == gym.spaces.Box(0, 255, (84, 84), np.uint8)
    assert all(frame.shape == (84, 84) and frame.dtype == np.uint8 for frame in frames)
    assert len({frame.tobytes() for frame in frames}) > 1  # the agent starts somewhere else each time


def test_nine_torques_are_the_pairs_of_three(monkeypatch):
    env = make(monkeypatch, "mujoco", "nine_torques:NineTorques-v0")
    assert env.action_space == gym.spaces.Discrete(9)
    torques = [env.get_wrapper_attr("action")(np.int64(action)).tolist() for action in range(9)]
    sizes = (-0.1, 0.0, 0.1)
    np.testing.assert_allclose(torques, [[first, second] for first in sizes for second in sizes], atol=1e-6)


def test_a_program_of_ones_own_trains_with_workers(python, tmp_path):
    done = python(EXAMPLES / "own_program.py", PYTHONPATH=f"{ROOT}:{EXAMPLES}")
    assert done.returncode == 0, done.stderr
    mean = re.search(r"^return (\S+) at the end$", done.stdout, re.MULTILINE)[1]
    assert -4.5 > float(mean) > -8.0  # the shortest way: -5 on average
    assert len(list(tmp_path.glob("runs/*"))) == 1  # no worker has trained too


# --- What is refused ---


def refusals():
    for block in blocks(ENGLISH, "console"):
        for command, message in re.findall(r"(?m)^\$ (.*)\n(.*)$", block):
            yield pytest.param(command, message, id=command.split()[-1])


@pytest.mark.parametrize("command, message", list(refusals()))
def test_a_refusal_is_printed_as_shown(command, message, monkeypatch):
    for name, package in {"minigrid_pixels": "minigrid", "CarRacing": "Box2D"}.items():
        if name in command:
            pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script, *flags = shlex.split(command.removeprefix("PYTHONPATH=docs/examples ").removeprefix("python "))
    module = load(ROOT / script)
    with pytest.raises(module.UsageError) as error:
        module.make_env(tyro.cli(module.Args, args=flags))
    assert f"{module.SCRIPT}: {error.value}" == message
