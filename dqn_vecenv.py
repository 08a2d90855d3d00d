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
"""DQN over many environments: the same algorithm, in worker processes, and what each kind of VecEnv costs.

The algorithm is that of dqn_cartpole.py. This script is about what feeds it: several environments that step side by
side, in this process (--vec-env dummy), in a process each (subproc, the default), or in the threads of EnvPool's C++
(envpool). Mnih et al., "Human-level control through deep reinforcement learning", Nature 518 (2015).

    python dqn_vecenv.py
    python dqn_vecenv.py --num-envs 4 --video                    # and a film of the best network
    python dqn_vecenv.py --env-id corridor:Corridor-v0           # an environment of your own: see the README
    python dqn_vecenv.py --time-limit -1                         # CartPole without its limit; evaluations end at 10,000
    python dqn_vecenv.py --resume runs/NAME --total-timesteps 160000      # the learning rate rises again
    python dqn_vecenv.py --play runs/NAME/best.pt --render

Watch it with `tensorboard --logdir runs`.

Measured with the defaults on two cores, seeds 1 to 10: the final network's greedy return over 100 episodes is 500.0 on
ten of ten, no evaluation in the last fifth is under 475 on seven of ten, and training takes 9 to 14 s, evaluations not
counted. The same takes 7 s with --vec-env dummy or envpool (three seeds each): CartPole is so fast that the
messages to the workers cost more than its steps. Workers pay where a step computes for clearly more than 0.1 ms, up to
the number of cores, and where it waits: the README has the table.

Is my run healthy?       at 10 %    at 50 %    at 100 %     (median of ten seeds; lowest and highest)
    greedy return        254        266        500          (88 to 500; 92 to 500; 500 to 500)
    training return      46         94         162          (20 % of the actions are random: judge by the greedy one)
    loss                 0.8        5.9        6.5          (it grows with the Q-values)
    mean Q(s, a)         23         77         108          (the true limit is 1 / (1 - gamma) = 100)
Loss and mean Q are written every 500 gradient steps: those of 9,008, 41,008 and 73,008 transitions.

What happens in one iteration of the loop, with n environments, and in which process:

    main process                               worker i of n
    choose n actions in one batch              wait for an action
    write action i to pipe i            -->    read it; step the environment
    learn: gradient steps, as many as the      where the episode ended: keep its last observation in the info, reset
      n transitions are worth
    read n results, in order            <--    write observation, reward, end, info
    store n transitions

Only the learning overlaps with the environments. An iteration costs choosing, the longer of learning and the slowest
worker, the pipes, and storing, if there is a core for each process. EnvPool's threads overlap in the same way, but for
resets; with dummy the environments step one after the other, inside step_wait. What is learned is the same: the same
seed gives the same numbers with dummy as with workers.

Four things are easy to get wrong. Gradient steps per transition: counted in transitions, not in iterations of the loop.
Exploration: each environment draws for itself; one draw for all would make the n transitions of an iteration all
random or all greedy. Seeds: environment i gets seed + i, or all n would play the same episodes. The next observation:
after the end of an episode the VecEnv has already begun the next one, and the observation that belongs to the
transition is the one in the info.

Differences from dqn_cartpole.py, by section. Arguments: worker processes by default, --vec-env envpool; and one
gradient step per 16 transitions, with batch 512, learning rate 1.6e-2 and tau 0.05, in place of one per 5 with 128,
4e-3 and 0.02: one large gradient step per iteration costs less than 3.2 small ones. (So do not compare the times of the
two scripts to judge workers, but those of --vec-env dummy and subproc here.) Environment: EnvPoolVecEnv.
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
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# === Arguments ========================================================================================================


@dataclass
class Args:
    """DQN (Mnih et al. 2015) for any environment with a vector observation and discrete actions."""

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
    vec_env: Literal["subproc", "dummy", "envpool"] = "subproc"  # a process each, in this process, or C++ threads
    time_limit: int | None = None  # steps per episode in place of the environment's own limit; -1 removes it

    # algorithm
    total_timesteps: int = 80_000  # transitions, summed over the environments
    target_return: float | None = None  # end the run once the last 100 training episodes have this mean return
    learning_starts: int = 1_000  # transitions before the first gradient step
    train_frequency: int = 16  # transitions per gradient step
    target_frequency: int = 16  # transitions per update of the target network
    tau: float = 0.05  # how far that update moves the target network to the online one; 1 makes it a copy
    gamma: float = 0.99  # discount per step
    buffer_size: int = 100_000  # transitions in the replay memory
    batch_size: int = 512  # transitions per gradient step
    hidden_size: int = 64  # units in each of the two hidden layers

    # exploration
    epsilon_start: float = 1.0  # probability of a random action at the start
    epsilon_end: float = 0.2  # probability of a random action at the end of the schedule
    exploration_steps: int = 10_000  # transitions: length of a linear schedule, time constant of an exponential one
    epsilon_schedule: Literal["linear", "exponential"] = "linear"  # how epsilon goes from start to end

    # optimisation
    learning_rate: float = 1.6e-2  # step size of Adam at the start
    learning_rate_end: float = 0.0  # step size at the end; it falls linearly over total_timesteps
    optimizer_eps: float = 1e-4  # added to the root mean square that Adam divides by: see dqn_cartpole.py
    loss: Literal["mse", "huber"] = "mse"  # loss of the TD error: its square, or linear beyond 1
    max_grad_norm: float = 0.0  # largest global norm of the gradient; 0: not clipped

    # evaluation
    eval_every: int = 4_000  # transitions between evaluations
    eval_episodes: int = 20  # greedy episodes per evaluation
    final_eval_episodes: int = 100  # greedy episodes at the end, on seeds that were not used to choose the best network

    def __post_init__(self):
        check_args(self)
        if self.vec_env == "envpool" and not self.play:  # what plays is Gymnasium's
            check_envpool(self)
        require(self, "batch_size", self.batch_size <= self.buffer_size, "give at most --buffer-size")
        require(self, "num_envs", self.num_envs <= self.buffer_size, "give at most --buffer-size")
        require(self, "learning_starts", self.learning_starts < self.total_timesteps, "give less than the total")
        require(self, "learning_starts", self.learning_starts >= self.num_envs, "give at least --num-envs")
        require(
            self, "target_frequency", self.target_frequency >= self.train_frequency, "give --train-frequency or more"
        )


# === Environment ======================================================================================================


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
    if evaluation and env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, 10_000)  # without a limit a good policy would never end its evaluation
    env = Resumable(gym.wrappers.RecordEpisodeStatistics(env, buffer_length=1))
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


def check_envpool(args: Args):
    """Refuse what EnvPool cannot do."""
    require(args, "vec_env", importlib.util.find_spec("envpool") is not None, "first: pip install envpool")
    require(args, "vec_env", not args.render, "its environments have no window; --play --render shows one")
    import envpool

    require(args, "env_id", args.env_id in envpool.list_all_envs(), "is not one of EnvPool's; try --vec-env subproc")


class EnvPoolVecEnv:
    """EnvPool's environments, for training (evaluations play Gymnasium's), behind what the loop uses of SB3's VecEnv.

    EnvPool resets an environment in the step after the one that ended its episode: that step ignores its action and
    gives reward 0. Stored, it would be a transition that never happened. Here the ended ones are reset inside the step
    that ended them, and their last observations go to the infos.
    """

    def __init__(self, args: Args):
        self.args, self.num_envs, self.pool = args, args.num_envs, None
        env = make_env(args)
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.time_limit = env.spec.max_episode_steps or 2**31 - 1
        env.close()

    def seed(self, seed: int):
        """Make the environments: EnvPool takes seeds only there. Environment i gets seed + i."""
        import envpool

        # The time limit is kept here. EnvPool calls it a truncation when the task ends at the very step of its limit: a
        # fall there would be bootstrapped from.
        self.pool = envpool.make_gymnasium(
            self.args.env_id, num_envs=self.num_envs, seed=seed % 2**31, max_episode_steps=2**31 - 1
        )

    def reset(self) -> np.ndarray:
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        return self.pool.reset()[0]

    def step_async(self, actions: list[int]):
        self.pool.send(np.array(actions))

    def step_wait(self):
        obs, rewards, terminated, _, _ = self.pool.recv()
        self.returns += rewards
        self.lengths += 1
        truncated = (self.lengths >= self.time_limit) & ~terminated
        infos = [{"TimeLimit.truncated": timeout} for timeout in truncated]
        ended = np.flatnonzero(terminated | truncated)
        if len(ended):
            for i in ended:
                infos[i]["terminal_observation"] = obs[i].copy()
                infos[i]["episode"] = {"r": self.returns[i], "l": self.lengths[i]}
            first_obs, info = self.pool.reset(ended.astype(np.int32))  # it reads 32 bits, and does not convert
            obs[info["env_id"]] = first_obs
            self.returns[ended], self.lengths[ended] = 0.0, 0
        return obs, rewards, terminated | truncated, infos

    def close(self):
        self.pool = None  # ends its threads


# === Network ==========================================================================================================


class QNetwork(nn.Module):
    """Q(s, a) for all actions at once: obs (B, obs_dim) -> q_values (B, num_actions)."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(observation_space.shape[0], args.hidden_size),
            nn.ReLU(),
            nn.Linear(args.hidden_size, args.hidden_size),
            nn.ReLU(),
            nn.Linear(args.hidden_size, action_space.n),  # no activation: a Q-value can be any number
        )

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.layers(obs)


