# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["ale-py==0.12.1", "gymnasium==1.4.0", "moviepy==2.2.1", "numpy==2.4.6",
#                 "opencv-python-headless==5.0.0.93", "psutil==7.2.2", "pygame==2.6.1", "stable-baselines3==2.9.2",
#                 "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.16"]
# ///
"""DQN on Atari: deep Q-learning from pixels (Mnih et al., Nature 518, 2015).

    y = r_1 + ... + gamma^(n-1) * r_n + gamma^n * max_a' Q_target(s_n, a')    n: 3, later 1; no max after a lost life
    L = mean of Huber(y - Q(s, a))    the loss, over a minibatch; its gradient is the paper's clipped error

The algorithm of dqn_cartpole.py, which is the script to read first, with what pixels ask for: a preprocessing that
makes 84x84 grey frames of a game, four of them stacked into an observation, a convolutional network, and a replay
memory that stores each frame once. The games run in processes of their own, and step while the main process learns. Any
other environment whose observation is one 84x84 grey frame is learned too (docs/own_environment.md).

    python dqn_atari.py --env-id BreakoutNoFrameskip-v4
    python dqn_atari.py --env-id PongNoFrameskip-v4 --target-return 18
    python dqn_atari.py --resume runs/NAME
    python dqn_atari.py --play runs/NAME/best.pt --render

Without a GPU, in bfloat16. Breakout, mean score of the last 100 training games: at a million transitions 88 after an
hour on two cores (seed 1), 75 to 84 on one thread (seeds 1 to 3); 346 at 10 million (seed 1, one thread).
Pong as above ends after 28 minutes on two cores (seed 3), on one thread after 49, 58 and 65 (seeds 1 to 3).

Is my run healthy?       at 250,000   500,000  1,000,000  4,000,000  10,000,000  transitions, seed 1, one thread
    return_mean_100         22        45       84         270        346        (whole games; a random player: 1.3)
    evaluation              30        46       142        279        339        (of 5 games: noisy)
    loss                    0.018     0.024    0.032      0.038      0.027      (medians of the 50,000 before; spiky)
    q_taken                 1.1       1.9      2.7        5.7        6.1        (the same)

Units: a transition is one action, held for 4 emulator frames; 10 million transitions are 40 million frames, 185 hours
of play. An Atari game's train/episode_length counts emulator frames, those of no-ops and FIRE too. A memory of a
million transitions takes 7 GB, each game's process 17 MB (when spawned: 160). Without --checkpoint-memory a resumed run
begins with an empty memory, and plays --learning-starts transitions (in a long run, give more) before it learns on.

A training episode is a life; an evaluation plays the whole game. In both, a life begins with no-ops and, where action 1
is FIRE, actions 1 and 2: the agent never learns that FIRE begins a life, so evaluations press it too.
train/episode_return is still the score of a whole game, unclipped.

Differences from the paper: Adam, its learning rate falling from 2e-4 to 5e-5, instead of RMSProp; for the first million
transitions three-step returns (Hessel et al., "Rainbow", AAAI 2018), which carry a reward back three times as fast;
He initialisation, as ReLUs died on Pong with PyTorch's; a gradient step every 6 actions instead of 4, so that an hour
holds more play; target copies every 667 gradient steps instead of 10,000; 10 million transitions instead of 50; epsilon
down to 0.01 after 250,000 instead of 0.1 after 1 million; learning from 20,000 on instead of 50,000; evaluations of
whole games at epsilon 0.01, not of 5 minutes at 0.05; FIRE pressed for the agent; several games side by side; max Q
kept where a game runs out of time; bfloat16 on processors with instructions for it. As in the paper, there are no
double or dueling networks, and no prioritised replay.

Differences from dqn_cartpole.py: AtariGame, PixelEnv and push_frames; a convolutional network; a memory of frames, as
large as fits, with n-step returns; target copies; lives as episodes; signs of rewards; a learning rate that falls over
--learning-rate-steps; the Huber loss; an epsilon in evaluations; CUDA where there is one, else all cores. On a CPU a
seed gives the same parameters with the same versions, kind of processor, number of threads and --buffer-size (its
default depends on free memory).
"""

import argparse
import atexit
import copy
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

import ale_py  # importing it registers the Atari ids, in the workers too
import cv2
import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn as nn
import tyro
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv  # of SB3 only this, and the seeding
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# === Arguments ========================================================================================================
SCRIPT = "dqn_atari"  # in the names of run directories, and in checkpoints
Count = Annotated[int, 1, 10**9]  # a type, and the range that a flag must lie in
Positive = Annotated[float, 1e-12, 1e9]
Fraction = Annotated[float, 0, 1]
CONTAINER_LIMIT = "/sys/fs/cgroup/memory.max"  # Linux: bytes, or "max"; a batch job's limit may stand elsewhere


