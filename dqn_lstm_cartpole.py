# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium==1.4.0",
#     "matplotlib==3.11.2",
#     "moviepy==2.2.1",
#     "numpy==2.4.6",
#     "pygame==2.6.1",
#     "stable-baselines3==2.9.2",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.16",
# ]
# ///
"""Recurrent DQN on CartPole: the same DQN with a memory, where one observation does not tell the state.

CartPole shows positions only here (--hide velocity): x and the angle, not which way they move. What was seen and done
before tells that, so the network gets a memory: an LSTM that reads the episode observation by observation. Hausknecht
and Stone, "Deep Recurrent Q-Learning for Partially Observable MDPs", AAAI Fall Symposium (2015); Kapturowski et al.,
"Recurrent Experience Replay in Distributed Reinforcement Learning" (R2D2), ICLR (2019). Read dqn_cartpole.py first.

    python dqn_lstm_cartpole.py
    python dqn_lstm_cartpole.py --memory none                    # the control: the same without a memory
    python dqn_lstm_cartpole.py --hide none                      # CartPole-v1 with its velocities, rescaled
    python dqn_lstm_cartpole.py --env-id Acrobot-v1 --hide none  # another environment
    python dqn_lstm_cartpole.py --resume runs/NAME --total-timesteps 400000     # the learning rate rises again
    python dqn_lstm_cartpole.py --play runs/NAME/best.pt --render

Watch it with `tensorboard --logdir runs`.

Measured with the defaults, seeds 1 to 10, greedy return of the final network over 100 episodes: 500.0 on eight of ten,
497.0 and 498.7 on the others; the evaluations of one seed fell to 412 in the last fifth, and came back; the others'
stayed at 475 or more. 94 to 123 s of training, two runs at a time on two slow cores; one alone took 104 s. The control
without a memory, seeds 1 to 5: 66 to 78.

Is my run healthy?       at 10 %    at 50 %    at 100 %     (median of ten seeds; lowest and highest)
    greedy return        260        489        500          (171 to 498; 305 to 500; 485 to 500)
    training return      151        386        454          (a fifth, later 10 % of the actions are random)
    loss                 24         25         2            (of single batches, which differ: 0.3 to 37 at the end)
    mean Q(s, a)         45         87         98           (the true limit is 1 / (1 - gamma) = 100)
Loss and Q are logged every 500 gradient steps: those of 21,000, 101,000 and 191,000 transitions.

With --hide none, seeds 1 to 10: 500.0 on ten of ten; in the last fifth the evaluations of one fall to 326, and come
back. Seeds 11 to 16: 500.0 on four, 496.8 and 493.0 on the others. Adam's epsilon differs: 1e-3 here, chosen on seeds
1, 3, 7 and 9, and 1e-5 with the velocities hidden. With 1e-5 here eight of ten end at 500.0, and four fall below 475 in
the last fifth; with 1e-3 there seven of eight seeds stay at 497 or more, and one slides to 276.

Four networks: the online one acts and is trained; the target network values what comes next; what is evaluated is the
average of the online one's weights over the last thousand gradient steps or so; and best.pt is the average that was
evaluated best. The average is there because a good policy is a small difference between large Q-values, and every
gradient step moves both. It can matter to the end, though the learning rate is near 0 by then: a last online network,
played greedily, was seen to let the pole fall much earlier than its average. --average-steps 1 evaluates the online
network.

What was seen to matter in rough trials, so take it as leads: that average, and a learning rate that is not too high;
layer normalisation in the head, and targets of several rewards; without them the curve rises and falls more. Small
units for the positions, and forget gates that start open, or the LSTM learns the velocities slowly. Clipping the
gradient. And sequences that are long enough: with short ones the pole stood while the cart drifted out of the track.
One such network stood to the end where its state was built anew at each step, from zeros, out of the last few
observations: what it had gathered over a whole episode led it astray, in cells of the LSTM (c, which can grow by 1 a
step) that no short sequence had held back.

What is fed to which network. An episode of 5 steps is in the memory: observations o0 to o5, actions a0 to a4, and the
pole falls at o5. With --burn-in 2 --sequence-length 3 --n-step 1, a gradient step may read this sequence:

    position              0        1        2                      3        4        5
    observation           o1       o2       o3                     o4       o5       -
    what it is for        burn-in  burn-in  loss                   loss     target   padding
    online network        read     read     Q(o3)                  Q(o4)    read     read     from the state before o1
    target network        read     read     Q'(o3)                 Q'(o4)   Q'(o5)   read     from the same state
    TD target                               r3 + gamma max Q'(o4)  r4                         terminated: no bootstrap

1. Both networks read the sequence in order, each with its own weights. An observation is what the agent saw and the
   action that led there, so o1 holds a0.
2. The state before o1 was stored when the agent was there; with --initial-state zero it is zeros. Neither is what the
   present weights would remember: the burn-in brings it closer. It carries no loss, and no gradient goes into it. With
   sequences of 16 it matters little: without it, too, eight of ten seeds end at 500.0, but the lowest at 472 in place
   of 497. From zeros both of two seeds end at 500, but learning starts slowly: the evaluations of the first quarter
   have a mean of 114, and of 245 from stored states.
3. A step with loss compares Q(o3, a3) with the target network's value one position later (n positions, with --n-step n,
   and the rewards in between) in the same reading, so that its history is the same. Were o4 fed to the target network
   alone, it would remember nothing of o3.
4. The sequence ends with its episode. o5 is there for the target network: had time run out there, r4 + gamma max Q'(o5)
   would be the target. What stands after it is read, and counts nowhere.
5. Where fewer than 2 steps of the episode precede, the sequence starts with the episode: o0 stands at position 2, the
   state before it is zeros, which is true, and what the burn-in reads is thrown away. Where a full memory has
   overwritten the steps before, it starts with the oldest that is left, and the state stored there.

Differences from the papers: a vector instead of pixels, sequences of 16 steps after a burn-in of 8 instead of R2D2's 80
after 40, one learner with environments side by side instead of 256 actors, a target network that moves a little at
every gradient step, layer normalisation, a learning rate that falls, an average of the weights that is evaluated and
kept (Polyak and Juditsky, SIAM J. Control Optim. 30, 1992), a bootstrap where time ran out. The network is told the
last action, as in R2D2, and not the last reward. No prioritised replay, double or dueling networks, or rescaled values.
Nearer to Hausknecht and Stone: --initial-state zero --burn-in 0 --sequence-length 10 --n-step 1.

Differences from dqn_cartpole.py, by section. Environment: the hidden velocities, other units, the last action in the
observation, an optional shaped reward. Network: the LSTM, and layer normalisation in the head. Replay memory:
sequences, and the state before each observation. Equations: unroll; the loss of several sequences, with targets of
--n-step rewards. Training and evaluation: a state per environment, zero where an episode begins; the norm of the
gradient is clipped; an average of the weights is evaluated and kept. By default also more transitions, a quarter as
many gradient steps per transition, each on eight times as many steps, and other rates.

The same seed gives the same parameters to the bit, on a CPU with the same versions; so does a run that was interrupted
and resumed, wherever the environment's state is plain data, as CartPole's is.
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

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.envs.classic_control import CartPoleEnv
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# === Arguments ========================================================================================================


@dataclass
class Args:
    """Recurrent DQN (Hausknecht & Stone 2015; Kapturowski et al. 2019): vector observations, discrete actions."""

    # run
    env_id: str = "CartPole-v1"  # any Gymnasium id; module:EnvName-v0 imports your own module first
    seed: int = 1  # seed of the network, the exploration, the replay memory and the environments
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps; auto is the CPU, which is faster for so small a network
    run_dir: str = ""  # where to write the run (default: runs/{env}__{script}__{seed}__{time})
    checkpoint_every: int = 50_000  # transitions between checkpoints
    resume: str = ""  # run directory of a stopped run: continue it
    play: str = ""  # checkpoint file: evaluate it, without training
    render: bool = False  # show environment 0 in a window
    video: bool = False  # film an episode of the best network into the run's videos/
    track: Literal["none", "swanlab", "wandb"] = "none"  # mirror TensorBoard to a tracker
    track_project: str = "dqn"  # project name for the tracker

    # environment
    num_envs: int = 16  # environments that step side by side
    vec_env: Literal["dummy", "subproc"] = "dummy"  # in this process; or a process each, for slow steps
    time_limit: int | None = None  # steps per episode in place of the environment's own limit; -1 removes it
    hide: Literal["velocity", "none"] = "velocity"  # what CartPole does not show (none: all); other environments: none
    shaped_reward: bool = False  # CartPole: learn from 1 - |x| - |angle|/0.209, not 1; returns stay the true ones

    # algorithm
    total_timesteps: int = 200_000  # transitions, summed over the environments
    target_return: float | None = None  # end the run once the last 100 training episodes have this mean return
    learning_starts: int = 1_000  # transitions before the first gradient step
    train_frequency: int = 20  # transitions per gradient step
    target_frequency: int = 20  # transitions per update of the target network
    tau: float = 0.02  # how far that update moves the target network to the online one; 1 makes it a copy
    average_steps: int = 1_000  # gradient steps over which the evaluated network averages the online one; 1: no average
    gamma: float = 0.99  # discount per step
    buffer_size: int = 100_000  # transitions in the replay memory
    n_step: int = 5  # rewards in a TD target before the bootstrap; fewer near the end of a sequence
    batch_size: int = 64  # sequences per gradient step
    sequence_length: int = 16  # steps of a sequence that carry loss (fewer where the episode ends)
    burn_in: int = 8  # steps before them, without loss and gradient, that bring the state up to date
    initial_state: Literal["stored", "zero"] = "stored"  # of a sequence: what was remembered then, or zeros
    memory: Literal["lstm", "none"] = "lstm"  # none: feed-forward layers of the same width in place of the LSTM
    hidden_size: int = 64  # units in each layer
    num_layers: int = 1  # layers of the LSTM, or of what stands in its place

    # exploration
    epsilon_start: float = 1.0  # probability of a random action at the start
    epsilon_end: float = 0.1  # probability of a random action at the end of the schedule
    exploration_steps: int = 10_000  # transitions: length of a linear schedule, time constant of an exponential one
    epsilon_schedule: Literal["linear", "exponential"] = "linear"  # how epsilon goes from start to end

    # optimisation
    learning_rate: float = 2e-3  # step size of Adam at the start
    learning_rate_end: float = 0.0  # step size at the end; it falls linearly over total_timesteps
    optimizer_eps: float | None = None  # added to what Adam divides by; None: 1e-5, or 1e-3 with --hide none
    loss: Literal["mse", "huber"] = "mse"  # loss of the TD error: its square, or linear beyond 1
    weight_decay: float = 0.0  # this times a weight is added to its gradient
    max_grad_norm: float = 10.0  # largest global norm of the gradient; 0: not clipped

    # evaluation
    eval_every: int = 5_000  # transitions between evaluations
    eval_episodes: int = 20  # greedy episodes per evaluation
    final_eval_episodes: int = 100  # greedy episodes at the end, on seeds that were not used to choose the best network

    def __post_init__(self):
        if self.optimizer_eps is None:
            self.optimizer_eps = 1e-5 if self.hide == "velocity" else 1e-3
        check_args(self)
        require(self, "batch_size", self.batch_size <= self.buffer_size, "give at most --buffer-size")
        require(self, "num_envs", self.num_envs <= self.buffer_size, "give at most --buffer-size")
        # A sequence starts to learn at step 0 of its episode, or at step burn_in or later: none may be left between.
        require(self, "burn_in", self.burn_in <= self.sequence_length, "give at most --sequence-length")
        require(self, "learning_starts", self.learning_starts < self.total_timesteps, "give less than the total")
        require(self, "learning_starts", self.learning_starts >= self.num_envs, "give at least --num-envs")
        require(
            self, "target_frequency", self.target_frequency >= self.train_frequency, "give --train-frequency or more"
        )


# === Environment ======================================================================================================


class ShapedReward(gym.Wrapper):
    """CartPole with a reward that falls before the pole does: at most 1, and below 0 far from the middle."""

    def step(self, action):
        obs, _, *rest = self.env.step(action)
        return obs, float(1.0 - abs(obs[0]) - abs(obs[2]) / 0.209), *rest


class CartPoleUnits(gym.ObservationWrapper):
    """CartPole in units in which a step changes each number by 0.1 to 0.6; with hide "velocity", positions only."""

    units = np.float32([0.1, 0.5, 0.02, 0.5])  # of x, its velocity, the angle, its velocity

    def __init__(self, env: gym.Env, hide: str):
        super().__init__(env)
        self.shown = [0, 2] if hide == "velocity" else [0, 1, 2, 3]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (len(self.shown),), np.float32)

    def observation(self, obs: np.ndarray) -> np.ndarray:
        return (obs / self.units)[self.shown]


class LastAction(gym.Wrapper):
    """Appends to an observation the action that led to it, one-hot; zeros where an episode begins.

    The history of an agent is what it saw and what it did: without the second it could not tell its own push from the
    fall of the pole. The observation is a copy: some environments return one array, overwritten at every step.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        size = env.observation_space.shape[0] + env.action_space.n
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.one_hot = np.eye(env.action_space.n, dtype=np.float32)

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        return np.append(obs, np.zeros_like(self.one_hot[0])), info

    def step(self, action):
        obs, *rest = self.env.step(action)
        return np.append(obs, self.one_hot[action]), *rest


