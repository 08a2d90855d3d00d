"""Kill runs at random moments with SIGKILL, resume them, and count what was lost.

    python benchmarks/kill.py --kills 100

Each run writes a checkpoint every few steps, so that many kills fall into the writing of one. After each kill the
checkpoints must load (where one does not, a new run begins) and must not be older than before, and progress.csv must
hold the episodes and evaluations that they remember. At the end the run is resumed without a kill and must end with
status 0. Writes benchmarks/results/kill/kill.csv, a row per script: kills; how many of them left a half-written file,
so fell into the writing of a checkpoint; damaged checkpoints; steps back to before an earlier checkpoint; rows of
progress.csv that were lost or doubled.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path

import record
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
    kills: int = 100  # in all, shared among the scripts
    seed: int = 1  # of the moments


@contextmanager
def started(script: str, *flags: str):
    """A run in a process group of its own, which is killed where the block ends, in whichever way."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def read(run_dir: Path) -> list[tuple[int, str, float]]:
    """Return (step, metric, value) of each row of progress.csv; a kill may have cut off the last one."""
    lines = (run_dir / "progress.csv").read_text().split("\n")[1:-1]
    return [(int(step), metric, float(value)) for step, metric, value in csv.reader(lines)]


def wrong_rows(rows: list[tuple[int, str, float]], checkpoint: dict) -> int:
    """Return how many rows up to the checkpoint are not those that it remembers: too many, too few or in disorder."""
    step, record = checkpoint["counts"]["global_step"], checkpoint["record"]
    steps = [row[0] for row in rows if row[0] <= step]
    returns = [value for at, metric, value in rows if at <= step and metric == "train/episode_return"]
    evaluations = [(at, value) for at, metric, value in rows if at <= step and metric == "eval/return_mean"]
    remembered = [(at, mean) for at, mean, _ in record["evaluations"]]
    return sum(
        [
            sum(a != b for a, b in zip_longest(returns[-100:], record["returns"])),
            sum(a != b for a, b in zip_longest(evaluations, remembered)),
            sum(a > b for a, b in pairwise(steps)),
        ]
    )


def torment(script: str, kills: int, rng: random.Random) -> dict:
    """Kill and resume a run this often, then let it end; return what was counted."""
    counted = dict.fromkeys(("kills", "while_writing", "damaged", "steps_back", "rows_wrong"), 0)
    with tempfile.TemporaryDirectory() as folder:
        run_dir, newest = Path(folder, "run"), 0
        flags = afresh = [*FLAGS[script].split(), "--run-dir", str(run_dir)]
        for _ in range(kills):
            with started(script, *flags) as process:
                began = process.stdout.readline()
                while began and not (run_dir / "last.pt").exists() and process.poll() is None:  # nothing to lose yet
                    time.sleep(0.01)
                if not began or process.poll() is not None:
                    raise RuntimeError(f"{script} {' '.join(flags)}: {process.stderr.read()}")
                time.sleep(rng.uniform(0, 1))
            counted["kills"] += 1
            half_written = list(run_dir.glob("*.tmp"))
            counted["while_writing"] += len(half_written) > 0
            for file in half_written:  # or it would be counted again after the next kill
                file.unlink()
            flags = ["--resume", str(run_dir)]
            try:
                checkpoint = torch.load(run_dir / "last.pt", weights_only=True)
                if (run_dir / "best.pt").exists():
                    torch.load(run_dir / "best.pt", weights_only=True)
            except Exception:  # whatever is wrong with the file
                counted["damaged"] += 1
                shutil.rmtree(run_dir)
                flags, newest = afresh, 0
                continue
            counted["rows_wrong"] += wrong_rows(read(run_dir), checkpoint)
            counted["steps_back"] += checkpoint["counts"]["global_step"] < newest
            newest = checkpoint["counts"]["global_step"]
        end = (newest // EVAL_EVERY + 2) * EVAL_EVERY
        with started(script, *flags, "--total-timesteps", str(end)) as process:
            _, err = process.communicate(timeout=300)
        if process.returncode != 0:
            raise RuntimeError(f"{script} fails: {err}")
        rows = read(run_dir)
        counted["rows_wrong"] += wrong_rows(rows, torch.load(run_dir / "last.pt", weights_only=True))
        evaluated = [step // EVAL_EVERY for step, metric, _ in rows if metric == "eval/return_mean"]
        expected = range(1, end // EVAL_EVERY + 1)
        counted["rows_wrong"] += sum(a != b for a, b in zip_longest(evaluated, expected))
    return {"script": script, **counted}


def main():
    args = tyro.cli(Args, description=__doc__)
    rng, scripts = random.Random(args.seed), list(FLAGS)
    record.write(OUT, record.made_with(f"python benchmarks/kill.py --kills {args.kills}"))
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