@dataclass
class Args:
    """DQN (Mnih et al. 2015) from pixels: Atari games, or any environment whose observation is one 84x84 grey frame."""

    # algorithm
    total_timesteps: Count = 10_000_000  # transitions, summed over the environments; 4 emulator frames each
    learning_starts: Count = 20_000  # transitions before the first gradient step; also after a resume without memory
    train_frequency: Count = 6  # transitions played per gradient step
    target_frequency: Count = 4_000  # transitions per copy of the network into the target network
    gamma: Fraction = 0.99  # discount per step
    n_step: Annotated[int, 1, 1_000] = 3  # rewards in a target before max Q; no off-policy correction
    n_step_until: Count = 1_000_000  # transitions after which n is 1
    buffer_size: Annotated[int | None, 1, 10**9] = None  # frames in the memory (default: 1,000,000 or 0.9 of what fits)
    batch_size: Count = 32  # transitions in a minibatch
    network: Literal["nature", "nips"] = "nature"  # of 2015; or of 2013, a third of the multiplications
    init: Literal["he", "torch"] = "he"  # initial weights: of He et al. 2015; or PyTorch's (on Pong ReLUs died)

    # exploration
    epsilon_start: Fraction = 1.0  # probability of a random action at the start
    epsilon_end: Fraction = 0.01  # probability of a random action once the schedule has ended
    exploration_steps: Count = 250_000  # transitions over which epsilon falls, in a straight line

    # optimisation
    learning_rate: Positive = 2e-4  # step size of Adam at the start
    learning_rate_end: Annotated[float, 0, 1e9] = 5e-5  # step size once the schedule has ended
    learning_rate_steps: Count = 1_500_000  # transitions over which the learning rate falls, in a straight line
    optimizer_eps: Positive = 1e-8  # Adam's epsilon: added to the denominator of its step
    loss: Literal["mse", "huber"] = "huber"  # squared TD error; huber: half of it, but linear for errors beyond 1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 if the CPU has it and there is no GPU

    # environment
    env_id: str = "BreakoutNoFrameskip-v4"  # or ALE/{Game}-v5: sticky actions; or module:Env-v0 with frames of your own
    clip_rewards: bool = True  # learn from the sign of each reward; --no-clip-rewards where sizes matter
    num_envs: Annotated[int, 1, 1_000] = 8  # games that are played side by side
    vec_env: Literal["dummy", "subproc"] = "subproc"  # in this process; or a process each
    time_limit: Annotated[int | None, -1, 2**28] = None  # steps per game, no-ops included (default: its own); -1: none

    # evaluation
    eval_every: Count = 250_000  # transitions between evaluations
    eval_episodes: Count = 5  # whole games per evaluation
    eval_epsilon: Fraction = 0.01  # probability of a random action in evaluations; with 0 a game may go in circles
    final_eval_episodes: Count = 30  # whole games at the end; other seeds than those that chose best.pt
    target_return: Annotated[float, -1e9, 1e9] = 1e9  # stop once the last 100 training games have this mean score

    # run
    seed: Annotated[int, 0, 2**30] = 1  # of the network, exploration, replay memory and environments
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps; auto is CUDA where there is one, in --play the CPU
    run_dir: str = ""  # where to write the run (default: runs/{env}__{script}__{seed}__{time})
    checkpoint_every: Count = 100_000  # transitions between checkpoints
    checkpoint_memory: bool = False  # save the replay memory too: 7 GB of disk per million, twice that while writing
    resume: str = ""  # run directory of a stopped run: go on with it
    play: str = ""  # checkpoint file: evaluate it, without training
    render: bool = False  # with --play: show three games in a window
    video: bool = False  # film a game of the best network, at most 1,500 frames, into the run's videos/
    track: Literal["none", "swanlab", "wandb"] = "none"  # mirror TensorBoard to a tracker

    def __post_init__(self):
        check_args(self)
        fits = self.num_envs <= self.learning_starts < self.total_timesteps
        require(self, "learning_starts", fits, "give at least --num-envs and less than --total-timesteps")


