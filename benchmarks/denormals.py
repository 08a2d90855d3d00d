"""Time Adam's step after 9,000 gradient steps of dqn_atari.py, with denormal numbers and with zeros in their place.

    python benchmarks/denormals.py     # 4 minutes; nothing else should run

Where a unit is dead its gradients are zero. Adam's running mean of them, m <- 0.9 m, shrinks by a tenth at every step,
and after some 800 steps is smaller than 1.2e-38, the smallest float32 with all of its bits. Below that stand the
denormal numbers, which lose a bit with each halving; at a few times the smallest of them, 1.4e-45, 0.9 m is rounded
back to m, and never becomes zero. A processor computes with them more slowly.

Trains dqn_atari.py on Pong, a short run that learns from 2,000 transitions on, without torch.set_flush_denormal; counts
the denormal numbers among Adam's means, and times the median of 200 steps from there, with gradients of zero, on one
thread, with the mode and without. Writes benchmarks/results/denormals/denormals.csv.
"""

import copy
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from atari_memory import write_row

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "denormals"


@dataclass
class Args:
    total_timesteps: int = 56_000  # transitions, of which the first 2,000 are not learned from
    out: str = str(OUT)  # directory of the CSV file


def train(args: Args) -> dict:
    """Return the last checkpoint of a run that keeps denormal numbers."""
    sys.path.insert(0, str(ROOT))
    import dqn_atari

    set_flush_denormal, torch.set_flush_denormal = torch.set_flush_denormal, lambda mode: None
    with tempfile.TemporaryDirectory() as folder:
        dqn_atari.train(
            dqn_atari.Args(
                **{"env_id": "PongNoFrameskip-v4", "run_dir": f"{folder}/run"},
                **{"total_timesteps": args.total_timesteps, "learning_starts": 2_000, "buffer_size": 60_000},
                **{"eval_every": 10**9, "final_eval_episodes": 1},
            )
        )
        torch.set_flush_denormal = set_flush_denormal
        return torch.load(f"{folder}/run/last.pt", weights_only=True)


def share_of_denormals(optimizer_state: dict) -> float:
    """Return which share of Adam's running means is denormal."""
    means = torch.cat([entry["exp_avg"].flatten() for entry in optimizer_state.values()]).abs()
    return ((means > 0.0) & (means < torch.finfo(torch.float32).tiny)).float().mean().item()


def milliseconds(checkpoint: dict, flush: bool) -> float:
    """Return the median of 200 steps of Adam from the checkpoint's state, with gradients of zero."""
    if not torch.set_flush_denormal(flush):
        raise SystemExit("denormals: this processor cannot take denormal numbers for zeros")
    parameters = [torch.nn.Parameter(p.clone()) for p in checkpoint["network"].values()]
    optimizer = torch.optim.Adam(parameters, fused=True)
    optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    seconds = []
    for _ in range(200):
        before = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - before)
    torch.set_flush_denormal(False)
    return 1e3 * statistics.median(seconds)


def measure(args: Args) -> dict:
    checkpoint = train(args)
    torch.set_num_threads(1)  # the mode belongs to a thread
    return {
        "gradient_steps": checkpoint["counts"]["gradient_steps"],
        "parameters": sum(p.numel() for p in checkpoint["network"].values()),
        "share_of_denormals": round(share_of_denormals(checkpoint["optimizer"]["state"]), 3),
        "step_ms_with_denormals": round(milliseconds(checkpoint, flush=False), 2),
        "step_ms_flushed": round(milliseconds(checkpoint, flush=True), 2),
    }


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    command = f"python benchmarks/denormals.py --total-timesteps {args.total_timesteps}"
    write_row(measure(args), Path(args.out, "denormals.csv"), command)
