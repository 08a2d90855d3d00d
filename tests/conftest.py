"""What the tests share: the scripts, small runs of them, and a way to run one as a user does."""

import csv
import dataclasses
import importlib
import os
import runpy
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
assert SCRIPTS, f"no script in {ROOT}: every test below would pass for want of one"

# The scripts are imported by name, so that worker processes can import them too.
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "docs" / "examples")]

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws without a screen
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
torch.set_num_threads(1)
# Where CI is set pytest writes out the whole difference of two values: of two memories of frames that takes it minutes.
for name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(name, None)


SMALL = {
    "total_timesteps": 400,
    "num_envs": 2,
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


def load(path: Path):
    return importlib.import_module(path.stem)


def small(name: str, **changes) -> dict:
    """Return flags for a run of less than a second, as far as the script has them."""
    names = {field.name for field in dataclasses.fields(load(Path(name)).Args)}
    slow = {"dqn_atari": {"train_frequency": 40, "time_limit": 20}, "dqn_lstm_cartpole": {"train_frequency": 20}}
    flags = SMALL | slow.get(name, {})
    return {name: value for name, value in flags.items() if name in names} | changes


def words(flags: dict) -> list[str]:
    """Return flags as they stand on a command line."""
    return [str(word) for flag, value in flags.items() for word in (f"--{flag.replace('_', '-')}", value)]


def train(name: str, run_dir: Path, **changes) -> dict:
    """Run a script's train() with small flags; "resume" among the changes goes on with that run."""
    module = load(Path(name))
    return module.train(module.Args(**small(name, run_dir=str(run_dir), **changes)))


def count_updates(module, monkeypatch) -> Counter:
    """Count, from now on, how often each network is moved towards another one, or loaded."""
    owner, name = (
        (module, "update_target") if hasattr(module, "update_target") else (module.QNetwork, "load_state_dict")
    )
    update, counts = getattr(owner, name), Counter()

    def counting(network, *rest):
        counts[id(network)] += 1
        return update(network, *rest)

    monkeypatch.setattr(owner, name, counting)
    return counts


def same(a, b):
    """Whether two checkpoints, or parts of them, are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Interrupted(BaseException):
    """Ends a run as a kill does: no handler of the scripts catches it."""


def checkpoint_of(run_dir: Path, name: str = "last.pt") -> dict:
    return torch.load(run_dir / name, weights_only=True)


def rows_of(run_dir: Path) -> list[tuple[int, str, float]]:
    """Return (step, metric, value) of each row of progress.csv."""
    with open(run_dir / "progress.csv") as file:
        return [(int(row["step"]), row["metric"], float(row["value"])) for row in csv.DictReader(file)]


def environment() -> dict:
    """Of a subprocess: one thread, nothing of the repository on its path, output buffered as Python does it."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONUNBUFFERED")}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(autouse=True)
def denormal_numbers():
    """Give the next test the numbers that dqn_atari.train takes for zeros."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def python(tmp_path):
    """Run Python with these arguments in tmp_path, with stdin closed."""

    def run(*args, timeout: float = 300, **env) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**environment(), **env},
        )

    return run


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Run a script as `python dqn_cartpole.py` does, in tmp_path; return status, stdout and stderr."""

    def run(*arguments, script="dqn_cartpole.py"):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        if isinstance(status, str):  # a message: Python prints it and exits with status 1
            status, err = 1, f"{err}{status}\n"
        return status, out, err

    return run
