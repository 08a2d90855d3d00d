"""Run a script over seeds, and keep what each run reached.

    python benchmarks/run_seeds.py dqn_cartpole.py --seeds 1 2 3 4 5 6 7 8 9 10
    python benchmarks/run_seeds.py dqn_cartpole.py --seeds 1 2 3 --name eps_1e-8 --flags="--optimizer-eps 1e-8"
    python benchmarks/run_seeds.py dqn_atari.py --name breakout --collect runs/NAME
    python benchmarks/run_seeds.py dqn_cartpole.py --seeds 1 2 3 4 5 6 7 8 9 10 --ray auto

Writes benchmarks/results/NAME/: summary.csv, a row per seed; seed_N.csv, the evaluations and losses of that run as
step,metric,value; command.json, the command, the versions, the machine and the commit. A seed that has its row is not
run again, and results of another command or other versions are not added to: give another --name.
Times are worth something only with --jobs 1 and nothing else on the machine.

Over a cluster: --ray ADDRESS sends each seed to a free core of a Ray cluster (pip install ray). The address is Ray's:
auto (from a machine of the cluster), HOST:PORT, or local, which starts Ray on this machine. The scripts travel along;
what requirements.txt lists must be installed on every machine, in the same versions. Where Ray says InvalidAuthToken,
set RAY_AUTH_MODE=token.
"""

import csv
import importlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import record
import tyro

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("eval/return_mean", "eval/return_min", "train/return_mean_100", "train/loss", "train/q_taken", "train/entropy")
FROM_RESULT = (
    *("final_return_mean", "final_return_min", "final_return_std", "best_return_mean"),
    *("seconds", "global_step", "gradient_steps"),
)
COLUMNS = ("seed", *FROM_RESULT, "worst_late_evaluation")  # of summary.csv


@dataclass
class Args:
    script: tyro.conf.Positional[str]  # file name of the script
    seeds: list[int] = field(default_factory=lambda: list(range(1, 11)))  # one run each
    flags: str = ""  # further flags of the script
    name: str = ""  # directory under benchmarks/results (default: the script's name)
    jobs: int = 1  # runs at a time on this machine
    ray: str = ""  # address of a Ray cluster: a run on each of its cores
    collect: str = ""  # directory of a finished run: keep what it reached, run nothing


def worst_late(curve: list) -> float:
    """The lowest mean return of the evaluations in the last fifth of training; curve: [[step, mean, ...], ...]."""
    return min(mean for step, mean, *_ in curve if step > 0.8 * curve[-1][0])


def train(args: Args, out: Path, seed: int, root: Path = ROOT) -> dict:
    """Train one seed in a directory of its own and collect it."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        command = [sys.executable, str(root / args.script), "--seed", str(seed), "--run-dir", str(run_dir)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} if args.jobs > 1 else None
        subprocess.run([*command, *shlex.split(args.flags)], check=True, stdout=subprocess.DEVNULL, env=environment)
        return collect(run_dir, out)


def train_elsewhere(args: Args, seed: int) -> tuple[dict, str]:
    """Train one seed in a Ray task: its directory holds the repository, its disk is not ours, so the curves return."""
    with tempfile.TemporaryDirectory() as folder:
        row = train(args, Path(folder), seed, Path.cwd())
        return row, Path(folder, f"seed_{seed}.csv").read_text()


def ray_trainer(args: Args, out: Path):
    """Connect to Ray; return train_elsewhere as a function of the seed that waits for its end."""
    if find_spec("ray") is None:
        print("run_seeds: --ray needs a package that is not installed: pip install ray", file=sys.stderr)
        raise SystemExit(2)
    import ray

    ray.init(args.ray, runtime_env={"working_dir": str(ROOT), "excludes": ["docs", "benchmarks/results"]})
    task = ray.remote(num_cpus=1)(train_elsewhere)  # Ray sets OMP_NUM_THREADS to 1 with it

    def trainer(seed: int) -> dict:
        row, curves = ray.get(task.remote(args, seed))
        (out / f"seed_{seed}.csv").write_text(curves)
        return row

    return trainer


def collect(run_dir: Path, out: Path) -> dict:
    """Write the curves of a finished run to seed_N.csv; return its row of summary.csv."""
    result = json.loads((run_dir / "result.json").read_text())
    seed = json.loads((run_dir / "args.json").read_text())["seed"]
    rows = [line.split(",") for line in (run_dir / "progress.csv").read_text().splitlines()]
    counts = Counter(row[1] for row in rows)
    with open(out / f"seed_{seed}.csv", "w") as file:
        file.write("step,metric,value\n")
        seen = Counter()
        for step, metric, value in rows[1:]:
            if metric in KEPT:
                stride = max(1, counts[metric] // 200) if metric.startswith("train/") else 1  # 200 to 400 points each
                if seen[metric] % stride == 0 or seen[metric] == counts[metric] - 1:
                    file.write(f"{step},{metric},{value}\n")
                seen[metric] += 1
    row = {"seed": seed, **{name: result[name] for name in FROM_RESULT}}
    return {**row, "worst_late_evaluation": worst_late(result["evaluations"])}


def command_of(script: str, flags: dict) -> str:
    """Return the command of a run whose args.json holds these flags: those that are not the script's defaults."""
    sys.path.insert(0, str(ROOT))
    defaults = importlib.import_module(Path(script).stem).Args
    words = ["python", script, "--seed", "N"]
    for name, value in flags.items():
        if name not in ("seed", "run_dir", "resume") and value != getattr(defaults, name):
            flag = name.replace("_", "-")
            words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", f"{value}"]
    return " ".join(words)


