"""Draw the pictures of docs/tour.md; print the delays in Breakout that it quotes.

    python benchmarks/drawings.py
    python benchmarks/drawings.py --out DIRECTORY

What can be computed by a script's own function is: the clipped objective comes from ppo_loss, its gradient from
autograd, the delays from games of AtariGame.
"""

import contextlib
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro

matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import matplotlib.pyplot as plt

import dqn_atari
import ppo_cartpole

ROOT = Path(__file__).resolve().parent.parent
GAMMA, N_STEP, CLIP = dqn_atari.Args.gamma, dqn_atari.Args.n_step, ppo_cartpole.Args.clip_coef


@dataclass
class Args:
    out: Path = ROOT / "docs"  # where to write the pictures


@contextlib.contextmanager
def picture(path: Path, width: float, height: float, rows: int = 1, columns: int = 1):
    """Give the axes of a new picture, (rows, columns), and write it."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), dpi=150, layout="constrained", squeeze=False)
    yield axes
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def draw_ends(axes):
    """Two episodes of four steps: one ends in a fall, the other runs out of time."""
    bootstrap = "y = r + gamma max Q'(o4)"
    for y, end, colour, target in ((1, "terminated", "C3", "y = r"), (0, "truncated", "C0", bootstrap)):
        axes.text(-0.5, y, end, ha="right", va="center", weight="bold", color=colour)
        for i, x in enumerate([0, 1, 2, 3, 4, 6, 7]):  # o0 .. o4, then o0 and o1 of the next episode
            style = (colour, "black", "white") if i == 4 else ("white", "black", "black")
            face, edge, ink = style if i <= 4 else ("0.93", "0.6", "0.5")
            axes.scatter(x, y, s=520, facecolor=face, edgecolor=edge, zorder=2)
            axes.text(x, y, f"o{i % 5}", ha="center", va="center", color=ink)
            if i not in (4, 6):
                axes.annotate("", (x + 0.8, y), (x + 0.2, y), arrowprops={"arrowstyle": "->"})
                axes.text(x + 0.5, y + 0.08, f"a{i % 5}, r", ha="center", color=ink)
        axes.annotate("", (5.8, y), (4.2, y), arrowprops={"arrowstyle": "->", "linestyle": ":", "color": "0.5"})
        axes.text(5, y + 0.08, "reset", ha="center", color="0.5")
        stored = f"the last transition is stored as (o3, a3, r, o4, {float(end == 'terminated')}):  {target}"
        axes.text(4, y - 0.36, stored, ha="center", color=colour)
    for x, text in ((4, 'infos[i]["terminal_observation"]'), (6, "obs[i]")):
        axes.annotate(
            text, (x, 1.16), (x, 1.45), ha="center", family="monospace", arrowprops={"arrowstyle": "->", "color": "0.4"}
        )
    axes.set(xlim=(-1.6, 7.4), ylim=(-0.5, 1.6))
    axes.axis("off")


def draw_limits(axes):
    """What a learner that takes every time limit for an end learns of a reward of 1 per step."""
    steps = np.unique(np.geomspace(5, 10_000, 200).astype(int))
    axes.semilogx(steps, 1 / (1 - GAMMA * (1 - 1 / steps)), label="truncation taken for termination")
    axes.axhline(1 / (1 - GAMMA), color="black", linestyle="--", linewidth=1, label="the truth, 1 / (1 - gamma)")
    axes.axvline(500, color="0.7", linewidth=1)
    axes.text(520, 5, "CartPole-v1", color="0.4")
    axes.set(xlabel="time limit T, in steps", ylabel="value learned", ylim=(0, 110))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.88))


def breakout(num_steps: int = 6_000) -> list[int]:
    """Let the paddle follow the ball. Return the steps from each hit to its brick."""
    env = dqn_atari.make_env(dqn_atari.Args(), evaluation=True)
    env.reset(seed=1)
    delays, hit, y_before = [], None, 0
    for step in range(num_steps):
        # Bytes of the console's memory: where the paddle is, and the ball; y grows downwards, 0 is no ball.
        paddle, x, y = (int(env.ale.getRAM()[address]) for address in (72, 99, 101))
        action = 1 if y == 0 else 2 if x > paddle + 9 else 3 if x < paddle + 3 else 0  # FIRE, RIGHT, LEFT, NOOP
        _, reward, terminated, truncated, _ = env.step(action)
        after = int(env.ale.getRAM()[101])
        if 0 < after < y and y >= max(160, y_before):  # it fell, and rises again down here: the paddle's step
            hit = step
        if reward > 0 and hit is not None:
            delays, hit = [*delays, step - hit], None
        y_before = y
        if terminated or truncated:
            env.reset()
    return delays


def summary(delays: list[int]) -> str:
    shortest, median, longest = min(delays), statistics.median(delays), max(delays)
    return f"{len(delays)} bricks, {shortest} to {longest} steps after the paddle's hit, median {median:.0f}"


def draw_delays(top, bottom, delays: list[int]):
    """Top: the delays. Bottom: copies of the target network until a table's value knows of a reward so far ahead."""
    steps, median = np.arange(31), int(statistics.median(delays))
    top.hist(delays, np.arange(-0.5, 31), color="0.6")
    top.set(title="Steps from the paddle's hit to the brick", ylabel="bricks")
    for n, colour in ((1, "C3"), (N_STEP, "C0")):  # rewards of n steps are in the first target; each copy adds n more
        bottom.plot(steps, steps // n, "o", markersize=4, color=colour)
        bottom.text(30.4, 30 // n, f"--n-step {n}", va="center", color=colour, weight="bold")
        bottom.plot(median, median // n, "o", markersize=9, color=colour)
        bottom.text(median + 0.4, median // n - 3.4, f"{median // n} copies for {median} steps", color=colour)
    bottom.set(title="Copies until the value of the paddle's step counts the brick", ylabel="copies", ylim=(-1, 32))
    bottom.set(xlabel="steps from the paddle's hit to the brick")
    for axes in (top, bottom):
        axes.axvline(median, color="black", linestyle=":", linewidth=1)
        axes.set(xlim=(-0.5, 35))
        axes.set_xticks(range(0, 31, 5))
    top.text(median + 0.4, 0.9, f"median: {median} steps", transform=top.get_xaxis_transform())


def draw_clip(column, sign: int):
    """The clipped objective over the ratio, and its gradient."""
    ratio = torch.linspace(0.4, 1.6, 1201, requires_grad=True)
    objective = torch.stack(
        [-ppo_cartpole.ppo_loss(r.log()[None], torch.zeros(1), torch.full((1,), float(sign)), CLIP)[0] for r in ratio]
    )
    (gradient,) = torch.autograd.grad(objective.sum(), ratio)
    ratio, objective = ratio.detach(), objective.detach()
    for axes, values, label in zip(column, (objective, gradient), ("L_clip", "d L_clip / d ratio"), strict=True):
        axes.plot(ratio, values, linewidth=2)
        axes.axvspan(1 - CLIP, 1 + CLIP, color="0.93", zorder=0)
        axes.axvline(1, color="0.6", linewidth=1)
        axes.set(ylabel=label)
    column[0].plot(ratio, sign * ratio, "k:", linewidth=1)
    column[0].set(title=f"advantage {sign:+d}")
    column[1].set(xlabel="ratio", ylim=(-1.2, 1.2))


def main():
    out = tyro.cli(Args, description=__doc__).out
    out.mkdir(parents=True, exist_ok=True)
    delays = breakout()
    print(summary(delays))
    with picture(out / "tour_ends.png", 8.6, 3) as axes:
        draw_ends(axes[0, 0])
    with picture(out / "tour_limits.png", 6, 2.8) as axes:
        draw_limits(axes[0, 0])
    with picture(out / "tour_delays.png", 7.6, 5.2, rows=2) as axes:
        draw_delays(*axes[:, 0], delays)
    with picture(out / "tour_clip.png", 8.6, 4.4, 2, 2) as axes:
        draw_clip(axes[:, 0], 1)
        draw_clip(axes[:, 1], -1)


if __name__ == "__main__":
    main()