# === Network ==========================================================================================================
class QNetwork(nn.Module):
    """Q(s, a) for all actions at once: obs (B, 4, 84, 84) uint8 -> q_values (B, num_actions).

    nature: Mnih et al. (2015). nips: their "Playing Atari with Deep Reinforcement Learning", 2013; a third of the work.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__()
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # the CPU's instructions; none known in an older torch
        has_bfloat16 = not torch.cuda.is_available() and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
        auto = torch.bfloat16 if has_bfloat16 else torch.float32
        self.precision = auto if args.precision == "auto" else getattr(torch, args.precision)
        if args.network == "nature":
            convolutions = [
                nn.Conv2d(4, 32, kernel_size=8, stride=4),  # (B, 4, 84, 84) -> (B, 32, 20, 20)
                nn.Conv2d(32, 64, kernel_size=4, stride=2),  # -> (B, 64, 9, 9)
                nn.Conv2d(64, 64, kernel_size=3, stride=1),  # -> (B, 64, 7, 7)
            ]
            hidden = nn.Linear(64 * 7 * 7, 512)
        else:
            convolutions = [
                nn.Conv2d(4, 16, kernel_size=8, stride=4),  # (B, 4, 84, 84) -> (B, 16, 20, 20)
                nn.Conv2d(16, 32, kernel_size=4, stride=2),  # -> (B, 32, 9, 9)
            ]
            hidden = nn.Linear(32 * 9 * 9, 256)
        layers = [layer for convolution in convolutions for layer in (convolution, nn.ReLU())]
        # channels_last, as the minibatches are: else each convolution would rearrange its weights or its input
        self.layers = nn.Sequential(*layers, nn.Flatten(), hidden, nn.ReLU()).to(memory_format=torch.channels_last)
        self.head = nn.Linear(hidden.out_features, action_space.n)
        if args.init == "he":
            # He et al. (ICCV 2015): two screens that differ by a small ball still differ at the head. With PyTorch's
            # weights a layer and its ReLU keep only a sixth of the squared difference between two similar inputs.
            for layer in (*convolutions, hidden):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        # Pixels are scaled only here: on a copy, to spare the caller's array, and in place, to spare a second copy.
        pixels = obs.to(self.precision, copy=True).div_(255.0)
        with torch.autocast(obs.device.type, self.precision, enabled=self.precision != torch.float32):
            features = self.layers(pixels)
        # The head stays in float32: the 8 significant bits of bfloat16 cannot tell one action's Q-value from another's.
        return self.head(features.float())


# === Replay memory ====================================================================================================
def push_frames(stacks: np.ndarray, frames: np.ndarray, ended: np.ndarray):
    """Append frames (n, 84, 84) to the stacks (n, 4, 84, 84), newest last, in place.

    One frame does not tell which way the ball flies; four do. Built here rather than in the workers, so that a quarter
    of the bytes cross the pipes. Where an episode ended, frames holds the first one of the next: its stack starts anew.
    """
    stacks[:, :-1] = stacks[:, 1:]
    stacks[ended] = 0
    stacks[:, -1] = frames


class Batch(NamedTuple):
    """B transitions, or chains of m <= n_step: obs and actions of the first, next_obs and terminated of the last."""

    obs: torch.Tensor  # (B, 4, 84, 84) uint8
    actions: torch.Tensor  # (B,)
    rewards: torch.Tensor  # (B,): r_t + gamma * r_(t+1) + ... over the m transitions
    next_obs: torch.Tensor  # (B, 4, 84, 84) uint8: m steps later
    terminated: torch.Tensor  # (B,), 1.0 or 0.0; 0.0 also where only time ran out
    discounts: torch.Tensor  # (B,): gamma^m, the factor of max Q in the target


class ReplayMemory:
    """A ring per environment that stores each frame once: 7.06 GB per million transitions, not 56.4 as pairs of stacks.

    Every frame takes a slot, the one that ended an episode included, so the next frame is always in the next slot. The
    rings are interleaved in flat arrays: index = slot * num_envs + env, and the same environment's next slot is
    num_envs further on, modulo the capacity. An observation is named by the index of its newest frame, a transition by
    that of its observation. What may be drawn is marked drawable; excluded are
      - observations that ended an episode, and the newest of each environment: no action was taken there;
      - the 3 oldest of a full ring: the frames before them, which are part of their stack, are overwritten.
    """

    def __init__(self, buffer_size: int, num_envs: int):
        self.num_envs = num_envs
        slots = math.ceil(buffer_size / num_envs) + 5  # 5: the 3 oldest, the newest, one end of an episode
        self.capacity = slots * num_envs
        self.arrays = {
            "frames": np.empty((self.capacity, 84, 84), np.uint8),  # takes physical memory only as it is written
            "actions": np.zeros(self.capacity, np.uint8),
            "rewards": np.zeros(self.capacity, np.float32),
            "terminated": np.zeros(self.capacity, bool),
            "starts": np.zeros(self.capacity, bool),  # first observation of an episode: its stack holds zeros before it
            "drawable": np.zeros(self.capacity, bool),
        }
        self.newest = np.arange(num_envs) - num_envs  # (num_envs,): index of each newest frame; none yet
        self.filled = 0  # highest index written, + 1; gaps below it (some rings are ahead) are not drawable

    def begin(self, frames: np.ndarray):
        """Store the first observations, (n, 84, 84), after a reset of all environments."""
        self._write(np.arange(self.num_envs), frames, starts=True)

    def add(self, actions, rewards, next_frames, terminated, dones, frames):
        """Store a step of all environments, arrays of (num_envs, ...).

        next_frames: what the actions led to, also where that ended an episode. frames: what the next actions are
        chosen from; it differs where dones is true, and is stored there as the start of an episode.
        """
        self.arrays["actions"][self.newest] = actions
        self.arrays["rewards"][self.newest] = rewards
        self.arrays["terminated"][self.newest] = terminated
        self.arrays["drawable"][self.newest] = True
        self._write(np.arange(self.num_envs), next_frames, starts=False)
        if dones.any():
            self._write(np.flatnonzero(dones), frames[dones], starts=True)

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
        # Go on while the next slot is drawable. What ended an episode is not, nor the newest: no chain crosses either.
        for _ in range(n_step - 1):
            following = (last + self.num_envs) % self.capacity
            follows = arrays["drawable"][following]
            rewards += np.where(follows, discounts * arrays["rewards"][following], 0.0)
            discounts[follows] *= gamma
            last = np.where(follows, following, last)

        actions, terminated = arrays["actions"][index].astype(np.int64), arrays["terminated"][last].astype(np.float32)
        next_obs = self.stacks((last + self.num_envs) % self.capacity)
        columns = (self.stacks(index), actions, rewards, next_obs, terminated, discounts)  # in the order of Batch
        return Batch(*(torch.from_numpy(column).to(device) for column in columns))

    def stacks(self, index: np.ndarray) -> np.ndarray:
        """Return the observations of these indices as push_frames stacks them: (B,) -> (B, 4, 84, 84)."""
        window = (index + self.num_envs * np.arange(-3, 1)[:, None]) % self.capacity  # (4, B): slots t-3 .. t
        frames = self.arrays["frames"][window]  # (4, B, 84, 84)
        # Zero what lies before the start of the episode: frame t-j where an episode starts at any of t-j+1 .. t.
        starts = self.arrays["starts"][window[:0:-1]]  # (3, B): does one start at t, t-1, t-2?
        before = np.logical_or.accumulate(starts)  # (3, B): is t-1, t-2, t-3 of an earlier one?
        frames[2::-1][before] = 0  # frames t-1, t-2, t-3
        # The convolutions want the four values of a pixel side by side (channels last). Interleaved here, bytes are
        # moved once; else the first layer would rearrange floats, in both networks and in the backward pass.
        pixels = cv2.merge(list(frames.reshape(4, -1, 84)))  # (B * 84, 84, 4)
        return pixels.reshape(-1, 84, 84, 4).transpose(0, 3, 1, 2)  # a view

    def state_dict(self) -> dict:
        arrays = {name: torch.from_numpy(array[: self.filled]) for name, array in self.arrays.items()}
        return {"size": torch.tensor([self.capacity, self.num_envs]), "newest": torch.from_numpy(self.newest), **arrays}

    def load_state_dict(self, state: dict):
        """Restore; begin must follow, since the environments start new episodes."""
        if state["size"].tolist() != [self.capacity, self.num_envs]:
            raise ValueError("its memory has another --buffer-size or --num-envs; --no-checkpoint-memory leaves it out")
        self.filled = len(state["frames"])
        self.arrays["drawable"][:] = False
        for name, array in self.arrays.items():
            array[: self.filled] = state[name].numpy()
        self.newest[:] = state["newest"].numpy()


# === Equations ========================================================================================================
def td_loss(q_values: torch.Tensor, next_q_values: torch.Tensor, batch: Batch, loss_function):
    """Return the TD loss (Mnih et al. 2015), and Q(s, a) of the actions taken, (B,).

    y = r + gamma^m * max_a' Q_target(s', a')    where the episode went on, or only ran out of time (truncated)
    y = r                                        where it terminated: the rewards of the next life are not counted

    With n-step returns a transition is m <= n steps: r is the sum of their discounted rewards, s' comes after the last,
    gamma^m is batch.discounts. The later actions are those of old networks, or random, and nothing corrects for it.
    q_values: Q(s, .), (B, A). next_q_values: Q_target(s', .), (B, A), without gradient: only Q(s, a) is trained.
    """
    q_taken = q_values.gather(1, batch.actions.unsqueeze(1)).squeeze(1)  # (B, A) -> (B,)
    next_q_max = next_q_values.max(dim=1).values  # (B, A) -> (B,)
    td_target = batch.rewards + batch.discounts * (1.0 - batch.terminated) * next_q_max
    assert q_taken.shape == td_target.shape  # (B, 1) against (B,) would broadcast to (B, B) and train on noise
    return loss_function(q_taken, td_target), q_taken


def linear_schedule(start: float, end: float, steps: int, t: int) -> float:
    """Go from start to end in a straight line over `steps` transitions, then stay."""
    return start + (end - start) * min(t / steps, 1.0)


# === Training =========================================================================================================
def train(args: Args) -> dict:
    """Train from the start, or go on from the run directory args.resume, with the flags in args; return the results."""
    device = select_device(args.device, auto="cuda" if torch.cuda.is_available() else "cpu")
    fit_memory(args)
    set_random_seed(args.seed)  # seeds torch, random and np.random
    # Where gradients cease, Adam's moments shrink to denormal numbers, with which its step takes nearly twice as long;
    # as zeros they cost nothing. Set before torch starts its threads, so that each of them inherits it.
    torch.set_flush_denormal(True)
    # Below 2^30, so that seed + i fits the 32-bit int that some environments use.
    train_seed, eval_seed, final_seed = (np.random.SeedSequence(args.seed).generate_state(3) % 2**30).tolist()

    envs = make_envs(args)
    q_network = QNetwork(envs.observation_space, envs.action_space, args).to(device)
    target_network = copy.deepcopy(q_network)
    optimizer = torch.optim.Adam(q_network.parameters(), args.learning_rate, eps=args.optimizer_eps, fused=True)
    memory = ReplayMemory(args.buffer_size, args.num_envs)
    loss_function = nn.functional.mse_loss if args.loss == "mse" else nn.functional.smooth_l1_loss
    loss = torch.zeros(())  # until the first gradient step
    kept = {"memory": memory} if args.checkpoint_memory else {}
    run = Run(args, envs, q_network, target_network=target_network, optimizer=optimizer, **kept)
    global_step, gradient_steps = run.counts["global_step"], run.counts["gradient_steps"]  # 0, or as Run loaded them
    # After a resume, transitions count from global_step on: changed flags leave no gradient steps to catch up on.
    learning_starts = max(args.learning_starts, global_step) - gradient_steps * args.train_frequency
    if args.resume and not args.checkpoint_memory:  # the memory is empty: as many transitions again before learning
        learning_starts = global_step - gradient_steps * args.train_frequency + args.learning_starts
        tqdm.write(f"no learning until {args.learning_starts:,} transitions have refilled the replay memory")
    envs.seed((train_seed + global_step) % 2**30)  # environment i gets this + i; a resumed run gets new episodes
    frames = envs.reset()
    memory.begin(frames)
    stacks = np.zeros((args.num_envs, 4, 84, 84), np.uint8)  # the observations to act on: each one's last four frames
    push_frames(stacks, frames, ended=np.ones(args.num_envs, bool))

    while global_step < args.total_timesteps and run.mean_return(at_least=100) < args.target_return:
        # Act: at random with probability epsilon, else greedily. Each environment draws for itself.
        epsilon = linear_schedule(args.epsilon_start, args.epsilon_end, args.exploration_steps, global_step)
        with torch.no_grad():
            q_values = q_network(torch.from_numpy(stacks).to(device))  # (num_envs, A)
        explore = torch.rand(args.num_envs) < epsilon
        random_actions = torch.randint(envs.action_space.n, (args.num_envs,))
        actions = torch.where(explore, random_actions, q_values.argmax(dim=1).cpu()).numpy()
        envs.step_async(actions.tolist())  # results come below: worker processes step while this one learns
        global_step += args.num_envs

        # Learn: one gradient step per train_frequency transitions, however many environments there are.
        learning_rate = linear_schedule(
            args.learning_rate, args.learning_rate_end, args.learning_rate_steps, global_step
        )
        n_step = args.n_step if global_step <= args.n_step_until else 1  # more is faster; 1 has no off-policy error
        optimizer.param_groups[0].update(lr=learning_rate, eps=args.optimizer_eps)  # eps too: a resume loads old ones
        while gradient_steps < (global_step - learning_starts) // args.train_frequency:
            batch = memory.sample(args.batch_size, n_step, args.gamma, device)
            with torch.no_grad():
                next_q_values = target_network(batch.next_obs)
            loss, q_taken = td_loss(q_network(batch.obs), next_q_values, batch, loss_function)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            gradient_steps += 1

            # Update the target network every target_frequency transitions (at most once per gradient step).
            if (gradient_steps * args.train_frequency) % args.target_frequency < args.train_frequency:
                target_network.load_state_dict(q_network.state_dict())

            if gradient_steps % 500 == 0:
                metrics = {"loss": loss.item(), "q_taken": q_taken.mean().item()}
                run.log(global_step, "train", **metrics, epsilon=epsilon, learning_rate=learning_rate)

        # Receive. Where an episode ended, the frame is already the first of the next; its own last one is in the info.
        frames, rewards, dones, infos = envs.step_wait()
        next_frames = frames.copy()
        for i in np.flatnonzero(dones):
            next_frames[i] = infos[i]["terminal_observation"]

        # Store. Where time ran out (truncated), rewards would have followed: only a termination drops max Q from y.
        truncated = np.array([info["TimeLimit.truncated"] for info in infos])  # SB3 sets it at every step
        terminated = dones & ~truncated
        run.check_finite(global_step, reward=rewards, loss=loss.item())
        memory.add(actions, rewards, next_frames, terminated, dones, frames)
        push_frames(stacks, frames, ended=dones)
        run.log_episodes(global_step, infos)  # of whole games, with their raw scores

        # Evaluate each time a multiple of eval_every is crossed, and keep the best network; save where it is due.
        if global_step % args.eval_every < args.num_envs:
            run.evaluate(global_step, eval_seed)
        run.tick(global_step=global_step, gradient_steps=gradient_steps)

    return run.finish(eval_seed, final_seed)


# === Evaluation =======================================================================================================
@torch.no_grad()
def evaluate(args: Args, network: nn.Module, num_episodes: int, seed: int, **env_options) -> np.ndarray:
    """Play num_episodes whole games at eval_epsilon, num_envs side by side; return their scores, unclipped."""
    n, device = min(args.num_envs, num_episodes), next(network.parameters()).device
    generator = torch.Generator().manual_seed(seed)  # its own: evaluations change no random number of the training
    envs = DummyVecEnv([partial(make_env, args, evaluation=True, **env_options)] * n)
    envs.seed(seed)
    stacks, returns = np.zeros((n, 4, 84, 84), np.uint8), [[] for _ in range(n)]
    push_frames(stacks, envs.reset(), ended=np.ones(n, bool))
    while sum(map(len, returns)) < num_episodes:
        q_values = network(torch.from_numpy(stacks).to(device))
        explore = torch.rand(n, generator=generator) < args.eval_epsilon
        random_actions = torch.randint(q_values.shape[1], (n,), generator=generator)
        actions = torch.where(explore, random_actions, q_values.argmax(dim=1).cpu())
        frames, _, dones, infos = envs.step(actions.tolist())
        push_frames(stacks, frames, ended=dones)
        for i, info in enumerate(infos):
            # 100 on 8 environments: 12 or 13 each, fixed beforehand; the first 100 to end would be the short ones.
            if "episode" in info and len(returns[i]) < (num_episodes + i) // n:
                returns[i].append(info["episode"]["r"])
    envs.close()
    return np.concatenate(returns)


# === Environment ======================================================================================================
class AtariGame(gym.Wrapper):
    """A game as the agent meets it: one 84x84 grey frame and one reward per action, held for 4 emulator frames.

    The paper's preprocessing in one class (SB3's NoopReset, MaxAndSkip, EpisodicLife, FireReset, Warp and ClipReward).
    Four frames per action: a reward follows its cause after a quarter as many steps, and things move visibly from step
    to step. Only screens 3 and 4 are fetched, straight from the emulator: env.step is never called.

    training=True   an episode is one life
    training=False  an episode is a whole game; step() begins the next life

    Where a game has ended, info["episode"] holds its raw score "r" and its length "l" in emulator frames, with no-ops:
    at that step; in training, if the no-op or FIRE after a lost life ended it, at the first step of the next episode.
    """

    def __init__(self, env: gym.Env, training: bool, clip: bool):
        super().__init__(env)
        self.training, self.clip = training, clip  # clip: a reward is its sign, -1, 0 or 1
        self.ale = env.unwrapped.ale
        meanings = env.unwrapped.get_action_meanings()
        self.actions = [ale_py.Action[meaning] for meaning in meanings]
        self.start_actions = self.actions[1:3] if meanings[1] == "FIRE" else []  # as SB3's FireResetEnv
        self.screens = np.zeros((2, *self.ale.getScreenDims(), 3), np.uint8)  # screens 3 and 4; _observe overwrites [0]
        self.observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)
        self.metadata = {**env.metadata, "render_fps": 15}  # 60 emulator frames per second, 4 per step
        self.score, self.lives, self.game_over = 0, 0, True  # of the current game; the score is raw
        self.info: dict = {}  # of the next step: statistics of a game that has ended since the last one

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        lives = self.lives
        reward, terminated, truncated = self._repeat(self.actions[action])
        # Begin the next life as reset() does in training. But the stack of frames stays: here the game just goes on.
        while not self.training and 0 < self.lives < lives:
            lives = self.lives  # in a loop: these actions may lose another
            for start_action in (ale_py.Action.NOOP, *self.start_actions):  # after the game's end they do nothing
                gained, terminated, truncated = self._repeat(start_action)
                reward += gained
        info, self.info = self.info, {}
        return self._observe(), float(np.sign(reward) if self.clip else reward), terminated, truncated, info

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Begin an episode; while training the next life of the same game, unless it is over or a seed is given."""
        self.game_over = self.game_over or seed is not None
        self._next_episode(seed, options)
        for action in self.start_actions:
            _, terminated, truncated = self._repeat(action)
            if terminated or truncated:  # as in SB3: the remaining ones are held in the next episode
                self._next_episode()
        return self._observe(), {}

    def render(self) -> np.ndarray | None:
        # The maximum again: every fourth screen alone would never show some of the sprites.
        return self.screens.max(axis=0) if self.render_mode == "rgb_array" else self.env.render()

    def _repeat(self, action: ale_py.Action) -> tuple[int, bool, bool]:
        """Hold an action for 4 emulator frames; returns the raw reward, terminated, truncated."""
        reward = 0
        for frame in range(4):
            reward += self.ale.act(action)
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
            self.info = {"episode": {"r": float(self.score), "l": self.ale.getEpisodeFrameNumber()}}
        lives, self.lives = self.lives, self.ale.lives()
        # As in SB3, a drop to 0 is no lost life: some games show it a while before they are over, or in the last life.
        return reward, terminated or (self.training and 0 < self.lives < lives), truncated

    def _next_episode(self, seed: int | None = None, options: dict | None = None):
        if self.training and not self.game_over:
            self._repeat(ale_py.Action.NOOP)  # goes past the loss; its reward counts for the score, not for the agent
            if not self.game_over:
                return
        self.env.reset(seed=seed, options=options)
        self.score = 0
        for _ in range(self.env.unwrapped.np_random.integers(1, 31)):  # no-op frames: games begin differently
            self.score += self.ale.act(ale_py.Action.NOOP)
            if self.ale.game_over():
                self.env.reset()
                self.score = 0
        self.screens[:] = self.ale.getScreenRGB()
        self.lives = self.ale.lives()
        self.game_over = False

    def _observe(self) -> np.ndarray:
        """Return the maximum of both screens, as games draw some sprites on alternate frames only: (84, 84) uint8."""
        np.maximum(self.screens[0], self.screens[1], out=self.screens[0])
        grey = cv2.cvtColor(self.screens[0], cv2.COLOR_RGB2GRAY)
        return cv2.resize(grey, (84, 84), interpolation=cv2.INTER_AREA)  # a new array: the caller may keep it