class Window(gym.Wrapper):
    """Hides that an environment has a window: a VecEnv wants the same render_mode of all of its environments."""

    render_mode = None


def make_env(args: Args, evaluation: bool = False, render_mode: str | None = None, video_dir: Path | None = None):
    """Return one environment with a vector observation and discrete actions; raise ValueError for any other.

    Its info holds {"episode": {"r": return, "l": length}} at the step that ends an episode.
    """
    options = {"render_mode": render_mode} if render_mode else {}  # not every environment takes one
    env = gym.make(args.env_id, max_episode_steps=args.time_limit, **options)
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        raise ValueError(f"its observations are {env.observation_space}, and this script reads vectors (a 1-D Box)")
    if not isinstance(env.action_space, gym.spaces.Discrete) or env.action_space.start != 0:
        raise ValueError(f"its actions are {env.action_space}, and this script needs Discrete(n), numbered from 0")
    if (args.hide != "none" or args.shaped_reward) and not isinstance(env.unwrapped, CartPoleEnv):
        raise ValueError("only CartPole has velocities to hide and a reward to shape: for others give --hide none")
    if evaluation and env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, 10_000)  # without a limit a good policy would never end its evaluation
    env = gym.wrappers.RecordEpisodeStatistics(env, buffer_length=1)  # inside ShapedReward: of the true reward
    if args.shaped_reward and not evaluation:
        env = ShapedReward(env)
    if isinstance(env.unwrapped, CartPoleEnv):
        env = CartPoleUnits(env, args.hide)
    env = Resumable(LastAction(env))
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


