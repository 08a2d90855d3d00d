"""Print the tables of docs/results.md, of the results in benchmarks/results/NAME/summary.csv.

python benchmarks/table.py dqn_cartpole ppo_cartpole                        # a row per set of runs
python benchmarks/table.py --settings dqn_lstm_popgym 2                     # a row per NAME_*, two digits
"""

import csv
import json
import sys
from math import comb
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent / "results"


def lowest_rate(hits: int, n: int) -> float:
    """Return the rate with which `hits` or more of n have a probability of 2.5 %: below it they are less likely."""
    low, high = 0.0, 1.0
    for _ in range(50):
        rate = (low + high) / 2
        likely = sum(comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(hits, n + 1)) >= 0.025
        low, high = (low, rate) if likely else (rate, high)
    return low


def rate_interval(hits: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a rate (Clopper & Pearson 1934): ten of ten say that it is 69 % or more."""
    return lowest_rate(hits, n), 1.0 - lowest_rate(n - hits, n)


def bootstrap(values: np.ndarray) -> np.ndarray:
    """Return the 95 % bootstrap interval of the mean over seeds: (seeds, ...) -> (2, ...)."""
    draws = np.random.default_rng(0).integers(len(values), size=(1_000, len(values)))
    return np.percentile(values[draws].mean(axis=1), [2.5, 97.5], axis=0)


def row_of(name: str) -> str:
    """Return one row of a Markdown table, of all seeds: under HEAD."""
    with open(RESULTS / name / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    finals, late = ([float(row[column]) for row in rows] for column in ("final_return_mean", "worst_late_evaluation"))

    def share(hits: int) -> str:
        low, high = (100 * rate for rate in rate_interval(hits, len(rows)))
        return f"{hits} of {len(rows)} ({low:.3g} to {high:.3g} %)"

    return (
        f"| [`{name}`](../benchmarks/results/{name}) | {share(sum(final >= 499.95 for final in finals))} "
        f"| {share(sum(final >= 475 for final in finals))} | {min(finals):.1f} | {np.mean(finals):.1f} "
        f"| {sum(worst >= 475 for worst in late)} |"
    )


def settings(name: str, digits: int = 0) -> str:
    """Return a Markdown table of the sets of runs whose names start with this: flags, and each seed's final return."""
    lines = ["| flags | final network, each seed | mean |", "|---|---:|---:|"]
    folders = sorted(RESULTS.glob(f"{name}*"))
    if not folders:
        raise SystemExit(f"table: no {RESULTS / name}*; make it with run_seeds.py --name {name}_...")
    for folder in folders:
        with open(folder / "summary.csv") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: int(row["seed"]))
        flags = json.loads((folder / "command.json").read_text())["command"].partition("--seed N")[2].strip()
        finals = [float(row["final_return_mean"]) for row in rows]
        each = ", ".join(f"{final:.{digits}f}" for final in finals)
        mean = f"{sum(finals) / len(finals):.{digits}f}"
        lines.append(f"| [`{flags}`](../benchmarks/results/{folder.name}) | {each} | {mean} |")
    return "\n".join(lines)


HEAD = """| runs | final at 500.0 | at 475 or more | lowest final | mean final | none below 475 in the last fifth |
|---|---:|---:|---:|---:|---:|"""

if __name__ == "__main__":
    if sys.argv[1] == "--settings":
        print(settings(sys.argv[2], *map(int, sys.argv[3:])))
    else:
        print(HEAD, *map(row_of, sys.argv[1:]), sep="\n")