class PixelEnv(gym.Wrapper):
    """Any other environment with (84, 84) uint8 frames: copied, as it may reuse its array; the info is AtariGame's."""

    def __init__(self, env: gym.Env, clip: bool):
        super().__init__(env)
        self.clip = clip  # a reward is its sign
        space, actions = env.observation_space, env.action_space
        discrete = isinstance(actions, gym.spaces.Discrete) and actions.n <= 256  # the memory keeps actions in a byte
        if (space.shape, space.dtype) != ((84, 84), np.uint8) or not discrete:
            needs = "(84, 84) uint8 frames (Gymnasium has ResizeObservation, GrayscaleObservation), discrete actions"
            raise UsageError(f"--env-id {env.spec.id}: {space}, {actions}; this script needs {needs}")
        self.action_space = gym.spaces.Discrete(int(actions.n))

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.score, self.length = 0.0, 0
        if seed is not None:  # reset seeds no spaces, but some environments draw from theirs
            self.env.observation_space.seed(seed)
            self.env.action_space.seed(seed)
        return np.array(self.env.reset(seed=seed, options=options)[0]), {}

    def step(self, action: int):
        obs, reward, terminated, truncated, _ = self.env.step(np.int64(action) + self.env.action_space.start)
        reward = float(reward)
        self.score, self.length = self.score + reward, self.length + 1
        if self.clip and reward:
            reward /= abs(reward)  # its sign; NaN where it is infinite, which stops the run
        info = {"episode": {"r": self.score, "l": self.length}} if terminated or truncated else {}
        return np.array(obs), reward, bool(terminated), bool(truncated), info


