"""What a measurement was made with: the contents of its command.json."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def made_with(command: str, *packages: str) -> dict:
    """Return the command, the versions of Python, torch, Gymnasium, NumPy, SB3 and these, the machine, the commit."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "command": command,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "gymnasium", "stable-baselines3", "numpy", *packages)},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "commit": git.stdout.strip() or None,
    }


def write(folder: Path, contents: dict):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "command.json").write_text(json.dumps(contents, indent=2) + "\n")
