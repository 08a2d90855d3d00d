# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1",
#     "gymnasium==1.4.0",
#     "matplotlib==3.11.2",
#     "moviepy==2.2.1",
#     "numpy==2.4.6",
#     "opencv-python-headless==5.0.0.93",
#     "psutil==7.2.2",
#     "pygame==2.6.1",
#     "stable-baselines3==2.9.2",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.16",
# ]
# ///
r"""DQN on Atari: deep Q-learning from pixels.

The algorithm of dqn_cartpole.py, which is the script to read first, with what pixels ask for: a preprocessing that
makes 84x84 grey frames of a game, four of them stacked into an observation, a convolutional network, and a replay
memory that stores each frame once. The games run in processes of their own, and step while the main process learns.
Mnih et al., "Human-level control through deep reinforcement learning", Nature 518 (2015).

    python dqn_atari.py --env-id BreakoutNoFrameskip-v4          # the usual benchmark: 10 million transitions
    python dqn_atari.py --env-id PongNoFrameskip-v4 --video      # the same length; neither was measured
    python dqn_atari.py --resume runs/NAME
    python dqn_atari.py --play runs/NAME/best.pt --render

An hour on two CPU cores, with the smaller network of 2013 and three-step returns:

    python dqn_atari.py --env-id BreakoutNoFrameskip-v4 --network nips --n-step 3 --total-timesteps 1000000 \
        --train-frequency 8 --target-frequency 4000 --learning-starts 20000 --buffer-size 400000 \
        --exploration-steps 200000 --learning-rate 2.5e-4 --optimizer-eps 1.5e-4 --eval-every 100000 \
        --checkpoint-every 100000

Measured with it, one run, seed 1: the mean score of the last 100 training games passes 69.9 at 952,000 transitions and
52 minutes of training, and is 70.7 at the end, 54 minutes. (The example of Stable-Baselines3's documentation ends at
69.9, after 3.9 million transitions.) Over 30 games the final network scores 80.5 on average (standard deviation 82.4,
lowest 28), the best one 92.8, and 59.9 over 30 others. The default run of 10 million transitions was not measured.

Is my run healthy?       at 10 %    at 50 %    at 100 %     of that Breakout run
    training return      1.2        31         71           (mean of the last 100 games; a random player: about 1.3)
    evaluation           1.6        41         85           (of 5 games: noisy)
    loss                 0.003      0.027      0.018        (medians of the 50,000 transitions before; with spikes)
    mean Q(s, a)         0.25       1.6        2.5          (the same)

Pong, with other weights to begin with and a learning rate that falls; it ends by itself at 18:

    python dqn_atari.py --env-id PongNoFrameskip-v4 --network nips --init he --n-step 4 --total-timesteps 900000 \
        --train-frequency 4 --target-frequency 2000 --learning-starts 10000 --buffer-size 100000 \
        --exploration-steps 100000 --epsilon-end 0.02 --learning-rate 2.5e-4 --learning-rate-end 2.5e-5 \
        --optimizer-eps 1.5e-4 --target-return 18 --eval-every 50000 --checkpoint-every 50000

Seed 1: evaluations of -16.2 at 100,000 transitions, -7.4 at 200,000, 19.0 at 300,000 after 16 minutes of training. At
429,000 and 23 minutes the mean of the last 100 training games reaches 18, which ends it. The final network wins all of
30 games, by 19.0 points on average (standard deviation 1.0), the best one by 20.1. Seed 2 takes twice as long: -11.8 at
200,000, 5.8 at 350,000, 15.8 at 500,000; it ends at 832,000 and 51 minutes, and its final network wins by 19.7. In
bfloat16 seeds 1 to 3 end at 577,000 to 775,000, and win by 19.7 to 20.4. With PyTorch's first weights, and a rate that
falls over 800,000, seed 1 scored -19.6 at 200,000, 4.0 at 350,000 and 15.0 at 800,000. Be patient: with seed 1 mean
Q(s, a) falls to -1.1 at 80,000, then rises, and the score with it; the loss tells little.
Why this --optimizer-eps: while hardly anything is rewarded the gradients are tiny, Adam divides them by their own size,
and takes full steps in arbitrary directions, which can leave ReLUs dead. One run with 1e-8 learned nothing in 700,000
transitions; it had PyTorch's weights, the network of 2015, bfloat16 and other schedules too, and none was isolated.

Units: a transition is one action, held for 4 emulator frames; 10 million transitions are 40 million frames, 185 hours
of play. A gradient step comes every 4 transitions, a copy to the target network every 1,000 transitions, which are 250
gradient steps. A game's length, train/episode_length, is in frames: four per transition, and those of no-ops and FIRE.

A memory of a million transitions needs 7 GB, each game's process 16 MB of its own. Evaluations run in the main
process while the others idle. A resumed run plays --learning-starts transitions before it learns on, and learns from
those and newer ones alone, unless --checkpoint-memory wrote the memory: expect a dip.

A training episode is a life; an evaluation plays the whole game. In both the next life begins with one no-op and, where
action 1 is FIRE, actions 1 and 2: in training that spares the agent the screen that waits for FIRE, so it would not
have learned to press it for an evaluation. What is written as train/episode_return and train/episode_length is of whole
games all the same, unclipped.

Differences from the paper: Adam 1e-4 instead of RMSProp, target copies every 250 gradient steps instead of 10,000, 10
million transitions instead of 50, epsilon down to 0.01 instead of 0.1 (and 0.01 in evaluations, of whole games, not
0.05 and 5 minutes), learning from 80,000 transitions on instead of 50,000, FIRE pressed for the agent as a life begins.
Several games side by side; a bootstrap where a game runs out of time. As there: no-op starts, 4 frames per action, the
maximum of the last two, one life per episode, rewards -1, 0, 1, a gradient step every 4 actions, the TD error clipped
(Huber loss). No double or dueling networks, no prioritised replay; n-step returns (Hessel et al., "Rainbow", AAAI 2018)
only where --n-step asks for them.

Differences from dqn_cartpole.py, by section. Environment: AtariGame, push_frames. Network: convolutions, bfloat16, a
choice of first weights. Replay memory: frames, n-step returns. Equations: make_optimizer. Training: stacks of frames; a
learning rate that stays unless --learning-rate-end is given; clipping by value; refilling the memory after a resume;
CUDA where there is one, else all cores. Evaluation: whole games, raw score, at --eval-epsilon. On a CPU the same seed
gives the same parameters with the same versions and number of threads; a resumed run does not: its games begin anew.
"""

import argparse
import collections
import contextlib
import copy
import errno
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_type_hints

import ale_py  # importing it registers the Atari ids, in the workers too
import cv2
import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# === Arguments ========================================================================================================

CONTAINER_LIMIT = "/sys/fs/cgroup/memory.max"  # Linux: bytes, or "max"