def make_env(args: Args, evaluation: bool = False, render_mode: str | None = None, video_dir: Path | None = None):
    """Return one game whose observation is one frame, (84, 84) uint8; args.clip_rewards is for training only.

    An Atari id loses its frame skip. Its sticky actions stay: ALE/*-v5 repeats the last action a quarter of the time.
    """
    cv2.setNumThreads(1)  # OpenCV would start a thread per core in every worker
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner from each of them
    time_limit = None if evaluation and args.time_limit == -1 else args.time_limit  # an evaluation has to end
    try:
        module, _, env_id = args.env_id.rpartition(":")
        if module:
            importlib.import_module(module)
        atari, options = str(gym.spec(env_id).entry_point).startswith("ale_py"), {"max_episode_steps": time_limit}
        if atari:
            limit = {} if time_limit is None else {"max_num_frames_per_episode": max(0, 4 * time_limit)}  # 0: no limit
            options = {"disable_env_checker": True, **limit}
        env = gym.make(env_id, **options, **({"render_mode": render_mode} if render_mode else {}))
    except (gym.error.Error, ModuleNotFoundError) as error:  # no such id, or a package is missing
        raise UsageError(f"--env-id {args.env_id}: {error}") from None
    if evaluation and not atari and env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, 10_000)  # without a limit a good policy would never end its evaluation
    clip = args.clip_rewards and not evaluation
    env = AtariGame(env, not evaluation, clip) if atari else PixelEnv(env, clip)
    if video_dir is not None:
        env = gym.wrappers.RecordVideo(env, str(video_dir), lambda episode: episode == 0, video_length=1_499)  # steps
    return env