def describe(out: Path, command: str, jobs):
    """Write command.json: what is run, with which versions, on what machine. Refuse to add to results of other runs."""
    summary, about = out / "summary.csv", out / "command.json"
    if summary.exists() and summary.read_text().splitlines()[0] != ",".join(COLUMNS):
        raise SystemExit(f"{summary} has other columns than {', '.join(COLUMNS)}; give another --name")
    contents = record.made_with(command)
    earlier = json.loads(about.read_text()) if about.exists() else {}
    for name, value in contents.items():
        if name != "commit" and earlier.get(name, value) != value:
            raise SystemExit(f"{about} has {name} {earlier[name]!r}, this run {value!r}; give another --name")
    record.write(out, {**earlier, **contents, "jobs": jobs})  # remarks stay


def seeds_to_run(seeds: list[int], out: Path) -> list[int]:
    """Return the seeds without a row in summary.csv; say which have one."""
    summary = out / "summary.csv"
    done = [int(line.split(",")[0]) for line in summary.read_text().splitlines()[1:]] if summary.exists() else []
    skipped = " ".join(str(seed) for seed in seeds if seed in done)
    if skipped:
        print(f"not run again, they have a row in {summary}: {skipped}; to run them, give another --name")
    return [seed for seed in seeds if seed not in done]


def add_row(row: dict, out: Path):
    """Append a seed's row to summary.csv, and say what it reached."""
    new = not (out / "summary.csv").exists()
    with open(out / "summary.csv", "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(f"seed {row['seed']}: final {row['final_return_mean']:.1f}, worst of the last fifth "
          f"{row['worst_late_evaluation']:.1f}, {row['seconds']:.1f} s", flush=True)  # fmt: skip


def main():
    args = tyro.cli(Args, description=__doc__)
    out = ROOT / "benchmarks" / "results" / (args.name or Path(args.script).stem)
    if args.collect:
        flags = json.loads(Path(args.collect, "args.json").read_text())
        if seeds_to_run([flags["seed"]], out):
            describe(out, command_of(args.script, flags), args.jobs)
            add_row(collect(Path(args.collect), out), out)
    elif seeds := seeds_to_run(args.seeds, out):
        command = f"python {args.script} --seed N {args.flags}".strip()
        trainer = ray_trainer(args, out) if args.ray else partial(train, args, out)
        describe(out, command, f"ray {version('ray')}" if args.ray else args.jobs)
        with ThreadPoolExecutor(len(seeds) if args.ray else args.jobs) as pool:  # Ray has a queue of its own
            runs = [pool.submit(trainer, seed) for seed in seeds]
            for run in as_completed(runs):
                if not run.exception():  # a seed that fails takes no other one along
                    add_row(run.result(), out)
        for run in runs:
            run.result()  # raises its error


if __name__ == "__main__":
    main()
