"""Kill runs at random moments with SIGKILL, resume them, and count what was lost.

    python benchmarks/kill.py --kills 200

Each run writes a checkpoint every few steps, so that many kills fall into the writing of one. After each kill the
checkpoint must load and must not be older than the one before; at the end the run is resumed without a kill, must end
with status 0, and its progress.csv must hold every evaluation once. Writes benchmarks/results/kill/kill.csv, a row per
script: kills; kills that came before the first checkpoint, so that the run began again; damaged checkpoints; steps back
to before an earlier checkpoint; evaluations missing or doubled.
"""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "kill"
EVAL_EVERY = 600
COMMON = f"--total-timesteps 100000000 --eval-every {EVAL_EVERY} --eval-episodes 1 --final-eval-episodes 1 "
DQN = COMMON + "--checkpoint-every 40 --learning-starts 200 --buffer-size 2000 --batch-size 16 --num-envs 2"
FLAGS = {
    "dqn_cartpole.py": DQN,
    "dqn_vecenv.py": DQN,
    "dqn_atari.py": DQN + " --time-limit 50 --checkpoint-memory",
    "dqn_lstm_cartpole.py": DQN,
    "ppo_cartpole.py": COMMON + "--checkpoint-every 40 --num-envs 2 --num-steps 40",
}


@dataclass
class Args:
    kills: int = 200  # in all, shared among the scripts
    seed: int = 1  # of the moments


def start(script: str, *flags: str) -> subprocess.Popen:
    """Start a run in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def torment(script: str, kills: int, rng: random.Random) -> dict:
    """Kill and resume a run this often, then let it end; return what was counted."""
    counted = {
        "script": script,
        "kills": kills,
        "began_again": 0,
        "damaged": 0,
        "steps_back": 0,
        "evaluations_wrong": 0,
    }
    with tempfile.TemporaryDirectory() as folder:
        run_dir, newest = Path(folder, "run"), 0
        for _ in range(kills):
            begin = not (run_dir / "last.pt").exists()
            if begin:
                shutil.rmtree(run_dir, ignore_errors=True)
            flags = [*FLAGS[script].split(), "--run-dir", str(run_dir)] if begin else ["--resume", str(run_dir)]
            process = start(script, *flags)
            if not process.stdout.readline():
                raise RuntimeError(f"{script} {' '.join(flags)}: {process.stderr.read()}")
            time.sleep(rng.uniform(0, 1))
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if not (run_dir / "last.pt").exists():
                counted["began_again"] += 1
                continue
            try:
                step = torch.load(run_dir / "last.pt", weights_only=True)["counts"]["global_step"]
            except Exception:  # whatever is wrong with the file
                counted["damaged"] += 1
                step = newest
            counted["steps_back"] += step < newest
            newest = step
        end = (newest // EVAL_EVERY + 2) * EVAL_EVERY
        begin = not (run_dir / "last.pt").exists()
        flags = [*FLAGS[script].split(), "--run-dir", str(run_dir)] if begin else ["--resume", str(run_dir)]
        process = start(script, *flags, "--total-timesteps", str(end))
        _, err = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"{script} does not end: {err}")
        with open(run_dir / "progress.csv") as file:
            found = [
                int(row["step"]) // EVAL_EVERY for row in csv.DictReader(file) if row["metric"] == "eval/return_mean"
            ]
        expected = list(range(1, end // EVAL_EVERY + 1))
        counted["evaluations_wrong"] = len(set(expected) ^ set(found)) + len(found) - len(set(found))
    return counted


def main():
    args = tyro.cli(Args, description=__doc__)
    rng, scripts = random.Random(args.seed), [name for name in FLAGS if (ROOT / name).exists()]
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / "kill.csv", "w", newline="") as file:
        writer = None
        for index, script in enumerate(scripts):
            row = torment(script, args.kills // len(scripts) + (index < args.kills % len(scripts)), rng)
            writer = writer or csv.DictWriter(file, row)
            if index == 0:
                writer.writeheader()
            writer.writerow(row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