def make_worker_env(args: Args, index: int):
    """make_env in a worker process. Ctrl-C and schedulers signal all processes; only the main one is to see it."""
    for number in (signal.SIGINT, signal.SIGTERM):  # ignore the first; child processes would inherit SIG_IGN
        signal.signal(number, lambda number, _: signal.signal(number, signal.SIG_DFL))
    if os.name == "posix":
        os.setpgrp()
    set_random_seed(np.random.SeedSequence((args.seed, index)).generate_state(1).item())  # no two workers draw alike
    torch.set_num_threads(1)  # an environment that uses torch would start a thread per core in every worker
    return make_env(args)


def make_envs(args: Args):
    """Return num_envs environments behind SB3's VecEnv: obs (num_envs, ...), rewards and dones (num_envs,)."""
    make_env(args).close()  # an environment that fails is reported once, not by every worker
    if args.vec_env == "dummy":
        return DummyVecEnv([partial(make_env, args)] * args.num_envs)
    multiprocessing.set_forkserver_preload(["stable_baselines3", "tyro"])  # imported once, shared: 150 MB less a worker
    others = multiprocessing.active_children()  # the workers made here are killed at exit: they ignore one SIGTERM
    atexit.register(lambda: [p.kill() for p in multiprocessing.active_children() if p not in others])
    try:
        return SubprocVecEnv([partial(make_worker_env, args, index) for index in range(args.num_envs)])
    except (EOFError, OSError):  # Ctrl-C ends workers that are just being started
        failed = UsageError(f"--num-envs {args.num_envs}: a worker failed; see its error above, or give fewer")
        raise (SystemExit(128 + Run.signal) if Run.signal else failed) from None


def select_device(name: str, auto: str) -> torch.device:
    """Return the device of that name; for "auto", the one that the script prefers."""
    try:
        return torch.zeros(1, device=auto if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}; try auto, cpu, cuda:N or mps") from None


def fit_memory(args: Args):
    """Set args.buffer_size to its default; refuse what does not fit: once full, hours later, it would end the run."""
    free, limit = psutil.virtual_memory().available, Path(CONTAINER_LIMIT)
    if limit.exists() and limit.read_text() != "max\n":
        used = limit.with_name("memory.stat").read_text().split()[1]  # anon: without the file cache
        free = min(free, int(limit.read_text()) - int(used))
    worker = 1.75e7 if "forkserver" in multiprocessing.get_all_start_methods() else 1.6e8  # bytes of one process
    free -= max(3e8, 1.6e8 + worker * args.num_envs * (args.vec_env == "subproc"))  # for all else, 0.3 GB or more
    fit = max(0, int(0.9 * free)) // (84 * 84 + 8)  # frames, each with 8 bytes of other columns; a tenth stays free
    if args.buffer_size is None:  # 0.9 of what fits: it has to fit again at a resume, with less memory free
        args.buffer_size = min(1_000_000, math.ceil(0.9 * fit))
        if args.buffer_size < 1_000_000:
            print(f"the replay memory holds {args.buffer_size:,} frames, not 1,000,000: 0.9 of what fits")
        enough = args.learning_starts <= args.buffer_size
        require(args, "learning_starts", enough, f"the replay memory that fits holds {args.buffer_size:,}")
    require(args, "buffer_size", args.buffer_size <= fit, f"{fit:,} frames fit into free memory")


# ######################################################################################################################
# The algorithm ends here. What follows is no reinforcement learning; all but its last line is the same in every script.


class UsageError(ValueError):
    """What was asked for cannot be done: ends the program with one line, no traceback, and exit status 2."""


def require(args, name: str, condition, remedy: str):
    if not condition:
        raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: {remedy}")