# === Network ==========================================================================================================


class QNetwork(nn.Module):
    """Q-values of T steps of B sequences: obs (T, B, obs_dim), state -> q_values (T, B, A), the state after them.

    The state is what the network remembers: h and c of each layer of the LSTM, (2, num_layers, B, hidden_size).
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__()
        inputs, hidden = observation_space.shape[0], args.hidden_size
        self.state_shape = (2, args.num_layers, hidden)  # of one sequence
        if args.memory == "lstm":
            self.lstm = nn.LSTM(inputs, hidden, args.num_layers)
            for layer in range(args.num_layers):  # forget gates that start open: biases of 0 would halve it each step
                nn.init.constant_(getattr(self.lstm, f"bias_ih_l{layer}")[hidden : 2 * hidden], 2.0)
        else:  # it remembers nothing, and hands the state through
            sizes = [inputs] + [hidden] * (args.num_layers - 1)
            self.lstm = None
            self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(size, hidden), nn.ReLU()) for size in sizes))
        # Normalising the features of each step keeps TD learning stable. No activation at the end: any number is a Q.
        self.head = nn.Sequential(
            nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, action_space.n)
        )

    def initial_state(self, num_sequences: int) -> torch.Tensor:
        """Return the state in which an episode begins: zeros."""
        num_layers, hidden = self.state_shape[1:]
        return self.head[0].weight.new_zeros(2, num_layers, num_sequences, hidden)

    def read(self, obs: torch.Tensor, state: torch.Tensor):
        """Return the features of each step, (T, B, hidden_size), and the state after them."""
        if self.lstm is None:
            return self.layers(obs), state
        features, state = self.lstm(obs, tuple(state))
        return features, torch.stack(state)

    def forward(self, obs: torch.Tensor, state: torch.Tensor):
        features, state = self.read(obs, state)
        return self.head(features), state


# === Replay memory ====================================================================================================


class Batch(NamedTuple):
    """B sequences of burn_in + T + 1 observations, time first, and what was done in their T steps after the burn-in."""

    obs: torch.Tensor  # (burn_in + T + 1, B, obs_dim), the last one to bootstrap from
    state: torch.Tensor  # (2, num_layers, B, hidden_size), before obs[0] if burned_in, else before obs[burn_in]
    burned_in: torch.Tensor  # (B,) bool: False where too few steps precede; its burn-in is then ignored
    learn: torch.Tensor  # (T, B) bool: the steps that carry loss, the others are padding
    actions: torch.Tensor  # (T, B)
    rewards: torch.Tensor  # (T, B)
    terminated: torch.Tensor  # (T, B), 1.0 or 0.0


class ReplayMemory:
    """A ring of the last `capacity` transitions, in arrays that are allocated once.

    slot = row * num_envs + environment: num_envs slots further on is what came next in the same environment.
    """

    def __init__(self, capacity: int, num_envs: int, obs_dim: int, state_shape: tuple):
        self.num_envs = num_envs
        self.capacity = capacity = math.ceil(capacity / num_envs) * num_envs
        self.added = 0  # transitions ever added; the next one goes to slot added % capacity
        self.columns = {
            "obs": np.zeros((capacity, obs_dim), np.float32),
            "actions": np.zeros(capacity, np.int64),
            "rewards": np.zeros(capacity, np.float32),
            "next_obs": np.zeros((capacity, obs_dim), np.float32),
            "terminated": np.zeros(capacity, np.float32),
            "steps": np.zeros(capacity, np.int64),  # already taken in this episode
            "states": np.zeros((capacity, *state_shape), np.float32),  # of the network, before obs
        }

    def add(self, *transitions: np.ndarray):
        """Store a transition per environment, over the oldest: arrays in the order of columns, (num_envs, ...) each."""
        slots = (self.added + np.arange(self.num_envs)) % self.capacity
        for column, values in zip(self.columns.values(), transitions, strict=True):
            column[slots] = values
        self.added += self.num_envs

    def sample(self, batch_size: int, length: int, burn_in: int, device: torch.device) -> Batch:
        """Draw batch_size transitions uniformly, with replacement, and for each a sequence of `length` around it.

        It starts 0 to length - 1 steps before, so that what is drawn stands anywhere in it, and reads burn_in steps
        before that. Where fewer are to be had, it starts where they begin, with no burn-in: with the episode, whose
        state is known to be zero there, or with what a full ring still holds. (What was drawn may then lie after its
        end.) By default an episode's first 8 steps are learned from about as often as others, the one at position 15
        half as often again, those at 16 and at the very end half as often.
        """
        columns, n = self.columns, self.num_envs
        drawn = torch.randint(min(self.added, self.capacity), (batch_size,)).numpy()
        newer = (self.added - 1 - drawn) % self.capacity // n  # transitions of the same environment
        older = np.minimum(min(self.added, self.capacity) // n - 1 - newer, columns["steps"][drawn])  # same episode
        back = torch.randint(length, (batch_size,)).numpy()
        burned_in = back + burn_in <= older
        back = np.where(burned_in, back, older)

        t = np.arange(-burn_in, length)[:, None]  # 0: the first step that may carry loss
        slots = (drawn + n * (t - back)) % self.capacity  # (burn_in + T, B)
        first = np.where(burned_in, slots[0], slots[burn_in])
        steps = columns["steps"][slots[burn_in:]]
        learn = (steps == steps[0] + t[burn_in:]) & (t[burn_in:] <= back + newer)  # same episode, and stored

        batch = Batch(
            obs=np.concatenate([columns["obs"][slots[: burn_in + 1]], columns["next_obs"][slots[burn_in:]]]),
            state=columns["states"][first].transpose(1, 2, 0, 3).copy(),  # (B, 2, ...) -> (2, num_layers, B, ...)
            burned_in=burned_in,
            learn=learn,
            **{name: columns[name][slots[burn_in:]] for name in ("actions", "rewards", "terminated")},
        )
        return Batch(*(torch.from_numpy(column).to(device) for column in batch))

    def state_dict(self) -> dict:
        columns = {name: torch.from_numpy(column[: self.added]) for name, column in self.columns.items()}
        return {"added": self.added, "columns": columns}

    def load_state_dict(self, state: dict):
        self.added = state["added"]
        for name, saved in state["columns"].items():
            self.columns[name][: len(saved)] = saved.numpy()

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self.columns.values())


class Episodes:
    """Where each environment stands in its episode: what the network remembers of it, and the steps taken."""

    def __init__(self, state: torch.Tensor):
        self.state = state  # (2, num_layers, num_envs, hidden_size)
        self.steps = np.zeros(state.shape[2], np.int64)

    def begin(self, which: np.ndarray):
        """Zero state and steps where an episode ended, in whichever way: which (num_envs,) bool."""
        self.state[:, :, which] = 0.0
        self.steps[which] = 0

    def state_dict(self) -> dict:
        return {"state": self.state, "steps": torch.from_numpy(self.steps)}

    def load_state_dict(self, state: dict):
        self.state.copy_(state["state"])
        self.steps[:] = state["steps"].numpy()


# === Equations ========================================================================================================


def unroll(network: QNetwork, batch: Batch, burn_in: int) -> torch.Tensor:
    """Return the Q-values of every sequence after its burn-in, (T + 1, B, A); no gradient goes into the burn-in."""
    state = batch.state
    if burn_in > 0:
        with torch.no_grad():
            _, after = network.read(batch.obs[:burn_in], state)  # not the head: its Q-values would be thrown away
        state = torch.where(batch.burned_in[:, None], after, state)
    return network(batch.obs[burn_in:], state)[0]


def td_loss(q_values, next_q_values, batch: Batch, gamma: float, n_step: int, loss: str):
    """Return the TD loss of the steps that carry one, and their Q(s, a).

    y_t = r_t + gamma * max_a' Q_target(o_t+1, a')                                   for n_step 1, as in dqn_cartpole.py
    y_t = r_t + ... + gamma^(n-1) * r_t+n-1 + gamma^n * max_a' Q_target(o_t+n, a')   for n_step n
    L   = mean of (y - Q(o_t, a_t))^2, or of Huber's loss: half that square up to an error of 1, linear beyond

    No maximum where the episode ended for good. Fewer rewards where it ran out of time, or the sequence ends: the last
    step of a sequence always has a one-step target. More rewards mean less trust in one's own estimates, and faster
    news; but the actions in between were those of an older network, or random, and nothing corrects for that (R2D2 does
    the same, with n = 5). The mean is over all steps that carry loss: each counts alike, however long its sequence.

    q_values: Q of the online network, (T, B, A). next_q_values: Q_target one step later, (T, B, A), without gradient.
    """
    q_taken = q_values.gather(2, batch.actions.unsqueeze(2)).squeeze(2)  # (T, B, A) -> (T, B)
    next_q_max = next_q_values.max(dim=2).values
    discount = gamma * (1.0 - batch.terminated)
    td_target = one_step = batch.rewards + discount * next_q_max
    for _ in range(n_step - 1):  # y_t = r_t + gamma * y_t+1, wherever the sequence holds step t + 1 of this episode
        longer = batch.rewards[:-1] + discount[:-1] * td_target[1:]
        td_target = torch.cat([torch.where(batch.learn[1:], longer, one_step[:-1]), one_step[-1:]])
    q_taken, td_target = q_taken[batch.learn], td_target[batch.learn]
    return (F.mse_loss if loss == "mse" else F.smooth_l1_loss)(q_taken, td_target), q_taken


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
    device = select_device(args.device, auto="cpu")
    torch.set_num_threads(1)  # so small a network is faster on one core than on several
    torch.manual_seed(args.seed)
    train_seed, eval_seed, final_seed = (int(s) for s in np.random.SeedSequence(args.seed).generate_state(3))

    envs = make_envs(args)
    q_network = QNetwork(envs.observation_space, envs.action_space, args).to(device)
    target_network, average_network = copy.deepcopy(q_network), copy.deepcopy(q_network)
    parameters, target_parameters = list(q_network.parameters()), list(target_network.parameters())
    average_parameters = list(average_network.parameters())
    adam = {"eps": args.optimizer_eps, "weight_decay": args.weight_decay, "fused": True}  # fused: one call
    optimizer = torch.optim.Adam(parameters, args.learning_rate, **adam)
    obs_dim, state_shape = envs.observation_space.shape[0], q_network.state_shape
    memory = ReplayMemory(args.buffer_size, args.num_envs, obs_dim, state_shape)
    epsilon_schedule = linear_schedule if args.epsilon_schedule == "linear" else exponential_schedule
    episodes = Episodes(q_network.initial_state(args.num_envs))
    global_step = gradient_steps = target_syncs = 0
    loss = torch.zeros(())  # until the first gradient step

    saved = {"online_network": q_network, "target_network": target_network, "optimizer": optimizer}
    with Run(args, envs, average_network, **saved, memory=memory, episodes=episodes) as run:
        run.say(f"replay memory of {memory.nbytes / 1e6:,.1f} MB")
        if args.resume:
            global_step, gradient_steps, target_syncs = run.restored()
        obs = run.first_obs(train_seed + global_step)  # environment i gets this seed + i
        if not run.env_states:  # new episodes in all environments
            episodes.begin(np.ones(args.num_envs, bool))

        while global_step < args.total_timesteps and not run.reached(args.target_return):
            # Act: at random with probability epsilon, else greedily. Each environment draws for itself. The state moves
            # on either way: (2, num_layers, num_envs, hidden_size), a memory per environment.
            epsilon = epsilon_schedule(args.epsilon_start, args.epsilon_end, args.exploration_steps, global_step)
            with torch.no_grad():
                obs_tensor = torch.as_tensor(obs, dtype=torch.float32, device=device)
                q_values, next_state = q_network(obs_tensor.unsqueeze(0), episodes.state)  # (1, num_envs, A)
            explore = torch.rand(args.num_envs) < epsilon
            random_actions = torch.randint(envs.action_space.n, (args.num_envs,))
            actions = torch.where(explore, random_actions, q_values[0].argmax(dim=1).cpu()).numpy()

            # Send the actions: in worker processes the environments step while this one learns.
            envs.step_async(actions.tolist())  # plain ints: quicker to pickle, and to read, than NumPy's
            global_step += args.num_envs

            # Learn: one gradient step per train_frequency transitions, however many environments there are.
            learning_rate = linear_schedule(
                args.learning_rate, args.learning_rate_end, args.total_timesteps, global_step
            )
            optimizer.param_groups[0]["lr"] = learning_rate
            while gradient_steps < (global_step - args.learning_starts) // args.train_frequency:
                batch = memory.sample(args.batch_size, args.sequence_length, args.burn_in, device)
                if args.initial_state == "zero":
                    batch.state.zero_()
                # Both networks read the whole sequence, each with its own memory of it; the target's values are shifted
                # by one step. From next_obs alone the target network would have another history than the online one.
                with torch.no_grad():
                    next_q_values = unroll(target_network, batch, args.burn_in)[1:]  # (T, B, A)
                q_values = unroll(q_network, batch, args.burn_in)[:-1]  # (T, B, A)
                loss, q_taken = td_loss(q_values, next_q_values, batch, args.gamma, args.n_step, args.loss)
                optimizer.zero_grad()
                loss.backward()
                if args.max_grad_norm > 0:
                    nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                gradient_steps += 1
                # Not a target: the network that is evaluated. The mean of all weights so far, later an exponential one.
                update_target(average_parameters, parameters, 1 / min(gradient_steps, args.average_steps))

                # Sync the target every target_frequency transitions; a gradient step stands for train_frequency.
                if target_syncs < gradient_steps * args.train_frequency // args.target_frequency:
                    update_target(target_parameters, parameters, args.tau)
                    target_syncs += 1

                if gradient_steps % 500 == 0:
                    metrics = {"loss": loss.item(), "q_taken": q_taken.mean().item()}
                    metrics |= {"epsilon": epsilon, "learning_rate": learning_rate}
                    run.write(global_step, {f"train/{name}": value for name, value in metrics.items()})

            # Receive and store. new_obs is what the next actions are chosen from, next_obs what these actions led to.
            # They differ where an episode ended: there new_obs is the first observation of the next one already, and
            # next_obs the last one of this. Only termination masks the bootstrap.
            new_obs, rewards, dones, infos = envs.step_wait()
            truncated = np.array([info["TimeLimit.truncated"] for info in infos])
            terminated = dones & ~truncated
            next_obs = new_obs.copy()
            for i in np.flatnonzero(dones):
                next_obs[i] = infos[i]["terminal_observation"]
            states = episodes.state.permute(2, 0, 1, 3).cpu().numpy()  # (num_envs, 2, num_layers, hidden_size)
            memory.add(obs, actions, rewards, next_obs, terminated, episodes.steps, states)
            obs, episodes.state = new_obs, next_state
            episodes.steps += 1
            episodes.begin(dones)
            for info in infos:
                if "episode" in info:
                    run.write_episode(global_step, info["episode"])

            # Evaluate and keep the best network, each time a multiple of eval_every is crossed; save.
            run.check(global_step, observation=[new_obs, next_obs], reward=rewards, loss=loss)
            if global_step // args.eval_every > (global_step - args.num_envs) // args.eval_every:
                run.evaluate(global_step, eval_seed)
            run.tick(global_step=global_step, gradient_steps=gradient_steps, target_syncs=target_syncs)

        return run.finish(final_seed)


# === Evaluation =======================================================================================================


@torch.no_grad()
def evaluate(args: Args, network: nn.Module, num_episodes: int, seed: int, **env_options) -> np.ndarray:
    """Play num_episodes greedily, one per environment, side by side; return their returns, (num_episodes,).

    One episode each: the first N episodes to end would be the short ones. Environment i gets seed + i; env_options
    (render_mode, video_dir) go to the first.
    """
    device = next(network.parameters()).device
    envs = [make_env(args, evaluation=True, **(env_options if i == 0 else {})) for i in range(num_episodes)]
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    returns, running = np.zeros(num_episodes), list(range(num_episodes))
    state = network.initial_state(num_episodes)
    while running:
        obs_tensor = torch.as_tensor(obs[running], dtype=torch.float32, device=device)
        q_values, state[:, :, running] = network(obs_tensor.unsqueeze(0), state[:, :, running])
        for i, action in zip(tuple(running), q_values[0].argmax(dim=1).tolist(), strict=True):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += reward
            if terminated or truncated:
                envs[i].close()
                running.remove(i)
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
