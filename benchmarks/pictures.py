"""Draw what a trained network sees, and what it expects.

    python benchmarks/pictures.py frames runs/NAME/best.pt docs/frames.png
    python benchmarks/pictures.py q-values checkpoints/dqn_cartpole.pt docs/q_values.png

frames: the emulator's screen at one moment, and the four stacked frames that dqn_atari.py's network gets of it.

q-values: max_a Q(s, a) at each step of an episode, and beside it the discounted sum of the rewards that really
followed. Of dqn_cartpole.py, dqn_vecenv.py and dqn_atari.py. Played without a time limit: an agent that is stopped by
the clock does not know it, and expects what would have come. In Atari over a whole game, in the units of learning: the
sign of each reward, and no reward after a lost life.
"""

import importlib
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
import torch
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SCRIPTS = {"frames": ["dqn_atari"], "q-values": ["dqn_cartpole", "dqn_vecenv", "dqn_atari"]}


@dataclass
class Args:
    what: tyro.conf.Positional[Literal["frames", "q-values"]]  # the picture
    checkpoint: tyro.conf.Positional[Path]  # a run's best.pt
    out: tyro.conf.Positional[Path]  # the picture to write
    seed: int = 0  # of the environment
    step: int = 320  # frames: the moment to show
    steps: int = 500  # q-values: how much of the episode to show


class Step(NamedTuple):
    """What was seen, expected and got in one step."""

    obs: np.ndarray  # what the network saw: (obs_dim,), or (4, 84, 84) of a game
    screen: np.ndarray | None  # (height, width, 3) at that moment
    q_max: float  # max_a Q(s, a)
    reward: float  # as it is learned from
    terminated: bool  # no reward can follow: the pole fell, the life was lost


def load(path: Path) -> tuple[ModuleType, object, torch.nn.Module]:
    """Return the script that wrote a checkpoint as a module, its arguments, and the network."""
    name = torch.load(path, map_location="cpu", weights_only=True)["script"]
    script = importlib.import_module(name)
    checkpoint = script.load_checkpoint(path)
    saved = {flag: value for flag, value in checkpoint["args"].items() if hasattr(script.Args, flag)}
    fresh = {"run_dir": "", "resume": "", "device": "cpu", "render": False, "video": False, "track": "none"}
    args = script.Args(**{**saved, **fresh})
    env = script.make_env(args)
    network = script.QNetwork(env.observation_space, env.action_space, args)
    network.load_state_dict(checkpoint["network"])
    return script, args, network


@torch.no_grad()
def play(script: ModuleType, args, network: torch.nn.Module, steps: int, seed: int, screens: bool = False):
    """Yield the steps of an episode, or of a whole game: greedy, in Atari at eval_epsilon."""
    torch.manual_seed(seed)
    atari = hasattr(script, "push_frames")
    env = script.make_env(args, **({"render_mode": "rgb_array"} if screens else {}))
    obs, ended = env.reset(seed=seed)[0], True
    stack = np.zeros((1, 4, 84, 84), np.uint8)
    for _ in range(steps):
        if atari:
            script.push_frames(stack, obs[None], np.array([ended]))
        seen = stack.copy() if atari else np.array(obs[None], np.float32)
        q_values = network(torch.from_numpy(seen))[0]
        explore = atari and torch.rand(()) < args.eval_epsilon
        action = int(torch.randint(len(q_values), ()) if explore else q_values.argmax())
        screen = env.render() if screens else None
        obs, reward, terminated, truncated, _ = env.step(action)
        yield Step(seen[0], screen, q_values.max().item(), float(reward), terminated)
        ended = terminated or truncated
        if ended and getattr(env, "game_over", True):  # in Atari an episode can be a life
            break
        if ended:
            obs, _ = env.reset()  # the next life
    env.close()


def discounted_returns(rewards: np.ndarray, terminated: np.ndarray, gamma: float) -> np.ndarray:
    """G_t = r_t + gamma * G_t+1, and no G_t+1 after a termination; all (steps,)."""
    returns, following = np.zeros(len(rewards)), 0.0
    for t in reversed(range(len(rewards))):
        returns[t] = following = rewards[t] + gamma * (1.0 - terminated[t]) * following
    return returns


def draw_frames(args: Args):
    script, run_args, network = load(args.checkpoint)
    *_, moment = play(script, run_args, network, args.step + 1, args.seed, screens=True)
    figure, axes = plt.subplots(1, 5, figsize=(9.6, 2.6), dpi=150, width_ratios=[1.24, 1, 1, 1, 1])
    axes[0].imshow(moment.screen, aspect=0.77, interpolation="nearest")  # a pixel of a television is wider than high
    axes[0].set_title(f"the screen, {moment.screen.shape[1]} x {moment.screen.shape[0]}", fontsize=9)
    for back, axis, frame in zip((3, 2, 1, 0), axes[1:], moment.obs, strict=True):
        axis.imshow(frame, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(f"{back} action{'s' * (back > 1)} before" if back else "at this moment", fontsize=9)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    figure.suptitle(f"{run_args.env_id}: what the network sees, four frames of 84 x 84, 1/15 s of play apart")
    return figure


def draw_q_values(args: Args):
    script, run_args, network = load(args.checkpoint)
    atari = script.__name__ == "dqn_atari"
    tail = math.ceil(math.log(1e-3) / math.log(run_args.gamma))  # what follows later counts less than a thousandth
    if not atari:
        run_args = replace(run_args, time_limit=-1)
    steps = list(play(script, run_args, network, args.steps + tail, args.seed))
    q_max, rewards, terminated = np.array([(step.q_max, step.reward, step.terminated) for step in steps]).T
    returns = discounted_returns(rewards, terminated, run_args.gamma)
    figure, axes = plt.subplots(figsize=(7.2, 3.6), dpi=150)
    axes.plot(returns[: args.steps], color="black", linewidth=1, label="what followed: the discounted sum of rewards")
    axes.plot(q_max[: args.steps], color="C0", linewidth=1.5, label="what the network expected: max Q(s, a)")
    for index, t in enumerate(np.flatnonzero(terminated[: args.steps])):
        axes.axvline(t, color="C3", linewidth=0.8, label="" if index else "the life was lost" if atari else "the end")
    unit = "step (1/15 s of play)" if atari else "step"
    axes.set(xlabel=unit, ylabel=f"rewards, discounted by {run_args.gamma} a step", ylim=(0, None))
    axes.set_title(f"{script.__name__}.py on {run_args.env_id}", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=1, borderaxespad=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure


def main():
    args = tyro.cli(Args, description=__doc__)
    name = torch.load(args.checkpoint, map_location="cpu", weights_only=True)["script"]
    if name not in SCRIPTS[args.what]:
        print(f"pictures: {args.what} are drawn of {', '.join(SCRIPTS[args.what])}, not of {name}", file=sys.stderr)
        raise SystemExit(2)
    figure = draw_frames(args) if args.what == "frames" else draw_q_values(args)
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