@dataclass
class Args:
    """DQN (Mnih et al. 2015) for Atari games, from pixels."""

    # run
    env_id: str = "BreakoutNoFrameskip-v4"  # an Atari id: {Game}NoFrameskip-v4, or ALE/{Game}-v5 for sticky actions
    seed: int = 1  # seed of the network, the exploration, the replay memory and the environments
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps; auto is CUDA where there is one, else the CPU
    run_dir: str = ""  # where to write the run (default: runs/{env}__{script}__{seed}__{time})
    checkpoint_every: int = 250_000  # transitions between checkpoints
    checkpoint_memory: bool = False  # write the replay memory too: 7 GB for a million transitions, twice while writing
    resume: str = ""  # run directory of a stopped run: continue it
    play: str = ""  # checkpoint file: evaluate it, without training
    render: bool = False  # show environment 0 in a window
    video: bool = False  # film an episode of the best network into the run's videos/
    track: Literal["none", "swanlab", "wandb"] = "none"  # mirror TensorBoard to a tracker
    track_project: str = "dqn"  # project name for the tracker

    # environment
    num_envs: int = 8  # games that are played side by side
    vec_env: Literal["dummy", "subproc"] = "subproc"  # in this process; or a process each, for slow steps
    time_limit: int | None = None  # steps per game in place of the emulator's own limit, 27,000; -1 removes it

    # algorithm
    total_timesteps: int = 10_000_000  # transitions, summed over the environments; 4 emulator frames each
    target_return: float | None = None  # end the run once the last 100 training games have this mean score
    learning_starts: int = 80_000  # transitions before the first gradient step, and before learning on at a resume
    train_frequency: int = 4  # transitions per gradient step
    target_frequency: int = 1_000  # transitions per update of the target network
    tau: float = 1.0  # how far that update moves the target network to the online one; 1 makes it a copy
    gamma: float = 0.99  # discount per step
    n_step: int = 1  # rewards in a TD target before the bootstrap; nothing corrects for actions of old networks
    buffer_size: int = 1_000_000  # transitions in the replay memory; 7 kB each
    batch_size: int = 32  # transitions per gradient step
    network: Literal["nature", "nips"] = "nature"  # of 2015; or of 2013, a third of the multiplications
    init: Literal["torch", "he"] = "torch"  # first weights: PyTorch's; or He's, with which Pong's score rises sooner

    # exploration
    epsilon_start: float = 1.0  # probability of a random action at the start
    epsilon_end: float = 0.01  # probability of a random action at the end of the schedule
    exploration_steps: int = 1_000_000  # transitions: length of a linear schedule, time constant of an exponential one
    epsilon_schedule: Literal["linear", "exponential"] = "linear"  # how epsilon goes from start to end

    # optimisation
    optimizer: Literal["adam", "rmsprop"] = "adam"  # rmsprop is torch's: not centred, unlike DeepMind's
    learning_rate: float = 1e-4  # step size of the optimiser at the start
    learning_rate_end: float | None = None  # at the end, reached linearly over total_timesteps (default: constant)
    optimizer_eps: float = 1e-8  # added to the root mean square that is divided by (DeepMind adds it under the root)
    rmsprop_alpha: float = 0.95  # smoothing of RMSProp's mean square
    loss: Literal["mse", "huber"] = "huber"  # loss of the TD error: its square, or linear beyond 1
    max_grad_norm: float = 0.0  # largest global norm of the gradient; 0: not clipped
    max_grad_value: float = 0.0  # largest absolute entry of the gradient; 0: not clipped
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16 is faster on some processors: measure it

    # evaluation
    eval_every: int = 250_000  # transitions between evaluations
    eval_episodes: int = 5  # whole games per evaluation
    eval_epsilon: float = 0.01  # probability of a random action in evaluations; with 0 a game may go in circles
    final_eval_episodes: int = 30  # whole games at the end, on seeds that were not used to choose the best network

    def __post_init__(self):
        check_args(self)
        require(self, "batch_size", self.batch_size <= self.buffer_size, "give at most --buffer-size")
        require(self, "num_envs", self.num_envs <= self.buffer_size, "give at most --buffer-size")
        require(self, "learning_starts", self.learning_starts < self.total_timesteps, "give less than the total")
        require(self, "learning_starts", self.learning_starts >= self.num_envs, "give at least --num-envs")
        require(
            self, "target_frequency", self.target_frequency >= self.train_frequency, "give --train-frequency or more"
        )
        # The memory takes its pages as it fills: without this check a run would be killed hours after its start.
        copies = 2 if self.resume and self.checkpoint_memory else 1  # a checkpoint is read whole, then copied
        needed = copies * self.buffer_size * (84 * 84 + 8)  # bytes: a frame, and what else belongs to a transition
        room = int(0.9 * free_memory())  # the rest is for the network and the workers
        fitting = room // copies // (84 * 84 + 8)
        fits = f"takes {needed / 1e9:.1f} GB where {room / 1e9:.1f} GB are free; {fitting} transitions would fit"
        require(self, "buffer_size", needed < room or self.play != "", fits)


def free_memory() -> int:
    """Return the bytes that are free on this machine, at most the limit of the container that this runs in."""
    free, limit = psutil.virtual_memory().available, Path(CONTAINER_LIMIT)
    return min(free, int(limit.read_text())) if limit.exists() and limit.read_text() != "max\n" else free


# === Environment ======================================================================================================


class AtariGame(gym.Wrapper):
    """A game as the agent meets it: one 84x84 grey frame and one reward for every 4 emulator frames.

    The preprocessing of the Nature paper (Mnih et al., 2015, Methods), in one class so that its order can be read.
    Four frames per action make 15 decisions a second instead of 60. A reward then follows its cause after a quarter as
    many steps (Breakout, from the paddle to the brick: about 15 instead of 60): it is discounted less, and passes
    through fewer TD targets on its way back. And things move visibly from one observation to the next.

    It drives the emulator itself, for speed: a full RGB screen is fetched for 2 of 4 frames only. A wrapper below this
    one would see no steps. Stacking is left to push_frames.

    training=True   an episode is one life, the reward its sign (-1, 0 or 1)
    training=False  an episode is a whole game, the reward the raw score gained; step() begins the next life

    Where a game (not a life) ended since the last step, info["episode"] holds its raw score "r" and its length "l"
    in emulator frames, no-ops included. A game may end between two steps: in the no-op or FIRE after a lost life.
    """

    def __init__(self, env: gym.Env, training: bool) -> None:
        super().__init__(env)
        self.training = training
        self.ale = env.unwrapped.ale
        meanings = env.unwrapped.get_action_meanings()
        self.actions = [ale_py.Action[meaning] for meaning in meanings]
        # FIRE starts some games, and a few of them need a second action.
        self.start_actions = [1, 2] if meanings[1] == "FIRE" else []
        self.screens = np.zeros((2, *self.ale.getScreenDims(), 3), np.uint8)  # the last two emulator frames
        self.grey = np.zeros(self.ale.getScreenDims(), np.uint8)
        self.observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)
        self.metadata = {**env.metadata, "render_fps": 15}  # 60 emulator frames per second, 4 per step
        self.score = 0  # raw, of the current game
        self.lives = 0
        self.game_over = True
        self.finished: dict | None = None  # statistics of a game that ended and was not yet reported

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        lives = self.lives
        reward, terminated, truncated = self._repeat(action)
        # The next life, by the actions of reset() while training; there the stack begins anew as well, here it goes on.
        while not self.training and 0 < self.lives < lives:
            lives = self.lives  # in a loop: these actions may lose another
            for start_action in (0, *self.start_actions):
                if not self.game_over:
                    gained, terminated, truncated = self._repeat(start_action)
                    reward += gained
        info = {}
        if self.finished:
            info["episode"], self.finished = self.finished, None
        if self.training:
            reward = np.sign(reward)
        return self._observe(), float(reward), terminated, truncated, info

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Begin an episode; while training the next life of the same game, unless it is over or a seed is given."""
        if seed is not None:
            self.game_over = True
        self._next_episode(seed, options)
        for action in self.start_actions:
            _, terminated, truncated = self._repeat(action)
            if terminated or truncated:
                self._next_episode()
        return self._observe(), {}

    def render(self) -> np.ndarray | None:
        # The maximum again: every fourth screen alone would never show some of the sprites.
        return self.screens.max(axis=0) if self.render_mode == "rgb_array" else self.env.render()

    def _repeat(self, action: int) -> tuple[int, bool, bool]:
        """Hold an action for 4 emulator frames; returns the raw reward, terminated, truncated."""
        reward = 0
        for frame in range(4):
            reward += self.ale.act(self.actions[action])
            if frame >= 2:
                self.ale.getScreenRGB(self.screens[frame - 2])
            if self.ale.game_over():
                break
        if frame < 3:  # the game ended before both screens were new: its last frame stands alone
            self.screens[:] = self.ale.getScreenRGB()
        terminated, truncated = self.ale.game_over(with_truncation=False), self.ale.game_truncated()
        self.score += reward
        self.game_over = terminated or truncated
        if self.game_over:
            self.finished = {"r": float(self.score), "l": self.ale.getEpisodeFrameNumber()}
        lives = self.ale.lives()
        # Only a drop to a positive count is a lost life: some games (BankHeist) show 0 a while before they are over.
        if self.training and 0 < lives < self.lives:
            terminated = True
        self.lives = lives
        return reward, terminated, truncated

    def _next_episode(self, seed: int | None = None, options: dict | None = None) -> None:
        if self.training and not self.game_over:
            self._repeat(0)  # one no-op moves past the loss; what it gains counts for the score, not for the agent
            if not self.game_over:
                return
        self.env.reset(seed=seed, options=options)
        self.score = 0
        for _ in range(self.env.unwrapped.np_random.integers(1, 31)):  # so many frames, or all games would begin alike
            self.score += self.ale.act(self.actions[0])  # no-op
            if self.ale.game_over():
                self.env.reset()
                self.score = 0
        self.screens[:] = self.ale.getScreenRGB()
        self.lives = self.ale.lives()
        self.game_over = False

    def _observe(self) -> np.ndarray:
        """Return the maximum of both screens, as games draw some sprites on alternate frames only: (84, 84) uint8."""
        np.maximum(self.screens[0], self.screens[1], out=self.screens[0])
        cv2.cvtColor(self.screens[0], cv2.COLOR_RGB2GRAY, dst=self.grey)
        return cv2.resize(self.grey, (84, 84), interpolation=cv2.INTER_AREA)  # a new array: the caller may keep it


class Window(gym.Wrapper):
    """Hides that an environment has a window: a VecEnv wants the same render_mode of all of its environments."""

    render_mode = None


def make_env(args: Args, evaluation: bool = False, render_mode: str | None = None, video_dir: Path | None = None):
    """Return one Atari game whose observation is one frame, (84, 84) uint8; raise ValueError for what is not Atari.

    Any frame skip of the id gives way to AtariGame's. Sticky actions stay as the id has them: in ALE/*-v5 the emulator
    repeats the last action with probability 0.25, drawn anew at every frame.
    """
    cv2.setNumThreads(1)  # OpenCV would start a thread per core in every worker
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner from each of them
    options = {"render_mode": render_mode, "disable_env_checker": True}
    if args.time_limit is not None and not (evaluation and args.time_limit == -1):  # an evaluation has to end
        options["max_num_frames_per_episode"] = max(0, 4 * args.time_limit)  # 0: no limit
    module, _, env_id = args.env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    if "AtariEnv" not in str(gym.spec(env_id).entry_point):
        raise ValueError("this is no Atari game; give an id such as BreakoutNoFrameskip-v4 or ALE/Pong-v5")
    env = AtariGame(gym.make(env_id, **options), training=not evaluation)
    if render_mode == "human":
        env = Window(env)
    if video_dir is not None:
        env = gym.wrappers.RecordVideo(env, str(video_dir), episode_trigger=lambda episode: episode == 0)
    return env


def make_worker_env(args: Args, render_mode: str | None = None):
    """make_env for a worker process of SubprocVecEnv."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process: the main one decides what it means
    torch.set_num_threads(1)  # an environment that uses torch would start a thread per core in each of n workers
    return make_env(args, render_mode=render_mode)


