"""Measure what each kind of vector environment costs: transitions per second, and when SubprocVecEnv pays.

    python benchmarks/vec_env_cost.py                      # some 10 minutes, more with Ray; nothing else should run
    python benchmarks/vec_env_cost.py --plot-only

Random actions, no learning, with the environments that dqn_vecenv.py makes: CartPole, and an environment whose step is
made to wait or to compute for 0.1 to 100 ms; with EnvPool and Ray too, where they are installed. Writes
benchmarks/results/vec_env_cost/: cost.csv, every measurement; command.json; and docs/vec_env_cost.png. Prints the table
of docs/performance.md.
"""

import csv
import statistics
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import numpy as np
import record
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import slow_envs

import dqn_vecenv

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "vec_env_cost"
ENVS = {"CartPole-v1": "CartPole"}
for milliseconds in slow_envs.MILLISECONDS:
    for kind, verb in (("Wait", "waits"), ("Compute", "computes")):
        ENVS[f"slow_envs:{kind}{milliseconds}ms-v0".replace(".", "_")] = f"{verb} {milliseconds} ms"


@dataclass
class Args:
    num_envs: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])  # environments side by side
    seconds: float = 1.0  # length of a measurement
    rounds: int = 3  # measurements of each, in turn
    plot_only: bool = False  # draw and print what was measured before


def transitions_per_second(env_id: str, vec_env: str, num_envs: int, seconds: float) -> float:
    """Step with random actions for this long, after a warm-up of a tenth of it."""
    args = dqn_vecenv.Args(env_id=env_id, vec_env=vec_env, num_envs=num_envs, learning_starts=100)
    backends = {"envpool": dqn_vecenv.EnvPoolVecEnv, "ray": dqn_vecenv.RayVecEnv}
    envs = backends.get(vec_env, dqn_vecenv.make_envs)(args)
    actions = np.random.default_rng(0).integers(0, 2, (1_000, num_envs)).tolist()  # plain ints, as in the scripts
    envs.seed(0)
    envs.reset()
    steps, started, ends = 0, None, time.perf_counter() + seconds / 10
    while True:
        envs.step_async(actions[steps % 1_000])
        envs.step_wait()
        steps += 1
        if time.perf_counter() >= ends:
            if started is not None:
                break
            steps, started = 0, time.perf_counter()
            ends = started + seconds
    rate = steps * num_envs / (time.perf_counter() - started)
    envs.close()
    return rate


def measure(args: Args):
    """Write every measurement to cost.csv."""
    optional = [name for name in ("envpool", "ray") if find_spec(name)]
    command = f"python benchmarks/vec_env_cost.py --seconds {args.seconds:g} --rounds {args.rounds}"
    record.write(OUT, record.made_with(command, *optional))
    with open(OUT / "cost.csv", "w") as file:
        file.write("round,env,vec_env,num_envs,transitions_per_second\n")
        for number in range(args.rounds):
            for env_id, name in ENVS.items():
                for vec_env in ["dummy", "subproc", *optional]:
                    if vec_env == "envpool" and name != "CartPole":
                        continue
                    for num_envs in args.num_envs:
                        rate = transitions_per_second(env_id, vec_env, num_envs, args.seconds)
                        file.write(f"{number},{name},{vec_env},{num_envs},{rate:.1f}\n")
                        print(f"{name:16s} {vec_env:8s} {num_envs:2d} environments {rate:12,.0f}/s", flush=True)


def medians() -> dict:
    """Return {(env, vec_env): {num_envs: median transitions per second}}."""
    found = {}
    with open(OUT / "cost.csv") as file:
        for row in csv.DictReader(file):
            rates = found.setdefault((row["env"], row["vec_env"]), {}).setdefault(int(row["num_envs"]), [])
            rates.append(float(row["transitions_per_second"]))
    return {key: {n: statistics.median(rates) for n, rates in each.items()} for key, each in found.items()}


def table() -> str:
    """Return a Markdown table: a row per environment and backend, a column per number of environments."""
    found = medians()
    columns = sorted({n for each in found.values() for n in each})
    lines = ["| one step | `--vec-env` | " + " | ".join(f"{n}" for n in columns) + " |"]
    lines.append("|---|---|" + "---:|" * len(columns))
    for env, vec_env in sorted(found, key=lambda key: (list(ENVS.values()).index(key[0]), key[1] != "dummy")):
        rates = " | ".join(f"{found[env, vec_env][n]:,.0f}" for n in columns)
        lines.append(f"| {env} | {vec_env} | {rates} |")
    return "\n".join(lines)


def plot():
    """Draw how many times as fast as DummyVecEnv each backend is, in a panel per length of a step."""
    found = medians()
    panels = {"CartPole, 0.01 ms a step": ["CartPole"]}
    for milliseconds in ("0.1", "1", "10"):
        panels[f"{milliseconds} ms a step"] = [f"{verb} {milliseconds} ms" for verb in ("waits", "computes")]
    colours = {"subproc": "C0", "ray": "C1", "envpool": "C2"}
    figure, row = plt.subplots(1, len(panels), figsize=(9.6, 3.4), dpi=150, sharey=True)
    for axes, (title, envs) in zip(row, panels.items(), strict=True):
        for env, vec_env in [(env, vec_env) for env in envs for vec_env in colours if (env, vec_env) in found]:
            counts = sorted(found[env, vec_env])
            ratios = [found[env, vec_env][n] / found[env, "dummy"][n] for n in counts]
            line = "--" if env.startswith("computes") else "-"
            axes.plot(counts, ratios, line, marker="o", markersize=3, color=colours[vec_env])
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="environments", title=title, xlim=(0.9, 18))
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    row[0].set_ylabel("times as fast as DummyVecEnv")
    for vec_env, colour in colours.items():
        row[0].plot([], [], color=colour, label=vec_env)
    for kind, line in (("the step waits", "-"), ("the step computes", "--")):
        row[1].plot([], [], line, color="grey", label=kind)
    for axes in row[:2]:
        axes.legend(frameon=False, fontsize=8, loc="lower right" if axes is row[1] else "upper left")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "vec_env_cost.png")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if not args.plot_only:
        measure(args)
    plot()
    print(table())