def check_args(args):
    """Refuse what cannot work before anything is created; tyro prints the message and exits with status 2."""
    for name, kind in get_type_hints(type(args), include_extras=True).items():
        value, (low, high) = getattr(args, name), getattr(kind, "__metadata__", (-np.inf, np.inf))
        if type(value) in (int, float):
            require(args, name, low <= value <= high, f"give a number from {low} to {high}")
        require(args, name, get_origin(kind) is not Literal or value in get_args(kind), f"give one of {get_args(kind)}")
    require(args, "time_limit", args.time_limit != 0, "give a number of steps, or -1 for no limit")
    require(args, "resume", not (args.resume and (args.play or args.run_dir)), "give it without --play and --run-dir")
    require(args, "track", args.track == "none" or importlib.util.find_spec(args.track), "pip install it first")
    require(args, "video", not args.video or importlib.util.find_spec("moviepy"), "pip install moviepy first")
    screen = sys.platform != "linux" or os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"}
    require(args, "render", not args.render or (args.play and screen), "needs --play CHECKPOINT and a screen")


def check_drawing(args):
    """Refuse --video and --render where nothing can be drawn: before the run, not after it."""
    for flag, mode in (("video", "rgb_array"), ("render", "human")):
        if getattr(args, flag):
            with make_env(args) as env:
                known = {mode, "rgb_array"}.intersection(env.metadata.get("render_modes") or ())  # either, for "human"
            with make_env(args, **({"render_mode": mode} if known else {})) as env:
                env.reset(seed=0)
                drawn = known and env.render_mode and (mode == "human" or np.ndim(env.render()) == 3)
            require(args, flag, drawn, "this environment cannot draw itself, or does not keep its render_mode")


def save_checkpoint(path: Path, **contents):
    """Write what has a state_dict, and plain data, under a temporary name: a kill leaves the old file or the new."""
    contents = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in contents.items()}
    torch.save({"script": SCRIPT, **contents}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(path: Path, **parts) -> dict:
    """Load what a checkpoint holds under each name into that part; return all of it. Nothing in it can run code."""
    # mmap: page by page, not all at once; Windows could not replace such a file. deepcopy: Adam keeps what it gets.
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name == "posix")
        if missing := {"script", "args", *parts} - checkpoint.keys():
            raise ValueError(f"it holds no {' and no '.join(sorted(missing))}")
        if checkpoint["script"] != SCRIPT:
            raise ValueError(f"it was written by {checkpoint['script']}.py")
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name] if name == "memory" else copy.deepcopy(checkpoint[name]))
    except Exception as error:  # a broken file can fail in any way
        raise UsageError(f"{path} cannot be used: {(str(error) or repr(error)).splitlines()[-1].strip()}") from None
    return checkpoint


class Run:
    """A run's directory, curves, console and checkpoints. parts: what is saved and resumed besides the network."""

    signal = 0  # the signal that asked for the end, once one did

    def __init__(self, args, envs, network: nn.Module, **parts):
        self.args, self.envs, self.network, self.parts = args, envs, network, {"network": network, **parts}
        self.counts, self.latest = {"global_step": 0, "gradient_steps": 0}, {}  # as of the last tick; the last metrics
        self.record = {"evaluations": [], "returns": [], "seconds": 0.0, "csv_size": 0}
        name = f"{args.env_id}__{SCRIPT}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09}"
        self.dir = Path(args.resume or args.run_dir or f"runs/{name.replace('/', '-').replace(':', '-')}")
        if args.resume:
            saved = load_checkpoint(self.dir / "last.pt", **self.parts)
            self.counts, self.record = saved["counts"], saved["record"]
            torch.set_rng_state(saved["torch_rng"])
        if args.track == "swanlab":  # it copies what is written for TensorBoard, as wandb does
            importlib.import_module("swanlab").sync_tensorboard_torch()
        if args.track != "none":
            sync = {"sync_tensorboard": True} if args.track == "wandb" else {}
            importlib.import_module(args.track).init(project=SCRIPT, name=self.dir.name, config=asdict(args), **sync)
        try:
            self.dir.mkdir(parents=True, exist_ok=bool(args.resume))
            (self.dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"cannot write the run directory {self.dir}: {error.strerror}") from None
        self.csv = open(self.dir / "progress.csv", "a", buffering=1)
        self.csv.seek(self.csv.truncate(min(self.record["csv_size"], self.csv.tell())))  # the rest is written again
        self.csv.write("" if args.resume else "step,metric,value\n")
        self.tensorboard = SummaryWriter(str(self.dir), purge_step=self.counts["global_step"] + 1)
        self.bar = tqdm(total=args.total_timesteps, initial=self.counts["global_step"], unit=" steps", disable=None)
        tqdm.write(f"{args.env_id}, seed {args.seed}; writing {self.dir}")
        self.started = time.perf_counter() - self.record["seconds"]

    def log(self, global_step: int, group: str, **metrics: float):
        """Write numbers to progress.csv and TensorBoard, and so to a tracker, as group/name."""
        if group == "train":
            known = {"return_mean_100": self.mean_return()} if self.record["returns"] else {}
            self.latest = metrics = known | metrics
        for name, value in metrics.items():
            self.csv.write(f"{global_step},{group}/{name},{value}\n")
            self.tensorboard.add_scalar(f"{group}/{name}", value, global_step)

    def log_episodes(self, global_step: int, infos):
        """Write the episodes that ended to progress.csv; TensorBoard gets their mean return only, with the metrics."""
        for episode in (info["episode"] for info in infos if "episode" in info):
            self.record["returns"] = [*self.record["returns"][-99:], float(episode["r"])]
            for name, value in (("return", episode["r"]), ("length", episode["l"])):
                self.csv.write(f"{global_step},train/episode_{name},{value}\n")

    def mean_return(self, at_least: int = 1) -> float:
        """Return the mean return of the last 100 training episodes; -inf where fewer than at_least have ended."""
        return float(np.mean(self.record["returns"])) if len(self.record["returns"]) >= at_least else -np.inf

    def check_finite(self, global_step: int, **values):
        """End the run at the step at which one of these is NaN or infinite; the last checkpoint is from before."""
        for name, value in values.items():
            if not (np.abs(value) < 3.4e38).all():  # the largest float32; NaN is not below it either
                raise SystemExit(f"{SCRIPT}: the {name} is not finite at step {global_step:,}")  # status 1

    def evaluate(self, global_step: int, seed: int):
        """Evaluate the network, off the clock, and keep it as best.pt if none was better before."""
        self.check_finite(global_step, network=sum(p.sum() for p in self.network.parameters()).item())
        seconds = time.perf_counter() - self.started
        returns = evaluate(self.args, self.network, self.args.eval_episodes, seed)
        self.log(global_step, "eval", return_mean=(mean := float(returns.mean())), return_min=float(returns.min()))
        self.record["evaluations"].append([global_step, mean, seconds])
        if not any(earlier > mean for _, earlier, _ in self.record["evaluations"]):
            save_checkpoint(self.dir / "best.pt", network=self.network, args=asdict(self.args))
        shown = [f"{name} {value:.3g}" for name, value in self.latest.items()][:4]
        if not Run.signal:  # else save first: what the output is piped into (tee) may have ended by the same Ctrl-C
            tqdm.write(f"{global_step:>10,} steps {seconds:7.1f} s  eval {mean:7.1f}  {'  '.join(shown)}")
        self.started = time.perf_counter() - seconds

    def tick(self, **counts: int):
        """Once per iteration: move the bar, save where a checkpoint is due, save and end where a signal asks for it."""
        step, last_step, stopped_by = counts["global_step"], self.counts["global_step"], Run.signal  # read once
        self.counts = counts
        self.bar.update(step - self.bar.n)
        if stopped_by or step % self.args.checkpoint_every < step - last_step:
            self.save()
        if stopped_by:
            tqdm.write(f"stopped; to go on: python {sys.argv[0]} --resume {self.dir}", file=sys.stderr)
            self.envs.close()
            raise SystemExit(128 + stopped_by)

    def save(self):
        """Write last.pt: all that --resume needs; the environments begin new episodes then."""
        self.check_finite(self.counts["global_step"], network=sum(p.sum() for p in self.network.parameters()).item())
        self.tensorboard.flush()
        self.record |= {"csv_size": self.csv.tell(), "seconds": time.perf_counter() - self.started}
        about = {"args": asdict(self.args), "counts": self.counts, "record": self.record}
        save_checkpoint(self.dir / "last.pt", **about, torch_rng=torch.get_rng_state(), **self.parts)

    def finish(self, eval_seed: int, final_seed: int) -> dict:
        """Save; judge the final and the best network by seeds not used so far; write result.json."""
        self.bar.close()
        self.save()  # before what may take long, or fail
        self.envs.close()  # before the evaluations: of some environments only few can exist at a time
        if self.counts["global_step"] not in [evaluation[0] for evaluation in self.record["evaluations"]]:
            self.evaluate(self.counts["global_step"], eval_seed)  # the final network may be the best
            self.save()
        args, best_network, seconds = self.args, copy.deepcopy(self.network), self.record["seconds"]
        if (self.dir / "best.pt").exists():  # unless somebody took it away
            load_checkpoint(self.dir / "best.pt", network=best_network)
        final, best = (evaluate(args, n, args.final_eval_episodes, final_seed) for n in (self.network, best_network))
        result = {**self.counts, "seconds": seconds, "best_return_mean": float(best.mean()), "run_dir": str(self.dir)}
        result |= {f"final_return_{name}": float(getattr(final, name)()) for name in ("mean", "min", "std")}
        result["evaluations"] = self.record["evaluations"]  # [global_step, mean return, seconds of training]
        (self.dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"final network: {final.mean():.1f}, best network: {best.mean():.1f}; {seconds:.1f} s of training")
        if args.video:
            evaluate(args, best_network, 1, final_seed, render_mode="rgb_array", video_dir=self.dir / "videos")
            print(f"film: {self.dir / 'videos' / 'rl-video-episode-0.mp4'}")
        return result