# === Replay memory ====================================================================================================


class Batch(NamedTuple):
    """B transitions: what the agent saw, did and got, what it saw next, and whether the episode terminated there."""

    obs: torch.Tensor  # (B, obs_dim)
    actions: torch.Tensor  # (B,)
    rewards: torch.Tensor  # (B,)
    next_obs: torch.Tensor  # (B, obs_dim)
    terminated: torch.Tensor  # (B,), 1.0 or 0.0; 0.0 also where only time ran out


class ReplayMemory:
    """A ring of the last `capacity` transitions, in arrays that are allocated once."""

    def __init__(self, capacity: int, obs_dim: int):
        self.capacity = capacity
        self.added = 0  # transitions ever added; the next one goes to slot added % capacity
        self.columns = Batch(
            obs=np.zeros((capacity, obs_dim), np.float32),
            actions=np.zeros(capacity, np.int64),
            rewards=np.zeros(capacity, np.float32),
            next_obs=np.zeros((capacity, obs_dim), np.float32),
            terminated=np.zeros(capacity, np.float32),
        )

    def add(self, *transitions: np.ndarray):
        """Store one transition per environment, over the oldest: arrays in the order of Batch, (num_envs, ...) each."""
        num_envs = len(transitions[0])
        slots = (self.added + np.arange(num_envs)) % self.capacity
        for column, values in zip(self.columns, transitions, strict=True):
            column[slots] = values
        self.added += num_envs

    def sample(self, batch_size: int, device: torch.device) -> Batch:
        """Draw batch_size transitions uniformly, with replacement."""
        slots = torch.randint(min(self.added, self.capacity), (batch_size,)).numpy()
        return Batch(*(torch.from_numpy(column[slots]).to(device) for column in self.columns))

    def state_dict(self) -> dict:
        return {"added": self.added, "columns": [torch.from_numpy(column[: self.added]) for column in self.columns]}

    def load_state_dict(self, state: dict):
        self.added = state["added"]
        for column, saved in zip(self.columns, state["columns"], strict=True):
            column[: len(saved)] = saved.numpy()

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self.columns)


