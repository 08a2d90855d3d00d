"""Draw the curves of a run, or of recorded runs over seeds.

    python benchmarks/plot.py runs/NAME                                    # writes runs/NAME/curves.png
    python benchmarks/plot.py dqn_cartpole --out docs/dqn_cartpole.png     # of benchmarks/results/dqn_cartpole
    python benchmarks/plot.py dqn_atari_breakout_main --metric train/return_mean_100 --out breakout.png

From five seeds on the thick line is their mean, the band its 95 % bootstrap interval; thin lines are single seeds.
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from table import bootstrap

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Args:
    names: tyro.conf.Positional[list[str]]  # one run directory, or directories under benchmarks/results
    out: str = ""  # the picture to write (default: curves.png in the run directory)
    metric: str = "eval/return_mean"  # what to draw, over seeds
    labels: list[str] | None = None  # names for the legend
    levels: dict[str, float] = field(default_factory=dict)  # dotted lines to compare with: name and height, in turn
    title: str = ""  # over the picture
    ylabel: str = "mean return of an evaluation"  # beside the picture


def curve(path: Path, metric: str) -> np.ndarray:
    """Return the steps and values of a metric in a progress.csv or seed_N.csv, (2, points)."""
    with open(path) as file:
        rows = [(int(row["step"]), float(row["value"])) for row in csv.DictReader(file) if row["metric"] == metric]
    return np.array(rows).reshape(-1, 2).T


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Return the mean of the last `width` values at each point, of fewer at the beginning."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_run(run_dir: Path, out: Path):
    """Draw the returns, the losses and, where it was logged, the mean Q of one run."""
    path = run_dir / "progress.csv"
    with open(path) as file:
        metrics = {row["metric"] for row in csv.DictReader(file)}
    losses = sorted(name for name in metrics if name.startswith("train/") and name.endswith("loss"))
    panels = [name for name in [*losses, "train/q_taken"] if name in metrics]
    figure, axes = plt.subplots(1 + len(panels), figsize=(7.2, 2.4 * (1 + len(panels))), sharex=True, squeeze=False)
    returns = axes[0, 0]
    steps, values = curve(path, "train/episode_return")
    returns.plot(steps, smoothed(values, 100), label="training episodes: mean of the last 100")
    returns.plot(*curve(path, "eval/return_mean"), "o-", markersize=3, label="evaluations, greedy")
    returns.set_title("returns")
    returns.legend(frameon=False)
    for axis, name in zip(axes[1:, 0], panels, strict=True):
        steps, values = curve(path, name)
        width = max(1, len(values) // 50)
        axis.plot(steps, values, alpha=0.25, color="C0")
        axis.plot(steps, smoothed(values, width), color="C0")
        axis.set_title("mean Q of a minibatch" if name == "train/q_taken" else name.removeprefix("train/"))
    for axis in axes[:, 0]:
        axis.grid(alpha=0.25)
    axes[-1, 0].set_xlabel("transitions")
    figure.tight_layout()
    figure.savefig(out, dpi=120)


def plot_seeds(args: Args):
    """Draw one curve per set of recorded runs."""
    figure, axes = plt.subplots(figsize=(7.2, 3.6), dpi=150)
    for index, name in enumerate(args.names):
        curves = [curve(path, args.metric) for path in sorted((RESULTS / name).glob("seed_*.csv"))]
        if not curves or not all(points.size for points in curves):
            raise SystemExit(f"plot: {RESULTS / name} has no curve of {args.metric}, or one of its seeds has none")
        colour = f"C{index}"
        label = args.labels[index] if args.labels else name
        few = len(curves) < 5  # too few for an interval: each curve stands for itself
        for points in curves:
            axes.plot(*points, color=colour, linewidth=1.0 if few else 0.6, alpha=1.0 if few else 0.45)
        if few:
            axes.lines[-1].set_label(label if len(curves) == 1 else f"{label}: {len(curves)} seeds")
        else:
            steps = np.unique(np.concatenate([steps for steps, _ in curves]))
            steps = steps[steps <= min(ends[-1] for ends, _ in curves)]  # as far as there are all of them
            values = np.array([np.interp(steps, *each) for each in curves])
            axes.fill_between(steps, *bootstrap(values), color=colour, alpha=0.3, linewidth=0)
            axes.plot(
                steps, values.mean(axis=0), color=colour, linewidth=2, label=f"{label}: mean of {len(curves)} seeds"
            )
    for index, (name, height) in enumerate(args.levels.items()):
        axes.axhline(height, color=f"{0.2 + 0.3 * index:g}", linewidth=1, linestyle=":", label=name)
        axes.update_datalim([(0, height)], updatex=False)
    axes.autoscale_view()
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
    axes.set(xlabel="transitions", ylabel=args.ylabel, title=args.title)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.locator_params(axis="x", nbins=6)  # more labels of seven digits would touch
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)


def main():
    args = tyro.cli(Args, description=__doc__)
    run_dir = Path(args.names[0])
    if (run_dir / "progress.csv").exists():
        plot_run(run_dir, Path(args.out or run_dir / "curves.png"))
    elif args.out:
        plot_seeds(args)
    else:
        raise SystemExit(f"plot: {run_dir} is no run directory; to draw recorded runs, give --out PICTURE")


if __name__ == "__main__":
    main()
