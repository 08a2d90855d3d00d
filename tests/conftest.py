"""What the tests share: the scripts, and a way to run one as a user does."""

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
assert SCRIPTS, f"no script in {ROOT}: every test below would pass for want of one"

# The scripts are imported by name, so that worker processes can import them too.
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws without a screen
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
torch.set_num_threads(1)
# Where CI is set pytest writes out the whole difference of two values: of two memories of frames that takes it minutes.
for name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(name, None)


def load(path: Path):
    return importlib.import_module(path.stem)


def environment() -> dict:
    """Of a subprocess: one thread, and nothing of the repository on its path."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(autouse=True)
def denormal_numbers():
    """Give the next test the numbers that dqn_atari.train takes for zeros."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def python(tmp_path):
    """Run Python with these arguments in tmp_path, with stdin closed."""

    def run(*args, timeout: float = 120, **env) -> subprocess.CompletedProcess:
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
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run