def play(args, network_class):
    """Evaluate a checkpoint; with --render three episodes in a window, with --video a film beside the checkpoint."""
    with make_env(args) as env:
        network = network_class(env.observation_space, env.action_space, args).to(select_device(args.device, "cpu"))
    load_checkpoint(Path(args.play), network=network)
    for seed in range(args.seed, args.seed + 3 * args.render):
        print(f"return {evaluate(args, network, 1, seed, render_mode='human').item():.1f}")
    if not args.render:
        returns = evaluate(args, network, args.final_eval_episodes, args.seed)
        print(f"return {returns.mean():.1f} over {len(returns)} episodes ({returns.min():.4g} to {returns.max():.4g})")
    if args.video:
        evaluate(args, network, 1, args.seed, render_mode="rgb_array", video_dir=Path(args.play).parent / "videos")
        print(f"film: {Path(args.play).parent / 'videos' / 'rl-video-episode-0.mp4'}")


def parse_args():
    """Parse the command line; with --resume and --play the saved flags are the defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", dest="path", type=lambda run_dir: Path(run_dir, "last.pt"))
    parser.add_argument("--play", dest="path", type=Path)
    if not (path := parser.parse_known_args()[0].path):
        return tyro.cli(Args)
    saved = {name: value for name, value in load_checkpoint(path)["args"].items() if hasattr(Args, name)}
    default = Args(**{**saved, "resume": "", "play": "", "run_dir": "", "video": False, "track": "none"})
    args = tyro.cli(Args, default=default)
    for name, value in asdict(args).items():
        if value != getattr(default, name) and name not in ("resume", "play", "render", "video"):
            print(f"--{name.replace('_', '-')} {value} in place of {getattr(default, name)}")
    return args


def on_signal(number: int, frame):  # the run saves and ends after its iteration; a second signal ends it at once
    Run.signal = number
    signal.signal(number, signal.SIG_DFL)
    try:  # print could be interrupted by itself
        os.write(2, b"\nstopping after this iteration, evaluation or final result; once more stops at once\n")
    except OSError:  # the terminal was closed: nothing more can be written to it
        os.dup2(os.dup2(os.open(os.devnull, os.O_WRONLY), 1), 2)


def main(network_class):
    if hasattr(sys.stdout, "reconfigure"):  # IDLE's has none
        sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a console may lack characters; log at once
    try:
        args = parse_args()
        check_drawing(args)
        if args.play:
            return play(args, network_class)
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, on_signal)
        train(args)
    except UsageError as error:
        print(f"{SCRIPT}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (EOFError, ConnectionError) as error:
        error.add_note("Where a worker process of the environments has ended, its own error stands above.")
        raise


if __name__ == "__main__" and "__file__" in globals():  # a notebook cell has no file: call train(Args(...)) there
    main(QNetwork)
