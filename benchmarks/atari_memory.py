"""Measure the memory of dqn_atari.py's main process, with a replay memory that is full.

    python benchmarks/atari_memory.py                    # a million transitions: needs 8.2 GB
    python benchmarks/atari_memory.py --buffer-size 30000

It writes to every page of the replay memory, as a full one has been, trains for a few dozen gradient steps with games
in worker processes, evaluates, and writes a checkpoint; then it reads the process's highest resident size. Writes
benchmarks/results/atari_memory/atari_memory.csv.
"""

import csv
import resource
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import record
import tyro

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "atari_memory"


@dataclass
class Args:
    buffer_size: int = 1_000_000  # transitions in the replay memory
    num_envs: int = 8  # games that step side by side
    out: str = str(OUT)  # directory of the CSV file


def measure(buffer_size: int, num_envs: int) -> dict:
    """Return bytes: of the frames, of the whole replay memory, and the highest resident size of this process."""
    sys.path.insert(0, str(ROOT))
    import dqn_atari

    sizes, allocate = {}, dqn_atari.ReplayMemory.__init__

    def fill(memory, *args):
        allocate(memory, *args)
        for array in memory.arrays.values():
            array.fill(0)  # the pages of a fresh array are taken when they are first written
        total = sum(array.nbytes for array in memory.arrays.values())
        sizes.update(frames=memory.arrays["frames"].nbytes, memory=total)

    dqn_atari.ReplayMemory.__init__ = fill
    with tempfile.TemporaryDirectory() as folder:
        every = {"learning_starts": 400, "total_timesteps": 600, "eval_every": 300, "checkpoint_every": 300}
        games = {"num_envs": num_envs, "time_limit": 100, "eval_episodes": 5, "final_eval_episodes": 5}
        dqn_atari.train(dqn_atari.Args(buffer_size=buffer_size, run_dir=f"{folder}/run", **every, **games))
    kilobyte = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss
    return {**sizes, "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte}


def write_row(row: dict, path: Path, command: str):
    """Write a CSV file of one row, and print it."""
    record.write(path.parent, record.made_with(command, "ale-py"))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    print("  ".join(f"{name}: {value}" for name, value in row.items()))


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    sizes = measure(args.buffer_size, args.num_envs)
    row = {"transitions": args.buffer_size, **sizes, "everything_else": sizes["process"] - sizes["memory"]}
    command = f"python benchmarks/atari_memory.py --buffer-size {args.buffer_size} --num-envs {args.num_envs}"
    write_row(row, Path(args.out, "atari_memory.csv"), command)