def make_envs(args: Args):
    """Return num_envs environments behind SB3's VecEnv: obs (num_envs, *obs_shape), rewards and dones (num_envs,).

    A VecEnv resets an environment inside the step that ends its episode, and returns the first observation of the next
    one. The last observation of the ended episode is in infos[i]["terminal_observation"]. At every step
    infos[i]["TimeLimit.truncated"] says whether the episode was cut off there, by whatever limit, without terminating.
    """
    render_modes = ["human" if args.render and i == 0 else None for i in range(args.num_envs)]
    if args.vec_env == "dummy":
        return DummyVecEnv([partial(make_env, args, render_mode=mode) for mode in render_modes])
    if "forkserver" in multiprocessing.get_all_start_methods():
        # Every worker imports this script again. From a fork server that has imported the heavy libraries once it gets
        # them as shared pages: 15 MB of its own instead of 170, and no seconds of imports.
        multiprocessing.set_forkserver_preload(["torch", "gymnasium", "stable_baselines3.common.vec_env", "tyro"])
    return SubprocVecEnv([partial(make_worker_env, args, render_mode=mode) for mode in render_modes])


def push_frames(stacks: np.ndarray, frames: np.ndarray, ended: np.ndarray) -> None:
    """Append frames (n, 84, 84) to the stacks (n, 4, 84, 84), newest last, in place.

    One frame does not tell which way the ball flies; four do. The stacks are built here rather than in the workers, so
    that a quarter of the bytes cross the pipes. Where an episode ended, frames holds the first one of the next, and the
    stack starts again from zeros.
    """
    stacks[:, :-1] = stacks[:, 1:]
    stacks[ended] = 0
    stacks[:, -1] = frames


# === Network ==========================================================================================================