# === Equations ========================================================================================================


def td_loss(q_values: torch.Tensor, next_q_values: torch.Tensor, batch: Batch, gamma: float, loss: str):
    """Return the TD loss (Mnih et al. 2015; squared, or Huber's), and Q(s, a) of the actions taken, (B,).

    y = r + gamma * max_a' Q_target(s', a')    where the episode went on, or only ran out of time (truncated)
    y = r                                      where it ended for good (terminated): no reward can follow
    L = mean of (y - Q(s, a))^2, or of Huber's loss: half that square up to an error of 1, linear beyond

    That the maximum is taken, whichever action came next, makes it right to learn from old and random transitions too
    (off-policy); that it is a maximum over noisy estimates makes it too large on average.

    q_values: Q(s, .) of the online network, (B, A). next_q_values: Q_target(s', .), (B, A), without gradient: only
    Q(s, a) is to move.
    """
    q_taken = q_values.gather(1, batch.actions.unsqueeze(1)).squeeze(1)  # (B, A) -> (B,)
    next_q_max = next_q_values.max(dim=1).values  # (B, A) -> (B,)
    td_target = batch.rewards + gamma * (1.0 - batch.terminated) * next_q_max
    assert q_taken.shape == td_target.shape  # (B, 1) against (B,) would broadcast to (B, B) and train on noise
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

    envs = EnvPoolVecEnv(args) if args.vec_env == "envpool" else make_envs(args)
    q_network = QNetwork(envs.observation_space, envs.action_space, args).to(device)
    target_network = copy.deepcopy(q_network)
    parameters, target_parameters = list(q_network.parameters()), list(target_network.parameters())
    optimizer = torch.optim.Adam(parameters, args.learning_rate, eps=args.optimizer_eps, fused=True)  # one call
    memory = ReplayMemory(args.buffer_size, envs.observation_space.shape[0])
    epsilon_schedule = linear_schedule if args.epsilon_schedule == "linear" else exponential_schedule
    global_step = gradient_steps = target_syncs = 0
    loss = torch.zeros(())  # until the first gradient step

    with Run(args, envs, q_network, target_network=target_network, optimizer=optimizer, memory=memory) as run:
        run.say(f"replay memory of {memory.nbytes / 1e6:,.1f} MB")
        if args.resume:
            global_step, gradient_steps, target_syncs = run.restored()
        obs = run.first_obs(train_seed + global_step)  # environment i gets this seed + i

        while global_step < args.total_timesteps and not run.reached(args.target_return):
            # Act: at random with probability epsilon, else greedily. Each environment draws for itself.
            epsilon = epsilon_schedule(args.epsilon_start, args.epsilon_end, args.exploration_steps, global_step)
            with torch.no_grad():
                q_values = q_network(torch.as_tensor(obs, dtype=torch.float32, device=device))  # (num_envs, A)
            explore = torch.rand(args.num_envs) < epsilon
            random_actions = torch.randint(envs.action_space.n, (args.num_envs,))
            actions = torch.where(explore, random_actions, q_values.argmax(dim=1).cpu()).numpy()

            # Send the actions: in worker processes the environments step while this one learns.
            envs.step_async(actions.tolist())  # plain ints: quicker to pickle, and to read, than NumPy's
            global_step += args.num_envs

            # Learn: one gradient step per train_frequency transitions, however many environments there are.
            learning_rate = linear_schedule(
                args.learning_rate, args.learning_rate_end, args.total_timesteps, global_step
            )
            optimizer.param_groups[0]["lr"] = learning_rate
            while gradient_steps < (global_step - args.learning_starts) // args.train_frequency:
                batch = memory.sample(args.batch_size, device)
                with torch.no_grad():
                    next_q_values = target_network(batch.next_obs)
                loss, q_taken = td_loss(q_network(batch.obs), next_q_values, batch, args.gamma, args.loss)
                optimizer.zero_grad()
                loss.backward()
                if args.max_grad_norm > 0:
                    nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
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

            # Receive and store. new_obs is what the next actions are chosen from, next_obs what these actions led to.
            # They differ where an episode ended: there new_obs is the first observation of the next one already, and
            # next_obs the last one of this. Only termination masks the bootstrap.
            new_obs, rewards, dones, infos = envs.step_wait()
            truncated = np.array([info["TimeLimit.truncated"] for info in infos])
            terminated = dones & ~truncated
            next_obs = new_obs.copy()
            for i in np.flatnonzero(dones):
                next_obs[i] = infos[i]["terminal_observation"]
            memory.add(obs, actions, rewards, next_obs, terminated)
            obs = new_obs
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
    while running:
        q_values = network(torch.as_tensor(obs[running], dtype=torch.float32, device=device))
        for i, action in zip(tuple(running), q_values.argmax(dim=1).tolist(), strict=True):
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
