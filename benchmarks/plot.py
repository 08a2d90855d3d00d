"""Draw curves over seeds from the CSV files in benchmarks/results.

    python benchmarks/plot.py dqn_cartpole --out docs/dqn_cartpole.png
    python benchmarks/plot.py dqn_atari_breakout --metric train/return_mean_100 --out breakout.png

Thin lines are single seeds, the thick line is their mean at each step.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Args:
    names: tyro.conf.Positional[list[str]]  # directories under benchmarks/results
    out: str  # the picture to write
    metric: str = "eval/return_mean"  # what to draw
    labels: list[str] | None = None  # names for the legend
    title: str = ""  # over the picture
    ylabel: str = "return"  # beside the picture


def curve(path: Path, metric: str) -> np.ndarray:
    """Return the steps and values of a metric in a seed_N.csv, (2, points)."""
    with open(path) as file:
        rows = [(int(row["step"]), float(row["value"])) for row in csv.DictReader(file) if row["metric"] == metric]
    return np.array(rows).T


def main():
    args = tyro.cli(Args, description=__doc__)
    figure, axes = plt.subplots(figsize=(7.2, 3.6), dpi=150)
    for index, name in enumerate(args.names):
        curves = [curve(path, args.metric) for path in sorted((RESULTS / name).glob("seed_*.csv"))]
        colour = f"C{index}"
        label = args.labels[index] if args.labels else name
        if len(curves) == 1:
            axes.plot(*curves[0], color=colour, linewidth=0.8, label=label)
        else:
            for steps, values in curves:
                axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
            steps = np.unique(np.concatenate([steps for steps, _ in curves]))
            mean = np.mean([np.interp(steps, *each) for each in curves], axis=0)
            axes.plot(steps, mean, color=colour, linewidth=2, label=f"{label}: mean of {len(curves)} seeds")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
    axes.set(xlabel="transitions", ylabel=args.ylabel, title=args.title)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