class QNetwork(nn.Module):
    """Q(s, a) for all actions at once: obs (B, 4, 84, 84) uint8 -> q_values (B, num_actions).

    nature: the network of Mnih et al. (2015). nips: the one of their "Playing Atari with Deep Reinforcement Learning"
    (2013), with half the filters and one convolution less: a third of the multiplications.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__()
        self.precision = getattr(torch, args.precision)
        if args.network == "nature":
            layers = [
                nn.Conv2d(4, 32, kernel_size=8, stride=4),  # (B, 4, 84, 84) -> (B, 32, 20, 20)
                nn.ReLU(),
                nn.Conv2d(32, 64, kernel_size=4, stride=2),  # -> (B, 64, 9, 9)
                nn.ReLU(),
                nn.Conv2d(64, 64, kernel_size=3, stride=1),  # -> (B, 64, 7, 7)
                nn.ReLU(),
                nn.Flatten(),  # -> (B, 3136)
                nn.Linear(3136, 512),
                nn.ReLU(),
            ]
        else:
            layers = [
                nn.Conv2d(4, 16, kernel_size=8, stride=4),  # (B, 4, 84, 84) -> (B, 16, 20, 20)
                nn.ReLU(),
                nn.Conv2d(16, 32, kernel_size=4, stride=2),  # -> (B, 32, 9, 9)
                nn.ReLU(),
                nn.Flatten(),  # -> (B, 2592)
                nn.Linear(2592, 256),
                nn.ReLU(),
            ]
        # channels_last, as the minibatches are: else each convolution would rearrange its weights or its input
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.head = nn.Linear(layers[-2].out_features, action_space.n)
        if args.init == "he":
            # A layer of PyTorch's weights, with its ReLU, passes on a sixth of the variance between two screens; one of
            # He's (He et al., ICCV 2015) all of it: a ball of a few pixels reaches the head, which has no ReLU.
            for layer in layers:
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                    nn.init.zeros_(layer.bias)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        # The only place where pixels are scaled. In place: a second array of 3.6 MB, whose pages the operating system
        # hands out anew each time, costs more than the division. copy: float pixels would be the caller's own array.
        pixels = obs.to(self.precision, copy=True).div_(255.0)
        with torch.autocast(obs.device.type, self.precision, enabled=self.precision != torch.float32):
            features = self.layers(pixels)
        # The head stays in float32: the 8 significant bits of bfloat16 cannot tell one action's Q-value from another's.
        return self.head(features.float())


# === Replay memory ====================================================================================================


class Batch(NamedTuple):
    """B transitions: what the agent saw, did and got, what it saw next, and whether the episode terminated there.

    With n_step above 1 a row spans m <= n transitions: obs and action of the first, the rewards of all, next_obs and
    terminated of the last.
    """

    obs: torch.Tensor  # (B, 4, 84, 84) uint8
    actions: torch.Tensor  # (B,)
    rewards: torch.Tensor  # (B,): r_t + gamma * r_t+1 + ... over the m <= n transitions
    next_obs: torch.Tensor  # (B, 4, 84, 84) uint8: m steps later
    terminated: torch.Tensor  # (B,), 1.0 or 0.0
    discounts: torch.Tensor  # (B,): gamma^m, which weighs the bootstrap


class ReplayMemory:
    """A ring per environment that stores each frame once: 7.06 GB per million transitions, not 56.4 as pairs of stacks.

    Every frame takes a slot, the one that ended an episode included, so the next frame is always in the next slot. The
    rings are interleaved in flat arrays: index = slot * num_envs + env, and the same environment's next slot is
    num_envs further on, modulo the capacity.

    An observation is named by the index of its newest frame, a transition by that of its observation. What may be drawn
    is marked drawable; excluded are
      - observations that ended an episode, and the newest of each environment: no action was taken there;
      - the 3 oldest of a full ring: the frames before them, which are part of their stack, are overwritten.
    So every ended episode costs a slot, for its last observation: slightly fewer transitions than buffer_size fit.
    """

    def __init__(self, buffer_size: int, num_envs: int):
        self.num_envs = num_envs
        slots = math.ceil(buffer_size / num_envs) + 5  # and the 3 oldest, the newest, one that ended an episode
        self.capacity = slots * num_envs
        self.arrays = {
            "frames": np.empty((self.capacity, 84, 84), np.uint8),  # takes physical memory only as it is written
            "actions": np.zeros(self.capacity, np.uint8),
            "rewards": np.zeros(self.capacity, np.float32),
            "terminated": np.zeros(self.capacity, bool),
            "starts": np.zeros(self.capacity, bool),  # first observation of an episode: its stack holds zeros before it
            "drawable": np.zeros(self.capacity, bool),
        }
        self.newest = np.arange(num_envs) - num_envs  # (n,) of each one's newest frame; begin makes it 0 .. n - 1
        self.filled = 0  # no index from here on has been written

    def begin(self, frames: np.ndarray):
        """Store the first observations, (n, 84, 84), after a reset of all environments."""
        self._write(np.arange(self.num_envs), frames, starts=True)

    def add(self, actions, rewards, next_frames, terminated, ended, new_frames):
        """Store a step of all environments; the first dimension of each array is num_envs.

        next_frames: what the actions led to, also where that ended an episode. new_frames: what the next actions are
        chosen from; it differs where ended is true, and is stored there as the start of an episode.
        """
        self.arrays["actions"][self.newest] = actions
        self.arrays["rewards"][self.newest] = rewards
        self.arrays["terminated"][self.newest] = terminated
        self.arrays["drawable"][self.newest] = True
        self._write(np.arange(self.num_envs), next_frames, starts=False)
        if ended.any():
            self._write(np.flatnonzero(ended), new_frames[ended], starts=True)

    def _write(self, envs: np.ndarray, frames: np.ndarray, starts: bool):
        index = (self.newest[envs] + self.num_envs) % self.capacity
        self.arrays["frames"][index] = frames
        self.arrays["starts"][index] = starts
        # The new slot has no action yet, and the next three of a full ring have lost a frame of their stack to it.
        self.arrays["drawable"][(index[:, None] + self.num_envs * np.arange(4)) % self.capacity] = False
        self.newest[envs] = index
        self.filled = max(self.filled, int(index.max()) + 1)

    def sample(self, batch_size: int, n_step: int, gamma: float, device: torch.device) -> Batch:
        """Draw batch_size transitions uniformly, with replacement, each with the n_step - 1 that followed, or fewer."""
        arrays, index = self.arrays, torch.randint(self.filled, (batch_size,)).numpy()
        while (rejected := np.flatnonzero(~arrays["drawable"][index])).size > 0:
            index[rejected] = torch.randint(self.filled, (rejected.size,)).numpy()

        last, discounts, rewards = index, np.full(batch_size, gamma, np.float32), arrays["rewards"][index]
        # One transition further, unless the next slot is not drawable: it holds the end of the episode, or the newest
        # frame, and nothing was done there. (The 3 oldest are not drawable either, but the newest stands before them.)
        for _ in range(n_step - 1):
            following = (last + self.num_envs) % self.capacity
            follows = arrays["drawable"][following]
            rewards += np.where(follows, discounts * arrays["rewards"][following], 0.0)
            discounts[follows] *= gamma
            last = np.where(follows, following, last)

        columns = Batch(
            obs=self.stacks(index),
            actions=arrays["actions"][index].astype(np.int64),
            rewards=rewards,
            next_obs=self.stacks((last + self.num_envs) % self.capacity),
            terminated=arrays["terminated"][last].astype(np.float32),
            discounts=discounts,
        )
        return Batch(*(torch.from_numpy(column).to(device) for column in columns))

    def stacks(self, index: np.ndarray) -> np.ndarray:
        """Return the observations of these indices as the actor saw them: (B,) -> (B, 4, 84, 84)."""
        window = (index[:, None] + self.num_envs * np.arange(-3, 1)) % self.capacity  # (B, 4): slots t-3 .. t
        frames = self.arrays["frames"][window.T]  # (4, B, 84, 84)
        # Zero what lies before the start of the episode: frame t-j where an episode starts at any of t-j+1 .. t.
        starts = self.arrays["starts"][window[:, :0:-1]]  # (B, 3): at t, t-1, t-2?
        before = np.logical_or.accumulate(starts, axis=1)  # (B, 3): is t-1, t-2, t-3 before it?
        frames[2::-1][before.T] = 0
        # The convolutions want the four values of a pixel side by side (channels last). Interleaved here, bytes are
        # moved once; else the first layer would rearrange floats, in both networks and in the backward pass.
        pixels = cv2.merge(list(frames.reshape(4, -1, 84)))  # (B * 84, 84, 4)
        return pixels.reshape(-1, 84, 84, 4).transpose(0, 3, 1, 2)  # a view

    def state_dict(self) -> dict:
        arrays = {name: torch.from_numpy(array[: self.filled]) for name, array in self.arrays.items()}
        return {"newest": torch.from_numpy(self.newest), **arrays}

    def load_state_dict(self, state: dict):
        """Restore; begin must follow, since the environments start new episodes."""
        self.filled = len(state["frames"])
        self.arrays["drawable"][:] = False
        for name, array in self.arrays.items():
            array[: self.filled] = state[name].numpy()
        self.newest[:] = state["newest"].numpy()

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


# === Equations ========================================================================================================


def td_loss(q_values: torch.Tensor, next_q_values: torch.Tensor, batch: Batch, gamma: torch.Tensor, loss: str):
    """Return the TD loss (Mnih et al. 2015; squared, or Huber's), and Q(s, a) of the actions taken, (B,).

    y = r + gamma * max_a' Q_target(s', a')    where the episode went on, or only ran out of time (truncated)
    y = r                                      where it terminated. After a lost life the game goes on and pays, but not
                                               this episode: that is what makes losing one costly
    L = mean of (y - Q(s, a))^2, or of Huber's loss: half that square up to an error of 1, linear beyond

    That the maximum is taken, whichever action came next, makes it right to learn from old and random transitions too
    (off-policy); that it is a maximum over noisy estimates makes it too large on average. With n_step above 1 the
    actions between s and s' are those of old networks, or random: y is off by what they cost.

    q_values: Q(s, .) of the online network, (B, A). next_q_values: Q_target(s', .), (B, A), without gradient: only
    Q(s, a) is to move. gamma: batch.discounts, (B,), gamma^m where r is the sum of m discounted rewards.
    """
    q_taken = q_values.gather(1, batch.actions.unsqueeze(1)).squeeze(1)  # (B, A) -> (B,)
    next_q_max = next_q_values.max(dim=1).values  # (B, A) -> (B,)
    td_target = batch.rewards + gamma * (1.0 - batch.terminated) * next_q_max
    assert q_taken.shape == td_target.shape  # (B, 1) against (B,) would broadcast to (B, B) and train on noise
    return (F.mse_loss if loss == "mse" else F.smooth_l1_loss)(q_taken, td_target), q_taken


def make_optimizer(parameters: list, args: Args) -> torch.optim.Optimizer:
    if args.optimizer == "adam":
        return torch.optim.Adam(parameters, args.learning_rate, eps=args.optimizer_eps, fused=True)  # one call
    return torch.optim.RMSprop(parameters, args.learning_rate, args.rmsprop_alpha, args.optimizer_eps)


@torch.no_grad()
def update_target(target_parameters: list, parameters: list, tau: float):
    """theta_target <- theta_target + tau * (theta - theta_target), for all layers in one call; tau 1 is a copy."""
    torch._foreach_lerp_(target_parameters, parameters, tau)


def linear_schedule(start: float, end: float, steps: int, t: int) -> float:
    """Go from start to end in a straight line over `steps` transitions, then stay."""
    return start + (end - start) * min(t / steps, 1.0)


def exponential_schedule(start: float, end: float, steps: int, t: int) -> float:
    """Close the distance to end by a factor e every `steps` transitions."""
    return end + (start - end) * math.exp(-t / steps)


# === Training =========================================================================================================


def train(args: Args) -> dict:
    """Train from the first transition, or from where args.resume stopped; return what result.json holds."""
    device = select_device(args.device, auto="cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    # Where gradients cease (dead ReLUs), Adam's running means of them shrink to denormal numbers, below 1e-38, and stay
    # there; its step then takes four times as long. Taken for zeros they cost nothing. Each thread has its own mode:
    # set here, before torch starts any, it is inherited by all.
    torch.set_flush_denormal(True)
    train_seed, eval_seed, final_seed = (int(s) for s in np.random.SeedSequence(args.seed).generate_state(3))

    envs = make_envs(args)
    q_network = QNetwork(envs.observation_space, envs.action_space, args).to(device)
    target_network = copy.deepcopy(q_network)
    parameters, target_parameters = list(q_network.parameters()), list(target_network.parameters())
    optimizer = make_optimizer(parameters, args)
    memory = ReplayMemory(args.buffer_size, args.num_envs)
    epsilon_schedule = linear_schedule if args.epsilon_schedule == "linear" else exponential_schedule
    learning_rate_end = args.learning_rate if args.learning_rate_end is None else args.learning_rate_end
    stacks = np.zeros((args.num_envs, 4, 84, 84), np.uint8)  # what each environment's actor sees
    global_step = gradient_steps = target_syncs = 0
    loss = torch.zeros(())  # until the first gradient step
    learning_starts = args.learning_starts

    state = {"target_network": target_network, "optimizer": optimizer}
    if args.checkpoint_memory:
        state["memory"] = memory
    with Run(args, envs, q_network, **state) as run:
        run.say(f"replay memory of {memory.nbytes / 1e6:,.1f} MB")
        if args.resume:
            global_step, gradient_steps, target_syncs = run.restored()
            if not args.checkpoint_memory:  # the memory is empty: fill it, at the current epsilon, before learning on
                run.say(f"no learning until {args.learning_starts:,} transitions have refilled the replay memory")
                # so that the next gradient step is due learning_starts + train_frequency transitions from here
                learning_starts = global_step + args.learning_starts - gradient_steps * args.train_frequency
        frames = run.first_obs(train_seed + global_step)  # environment i gets this seed + i
        memory.begin(frames)
        push_frames(stacks, frames, ended=np.ones(args.num_envs, bool))

        while global_step < args.total_timesteps and not run.reached(args.target_return):
            # Act: at random with probability epsilon, else greedily. Each environment draws for itself.
            epsilon = epsilon_schedule(args.epsilon_start, args.epsilon_end, args.exploration_steps, global_step)
            with torch.no_grad():
                q_values = q_network(torch.from_numpy(stacks).to(device))  # (num_envs, A)
            explore = torch.rand(args.num_envs) < epsilon
            random_actions = torch.randint(envs.action_space.n, (args.num_envs,))
            actions = torch.where(explore, random_actions, q_values.argmax(dim=1).cpu()).numpy()

            # Send the actions: in worker processes the environments step while this one learns.
            envs.step_async(actions.tolist())  # plain ints: quicker to pickle, and to read, than NumPy's
            global_step += args.num_envs

            # Learn: one gradient step per train_frequency transitions, however many environments there are.
            learning_rate = linear_schedule(args.learning_rate, learning_rate_end, args.total_timesteps, global_step)
            optimizer.param_groups[0]["lr"] = learning_rate
            while gradient_steps < (global_step - learning_starts) // args.train_frequency:
                batch = memory.sample(args.batch_size, args.n_step, args.gamma, device)
                with torch.no_grad():
                    next_q_values = target_network(batch.next_obs)
                loss, q_taken = td_loss(q_network(batch.obs), next_q_values, batch, batch.discounts, args.loss)
                optimizer.zero_grad()
                loss.backward()
                if args.max_grad_norm > 0:
                    nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                if args.max_grad_value > 0:
                    nn.utils.clip_grad_value_(parameters, args.max_grad_value)
                optimizer.step()
                gradient_steps += 1

                # Sync the target every target_frequency transitions; a gradient step stands for train_frequency.
                if target_syncs < gradient_steps * args.train_frequency // args.target_frequency:
                    update_target(target_parameters, parameters, args.tau)
                    target_syncs += 1

                if gradient_steps % 500 == 0:
                    metrics = {"loss": loss.item(), "q_taken": q_taken.mean().item()}
                    metrics |= {"epsilon": epsilon, "learning_rate": learning_rate}
                    run.write(global_step, {f"train/{name}": value for name, value in metrics.items()})

            # Receive and store. Where an episode ended, new_frames holds the first frame of the next one already: the
            # memory gets the true last one as well. Only termination masks the bootstrap.
            new_frames, rewards, dones, infos = envs.step_wait()
            truncated = np.array([info["TimeLimit.truncated"] for info in infos])
            terminated = dones & ~truncated
            next_frames = new_frames.copy()
            for i in np.flatnonzero(dones):
                next_frames[i] = infos[i]["terminal_observation"]
            memory.add(actions, rewards, next_frames, terminated, dones, new_frames)
            push_frames(stacks, new_frames, ended=dones)
            for info in infos:
                if "episode" in info:  # a game ended, with its raw score
                    run.write_episode(global_step, info["episode"])

            # Evaluate and keep the best network, each time a multiple of eval_every is crossed; save.
            run.check(global_step, loss=loss)
            if global_step // args.eval_every > (global_step - args.num_envs) // args.eval_every:
                run.evaluate(global_step, eval_seed)
            run.tick(global_step=global_step, gradient_steps=gradient_steps, target_syncs=target_syncs)

        return run.finish(final_seed)


# === Evaluation =======================================================================================================


@torch.no_grad()
def evaluate(args: Args, network: nn.Module, num_episodes: int, seed: int, **env_options) -> np.ndarray:
    """Play num_episodes whole games at eval_epsilon, one per environment, side by side; return their scores, unclipped.

    One game each: the first N games to end would be the short ones. Environment i gets seed + i; env_options
    (render_mode, video_dir) go to the first.
    """
    device, generator = next(network.parameters()).device, torch.Generator().manual_seed(seed)
    envs = [make_env(args, evaluation=True, **(env_options if i == 0 else {})) for i in range(num_episodes)]
    frames = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    stacks = np.zeros((num_episodes, 4, 84, 84), np.uint8)
    push_frames(stacks, frames, ended=np.ones(num_episodes, bool))
    returns, running = np.zeros(num_episodes), list(range(num_episodes))
    while running:
        q_values = network(torch.from_numpy(stacks[running]).to(device))
        explore = torch.rand(len(running), generator=generator) < args.eval_epsilon
        random_actions = torch.randint(q_values.shape[1], (len(running),), generator=generator)
        actions = torch.where(explore, random_actions, q_values.argmax(dim=1).cpu()).tolist()
        for i, action in zip(tuple(running), actions, strict=True):
            frames[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += reward
            if terminated or truncated:
                envs[i].close()
                running.remove(i)
        push_frames(stacks, frames, ended=np.zeros(num_episodes, bool))
    return returns


# ######################################################################################################################
# The algorithm ends here. What follows is the same in every script and holds no reinforcement learning: checks of the
# arguments, the run directory, checkpoints, signals, playing and filming.
# ######################################################################################################################


SCRIPT = Path(__file__).stem
AT_MOST_ONE = {"epsilon_start", "epsilon_end", "eval_epsilon", "gamma", "gae_lambda", "tau", "rmsprop_alpha"}
MAY_BE_ZERO = {"seed", "learning_rate_end", "max_grad_norm", "max_grad_value", "entropy_coef", "weight_decay"}
MAY_BE_ZERO |= {"burn_in"} | AT_MOST_ONE - {"tau"}
RESUME_MAY_CHANGE = {"total_timesteps", "target_return", "device", "render", "video", "track", "track_project"}
RESUME_MAY_CHANGE |= {"checkpoint_every", "eval_episodes", "final_eval_episodes"}
PLAY_MAY_CHANGE = {"env_id", "seed", "device", "render", "video", "time_limit", "final_eval_episodes", "eval_epsilon"}


def require(args, name: str, condition: bool, remedy: str):
    """Unless the condition holds, raise ValueError: tyro turns it into a message and exit status 2."""
    if not condition:
        raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: {remedy}")


def check_args(args):
    """Refuse what cannot work before anything is created."""
    for name, kind in get_type_hints(type(args)).items():
        value, kinds = getattr(args, name), get_args(kind) or (kind,)  # int | None: both types; a Literal: its values
        fits = type(value) in kinds or value in kinds or (type(value) is int and float in kinds)
        require(args, name, fits, f"must be {' or '.join(getattr(k, '__name__', str(k)) for k in kinds)}")
        if type(value) in (int, float):
            require(args, name, abs(value) < 2**63, "give a finite number, below 2^63")  # NaN is not below it
        if type(value) in (int, float) and name not in ("time_limit", "target_return"):
            require(args, name, value > 0 or (value == 0 and name in MAY_BE_ZERO), "give a larger number")
            require(args, name, value <= 1 or name not in AT_MOST_ONE, "give a number from 0 to 1")
    require(args, "time_limit", args.time_limit in (None, -1) or args.time_limit > 0, "give a number of steps, or -1")
    require(args, "play", not (args.play and args.resume), "give either --play or --resume")
    require(args, "run_dir", not (args.run_dir and os.path.exists(args.run_dir)), "exists already; give another")
    if args.track != "none":
        require(args, "track", importlib.util.find_spec(args.track) is not None, f"first: pip install {args.track}")
    select_device(args.device, auto="cpu")
    try:
        env = make_env(args)
    except (gym.error.Error, AttributeError, ImportError, TypeError, ValueError) as error:
        raise ValueError(f"--env-id {args.env_id}: {error}") from None
    modes = env.metadata.get("render_modes", [])
    require(args, "video", not args.video or "rgb_array" in modes, "this environment cannot draw itself")
    require(args, "render", not args.render or "human" in modes, "this environment has no window")
    env.close()
    if args.video:  # before the training, not after it: what the metadata promise is not always there
        with contextlib.closing(make_env(args, render_mode="rgb_array")) as env:
            env.reset(seed=args.seed)
            require(args, "video", np.ndim(env.render()) == 3, "this environment draws no pictures (H, W, 3)")


def select_device(name: str, auto: str) -> torch.device:
    """Return the device of that name; what `auto` stands for is the script's choice."""
    try:
        return torch.zeros(1, device=auto if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}; try auto, cpu, cuda:N or mps") from None


def refuse(message: str):
    print(f"{SCRIPT}: {message}", file=sys.stderr)
    raise SystemExit(2)


def save_atomically(contents: dict, path: Path):
    """Write a checkpoint so that a kill at any moment leaves the old file or the new one, never half of one."""
    try:
        with open(path.with_suffix(".tmp"), "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path.with_suffix(".tmp"), path)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError where the disk is full
        path.with_suffix(".tmp").unlink(missing_ok=True)
        number = getattr(error, "errno", None) or errno.ENOSPC
        raise OSError(number, os.strerror(number), str(path)) from None


def write_atomically(text: str, path: Path):
    """Write a text in the same way: a kill leaves the old file or the new one."""
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def is_disk_error(error) -> bool:
    """Whether this is the error of a disk that is full, or cannot be written."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint of this script; weights_only: tensors and plain numbers, nothing that could run code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] != SCRIPT:
            raise ValueError(f"it was written by {checkpoint['script']}.py")
    except Exception as error:  # a broken file can fail in any way
        refuse(f"{path} is no checkpoint of {SCRIPT}.py: {(str(error) or repr(error)).splitlines()[0]}")
    return checkpoint


def pack(value, inside: bool = False):
    """Turn an attribute of an environment into what a checkpoint may hold; raise TypeError if it is more than data."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        return {"array": value.tolist(), "dtype": str(value.dtype), "shape": list(value.shape)}
    if type(value) in (list, tuple, dict):
        items = value.items() if type(value) is dict else value
        return [type(value).__name__, *(pack(item, inside=True) for item in items)]
    if isinstance(value, np.random.Generator) and not inside:
        return {"generator": pack(value.bit_generator.state)}
    if isinstance(value, collections.deque) and not inside:
        return {"deque": [pack(item, inside=True) for item in value]}
    raise TypeError(f"{type(value)} is more than data")


def unpack(value, current=None):
    """Undo pack; random generators and deques are not replaced: the current one is set."""
    if isinstance(value, list):
        return {"list": list, "tuple": tuple, "dict": dict}[value[0]](map(unpack, value[1:]))
    if not isinstance(value, dict):
        return value
    if "array" in value:
        array = np.array(value["array"], value["dtype"]).reshape(value["shape"])
        return array[()]  # a number, if it has no dimensions
    if "generator" in value:
        current.bit_generator.state = unpack(value["generator"])
    else:
        current.clear()
        current.extend(map(unpack, value["deque"]))
    return current


class Resumable(gym.Wrapper):
    """Hands out copies of the observations, and can save and load the state of the environment and all its wrappers.

    Copies, because some environments return one array, overwritten at every step, and a VecEnv resets them before it
    returns.
    """

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        self.obs = np.array(obs)
        return self.obs, info

    def step(self, action):
        obs, *rest = self.env.step(action)
        self.obs = np.array(obs)
        return self.obs, *rest

    def layers(self) -> list:
        """Return this wrapper, all below it, and the environment."""
        found = [self]
        while found[-1] is not self.unwrapped:
            found.append(found[-1].env)
        return found

    def get_state(self) -> list | None:
        """Return the attributes of each layer, or None where one is more than data, such as a physics engine."""
        fixed, layers = (gym.Space, gym.envs.registration.EnvSpec), self.layers()
        try:
            return [
                {name: pack(v) for name, v in vars(layer).items() if not isinstance(v, fixed) and v is not below}
                for layer, below in zip(layers, [*layers[1:], layers], strict=True)
            ]
        except TypeError:
            return None

    def set_state(self, state: list) -> np.ndarray:
        """Load what get_state returned; return the observation of that moment."""
        for layer, attributes in zip(self.layers(), state, strict=True):
            for name, value in attributes.items():
                setattr(layer, name, unpack(value, getattr(layer, name, None)))
        return self.obs


class Run:
    """A run's directory, console, checkpoints and signals; a context manager that closes them, and envs, at the end.

    network is what acts; state is what else a checkpoint needs: objects with state_dict and load_state_dict.
    """

    def __init__(self, args, envs, network: nn.Module, **state):
        self.args, self.envs, self.network, self.state = args, envs, network, {"network": network, **state}
        name = f"{args.env_id}__{SCRIPT}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.dir = Path(args.resume or args.run_dir or Path("runs", name.replace("/", "-").replace(":", "-")))
        self.counts = {"global_step": 0}  # as of the last tick
        self.record = {"seconds": 0.0, "wall_seconds": 0.0, "best": -math.inf, "evaluations": [], "last_returns": []}
        self.started, self.paused, self.signal, self.latest = time.perf_counter(), 0.0, None, {}
        self.next_shown = collections.defaultdict(float)  # metric: the step from which TensorBoard gets its next point
        self.env_states = None
        if args.resume:
            self.load(self.dir / "last.pt")

    def load(self, path: Path):
        """Load a checkpoint into the network and the rest of the state, before anything is written."""
        checkpoint = load_checkpoint(path)
        if "counts" not in checkpoint:
            refuse(f"{path} holds a network only and cannot be resumed")
        try:
            counts, planned = checkpoint["counts"], checkpoint["args"]["total_timesteps"]  # the last iteration may end
            if self.args.total_timesteps < min(counts["global_step"], planned):  # beyond what was planned
                refuse(f"--total-timesteps {self.args.total_timesteps} is less than the run has behind it")
            for name, value in checkpoint["args"].items():  # args.json may have been edited
                if getattr(self.args, name, value) != value and name not in RESUME_MAY_CHANGE | {"resume", "run_dir"}:
                    raise ValueError(f"its --{name.replace('_', '-')} is {value}")
            for name, value in self.state.items():
                value.load_state_dict(checkpoint.pop(name))
            torch.set_rng_state(checkpoint["torch_rng"])
            self.counts, self.record, self.env_states = (checkpoint[n] for n in ("counts", "record", "env_states"))
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            refuse(f"{path} is not of this run: {str(error).splitlines()[-1].strip()}")
        if (self.dir / "best.pt").exists():  # it may be of after the checkpoint
            self.record["best"] = max(self.record["best"], load_checkpoint(self.dir / "best.pt")["return_mean"])

    def __enter__(self):
        args, step = self.args, self.counts["global_step"]
        # Before the directory is there: a signal from now on waits for the first tick, and leaves a whole checkpoint.
        self.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.dir.mkdir(parents=True, exist_ok=bool(args.resume))
            (self.dir / "result.json").unlink(missing_ok=True)  # of before the resume
            rows = ["step,metric,value"]
            if (self.dir / "progress.csv").exists():  # what was reported after the checkpoint will be reported again
                lines = (self.dir / "progress.csv").read_text(errors="replace").splitlines()
                whole = [re.fullmatch(r"(\d+),[\w/]+,[-+.\de]+", line) for line in lines]
                rows += [match[0] for match in whole if match and int(match[1]) <= step]
            write_atomically("\n".join(rows) + "\n", self.dir / "progress.csv")
            write_atomically(json.dumps(asdict(args), indent=2) + "\n", self.dir / "args.json")
            self.csv_file = open(self.dir / "progress.csv", "a")
        except OSError as error:
            refuse(f"cannot write the run directory {self.dir}: {error.strerror}")
        try:
            if args.track == "wandb":
                import wandb

                wandb.init(project=args.track_project, name=self.dir.name, config=asdict(args), sync_tensorboard=True)
            elif args.track == "swanlab":
                import swanlab

                swanlab.sync_tensorboard_torch()
                swanlab.init(project=args.track_project, experiment_name=self.dir.name, config=asdict(args))
        except Exception as error:  # such as a login that is missing
            if not args.resume:
                shutil.rmtree(self.dir, ignore_errors=True)
            refuse(f"--track {args.track}: {(str(error) or repr(error)).splitlines()[0]}")
        self.tensorboard = SummaryWriter(str(self.dir), purge_step=step + 1 if args.resume else None)
        table = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
        self.tensorboard.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{table}", step)
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit=" steps", disable=None)  # None: terminals only
        parameters = sum(p.numel() for p in self.network.parameters())
        self.say(f"{args.env_id}, seed {args.seed}, {parameters:,} parameters; writing {self.dir}")
        self.started = time.perf_counter()
        return self

    def __exit__(self, kind, error, traceback):
        workers, died = getattr(self.envs, "processes", []), []
        if kind in (EOFError, BrokenPipeError, ConnectionResetError):  # as where a worker is gone, or about to be
            gone = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=2)
            died = [worker for worker in workers if worker.sentinel in gone]
            for worker in died:
                worker.join(timeout=10)  # its pipes close a moment before it has an exit code
        try:
            # Not after NaN, nor on a full disk; else in the middle of an iteration, a few gradient steps on.
            broken = kind is not None and issubclass(kind, Exception) and not issubclass(kind, FloatingPointError)
            if broken and self.counts["global_step"] > 0 and not is_disk_error(error):
                self.save()
        finally:
            if kind is None or not workers:
                self.envs.close()
            else:  # close() would wait for an answer from workers that may be gone
                for worker in workers:
                    worker.terminate()
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            self.bar.close()
            with contextlib.suppress(OSError):
                self.csv_file.close()
                self.tensorboard.close()
        if kind is not None and self.counts["global_step"] > 0 and (self.dir / "last.pt").exists():
            command = shlex.join(["python", sys.argv[0], "--resume", str(self.dir)])
            print(f"stopped; to go on: {command}", file=sys.stderr)
        if kind is not None and self.counts["global_step"] == 0 and not self.args.resume:
            shutil.rmtree(self.dir, ignore_errors=True)  # nothing happened yet
        if died:
            if self.signal:  # it went to the workers as well, and they were faster
                raise SystemExit(128 + self.signal)
            reason = f"exit code {died[0].exitcode}; its own error, where it had one, is above"  # -9: out of memory?
            print(f"{SCRIPT}: a worker process of the environments died ({reason})", file=sys.stderr)
            raise SystemExit(1)

    def on_signal(self, number, frame):
        """Remember Ctrl-C or kill until the next tick, where a checkpoint is consistent; obey a second one at once."""
        self.signal = number
        signal.signal(number, self.handlers[number])
        self.say("stopping after this step; once more stops at once")

    def say(self, line: str):
        try:
            tqdm.write(line)  # above the progress bar, where there is one
        except BrokenPipeError:  # nobody reads any longer, as behind `| head`: the run goes on without a console
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def seconds(self) -> float:
        """Training time: without evaluations and checkpoints, with the time before a resume."""
        return self.record["seconds"] + time.perf_counter() - self.started - self.paused

    def write(self, global_step: int, metrics: dict):
        """Report numbers to progress.csv and, about 1,000 of each metric, to TensorBoard (and so to a tracker).

        A point there is not cheap: a thread encodes it in pure Python and holds Python's lock meanwhile. Where episodes
        are short, and so many, a small network's training would feel it.
        """
        self.latest.update(metrics)
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is not finite at step {global_step:,}")
            self.csv_file.write(f"{global_step},{name},{value}\n")
            if global_step >= self.next_shown[name]:
                self.next_shown[name] = global_step + self.args.total_timesteps / 1_000
                self.tensorboard.add_scalar(name, value, global_step)

    def write_episode(self, global_step: int, episode: dict):
        """Report a training episode: its return "r" and its length "l"."""
        last_returns = self.record["last_returns"] = [*self.record["last_returns"][-99:], float(episode["r"])]
        self.write(global_step, {"train/episode_return": last_returns[-1], "train/episode_length": int(episode["l"])})
        self.write(global_step, {"train/return_mean_100": float(np.mean(last_returns))})

    def reached(self, target_return: float | None) -> bool:
        """Whether the last 100 training episodes have this mean return."""
        last_returns = self.record["last_returns"]
        return target_return is not None and len(last_returns) == 100 and float(np.mean(last_returns)) >= target_return

    def evaluate(self, global_step: int, seed: int):
        """Evaluate the network, off the clock, and keep it as best.pt if none was better before."""
        before, seconds = time.perf_counter(), self.seconds()
        returns = evaluate(self.args, self.network, self.args.eval_episodes, seed)
        mean = float(returns.mean())
        self.record["evaluations"].append([global_step, mean, seconds])
        if mean >= self.record["best"]:
            self.record["best"] = mean
            contents = {"script": SCRIPT, "args": asdict(self.args), "network": self.network.state_dict()}
            save_atomically({**contents, "global_step": global_step, "return_mean": mean}, self.dir / "best.pt")
        self.write(global_step, {"eval/return_mean": mean, "eval/return_min": float(returns.min())})
        self.write(global_step, {"time/steps_per_second": global_step / max(seconds, 1e-9)})
        shown = {k.split("/")[1]: v for k, v in self.latest.items() if k.startswith("train/")}
        names = ("return_mean_100", "loss", "q_taken", "epsilon", "entropy")
        details = "  ".join(f"{name} {shown[name]:.3g}" for name in names if name in shown)
        self.say(f"{global_step:>10,} steps {seconds:7.1f} s  eval {mean:7.1f} (min {returns.min():.0f})  {details}")
        self.csv_file.flush()
        self.paused += time.perf_counter() - before

    def check(self, global_step: int, **values):
        """Stop at the step at which one of these is NaN or infinite; the last checkpoint, saved before, stays."""
        for name, value in values.items():
            if not np.isfinite(value.item() if isinstance(value, torch.Tensor) else value).all():
                raise FloatingPointError(f"the {name} is not finite at step {global_step:,}")

    def tick(self, **counts: int):
        """Once per iteration: move the bar, save when a checkpoint is due, stop here if a signal asked for it."""
        every, step = self.args.checkpoint_every, counts["global_step"]
        due = step // every > self.counts["global_step"] // every
        self.counts = counts
        self.bar.update(step - self.bar.n)
        if due or self.signal:
            self.save(between_steps=True)
        if self.signal:
            raise SystemExit(128 + self.signal)

    def save(self, between_steps: bool = False):
        """Write last.pt: all that --resume needs; the environments can be asked for their states between steps only."""
        before = time.perf_counter()
        self.csv_file.flush()
        self.tensorboard.flush()
        if all(torch.isfinite(p).all() for p in self.network.parameters()):  # else keep the last good one
            record = {**self.record, "seconds": self.seconds(), "wall_seconds": self.wall_seconds()}
            contents = {"script": SCRIPT, "args": asdict(self.args), "counts": self.counts, "record": record}
            contents |= {name: value.state_dict() for name, value in self.state.items()}
            contents |= {"torch_rng": torch.get_rng_state(), "env_states": None}
            if between_steps and hasattr(self.envs, "has_attr") and self.envs.has_attr("get_state"):
                states = self.envs.env_method("get_state")
                contents["env_states"] = states if all(states) else None
            save_atomically(contents, self.dir / "last.pt")
        self.paused += time.perf_counter() - before

    def restored(self):
        """Return the counts of the checkpoint, in the order in which tick received them."""
        return self.counts.values()

    def first_obs(self, seed: int) -> np.ndarray:
        """Return the first observations, or in a resumed run those at which it stopped, where the states were saved."""
        self.envs.seed(seed)
        obs = self.envs.reset()
        if self.env_states is None and self.args.resume:
            self.say("the environments' states cannot be saved: they begin new episodes")
        for i, state in enumerate(self.env_states or []):
            obs[i] = self.envs.env_method("set_state", state, indices=i)[0]
        self.check(self.counts["global_step"], observation=obs)
        return obs

    def wall_seconds(self) -> float:
        return self.record["wall_seconds"] + time.perf_counter() - self.started

    def finish(self, seed: int) -> dict:
        """Save; evaluate the final and the best network on seeds not used so far; write result.json."""
        seconds, args = self.seconds(), self.args
        self.save(between_steps=True)
        for number, handler in self.handlers.items():  # all is saved: Ctrl-C and kill may act at once
            signal.signal(number, handler)
        if self.signal:
            raise SystemExit(128 + self.signal)
        returns = evaluate(args, self.network, args.final_eval_episodes, seed)
        best = copy.deepcopy(self.network)
        if (self.dir / "best.pt").exists():
            best.load_state_dict(load_checkpoint(self.dir / "best.pt")["network"])
        best_returns = evaluate(args, best, args.final_eval_episodes, seed)
        threshold = make_env(args).unwrapped.spec.reward_threshold
        solved = [e for e in self.record["evaluations"] if threshold is not None and e[1] >= threshold]
        result = {
            **self.counts,
            "seconds": seconds,
            "wall_seconds": self.wall_seconds(),
            "steps_per_second": self.counts["global_step"] / seconds,
            "final_return_mean": float(returns.mean()),
            "final_return_min": float(returns.min()),
            "final_return_std": float(returns.std()),
            "best_return_mean": float(best_returns.mean()),
            "solved_step": solved[0][0] if solved else None,
            "solved_seconds": solved[0][2] if solved else None,
            "evaluation_curve": [e[:2] for e in self.record["evaluations"]],  # [step, mean return]
            "run_dir": str(self.dir),
        }
        (self.dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        self.csv_file.flush()
        draw_curves(self.dir)
        final = f"final network: {returns.mean():.1f} over {len(returns)} episodes (min {returns.min():.0f})"
        self.say(f"{final}; best network: {best_returns.mean():.1f}; {seconds:.1f} s of training")
        if args.video:
            evaluate(args, best, 1, seed, render_mode="rgb_array", video_dir=self.dir / "videos")
            self.show_film(next((self.dir / "videos").glob("*.mp4")))
        return result

    def show_film(self, path: Path):
        """Show the first 20 seconds of a film among TensorBoard's images, as an animated GIF that lies beside it."""
        from moviepy import VideoFileClip  # only here: SummaryWriter.add_video calls moviepy 1, and fails with 2
        from tensorboard.compat.proto.summary_pb2 import Summary

        gif = path.with_suffix(".gif")
        with VideoFileClip(str(path)) as film:
            film.subclipped(0, min(20, film.duration)).resized(width=160).write_gif(gif, fps=15, logger=None)
        image = Summary.Value(tag="best network", image=Summary.Image(encoded_image_string=gif.read_bytes()))
        self.tensorboard.file_writer.add_summary(Summary(value=[image]), self.counts["global_step"])


def draw_curves(run_dir: Path):
    """Draw the returns and the losses of progress.csv over the transitions, into curves.png."""
    from matplotlib.figure import Figure  # only here: it takes a while to import. Without pyplot it needs no screen.

    series = collections.defaultdict(list)
    for line in (run_dir / "progress.csv").read_text().splitlines()[1:]:
        step, name, value = line.split(",")
        series[name].append((int(step), float(value)))
    panels = [["train/return_mean_100", "eval/return_mean"], *([name] for name in sorted(series) if "loss" in name)]
    figure = Figure(figsize=(8, 3 * len(panels)), layout="constrained")
    for axes, names in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True):
        for name in names:
            axes.plot(*np.reshape(series[name], (-1, 2)).T, label=name)
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
    axes.set_xlabel("transitions")
    figure.savefig(run_dir / "curves.png")


def play(args, network_class):
    """Evaluate a checkpoint; with --render in a window, with --video as a film beside the checkpoint."""
    checkpoint = load_checkpoint(Path(args.play))
    env = make_env(args)
    network = network_class(env.observation_space, env.action_space, args).to(select_device(args.device, auto="cpu"))
    try:
        network.load_state_dict(checkpoint["network"])
    except RuntimeError as error:
        refuse(f"{args.play} does not fit {args.env_id}: {str(error).splitlines()[-1].strip()}")
    if args.render:
        episodes = range(args.final_eval_episodes)
        returns = np.array([evaluate(args, network, 1, args.seed + i, render_mode="human").item() for i in episodes])
    else:
        returns = evaluate(args, network, args.final_eval_episodes, args.seed)
    if args.video:
        evaluate(args, network, 1, args.seed, render_mode="rgb_array", video_dir=Path(args.play).parent / "videos")
    print(f"return {returns.mean():.1f} over {len(returns)} episodes ({returns.min():.0f} to {returns.max():.0f})")


def parse_args() -> "Args":
    """Parse the command line; with --resume and --play, the saved arguments take the place of the defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume")
    parser.add_argument("--play")
    given = {name: value for name, value in vars(parser.parse_known_args()[0]).items() if value is not None}
    if not given:
        return tyro.cli(Args)
    name = given.get("resume") or given.get("play") or refuse("--resume needs a run directory, --play a checkpoint")
    try:
        if "resume" in given:
            saved = json.loads(Path(name, "args.json").read_text())
        else:
            saved = load_checkpoint(Path(name))["args"]
        fresh = {"run_dir": "", "device": "auto", "render": False, "video": False, "track": "none"}
        default = Args(**{**saved, **fresh, "resume": "", "play": "", **given})
    except (OSError, TypeError, ValueError) as error:
        refuse(f"cannot go on from {name}: {error}")
    args = tyro.cli(Args, default=default)
    may_change = RESUME_MAY_CHANGE if args.resume else PLAY_MAY_CHANGE
    for name, value in asdict(default).items():
        if getattr(args, name) != value and name not in may_change:
            refuse(f"--{name.replace('_', '-')} is {value} in the saved run and cannot be changed")
    return args


def main(network_class):
    try:
        args = parse_args()
    except BrokenPipeError:  # nobody reads the help to its end, as behind `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    try:
        if args.play:
            play(args, network_class)
        else:
            train(args)
    except (FloatingPointError, OSError) as error:
        if not isinstance(error, FloatingPointError) and not is_disk_error(error):
            raise
        print(f"{SCRIPT}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "alloc" not in str(error):
            raise
        refuse(f"not enough memory for these sizes: {(str(error) or repr(error)).splitlines()[0]}")
    except KeyboardInterrupt:  # outside the training loop, or the second one
        raise SystemExit(128 + signal.SIGINT) from None


if __name__ == "__main__":
    main(QNetwork)
