# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["gymnasium==1.4.0", "moviepy==2.2.1", "numpy==2.4.6", "pygame==2.6.1", "stable-baselines3==2.9.2",
#                 "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.16"]
# ///
"""DQN on CartPole: deep Q-learning, small and complete (Mnih et al., Nature 518, 2015).

    y = r + gamma * max_a' Q_target(s', a')    the target; y = r where the episode terminated
    L = mean of (y - Q(s, a))^2                the loss, over a minibatch from the replay memory

A network learns Q(s, a): the discounted sum of rewards to expect after action a in state s, if the best actions follow.
The target uses the network's own estimates, so learning is unstable. Two things help: minibatches are drawn at random
from a memory of transitions (s, a, r, s'), which mixes many episodes; and Q_target is a copy that lags behind.

    python dqn_cartpole.py
    python dqn_cartpole.py --env-id Acrobot-v1 --seed 2 --video
    python dqn_cartpole.py --resume runs/NAME --total-timesteps 200000    # 200,000 in all: the rate is back at half
    python dqn_cartpole.py --play runs/NAME/best.pt --render

Seeds 1 to 20: the final network's greedy return is 500.0 on 19 (95 % interval: 75 to 99.9 %), 490.8 on one; 31 to 36 s.

Is my run healthy?       at 10 %    at 50 %    at 100 %     (medians of 20 seeds; lowest and highest at the end)
    evaluation           250        500        500          (16 episodes; 489 to 500; it rises, falls, rises again)
    return_mean_100      68         207        425          (334 to 490; a fifth of the actions are random)
    loss                 2.2        1.1        1.0          (0.2 to 6.6; of one minibatch)
    q_taken              41         86         105          (95 to 130; max overestimates: true ones are at most 100)

Differences from the paper: vectors and a small network; Adam with a learning rate that falls to 0, not RMSProp;
squared errors, not clipped; a target network that follows slowly, not by copies; epsilon ends at 0.2, not 0.1, so that
the pole goes on falling; 8 environments side by side; where only time ran out, the target keeps the value of s'.
"""

import argparse
import atexit
import copy
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv  # of SB3 only this, and the seeding
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# === Arguments ========================================================================================================
SCRIPT = "dqn_cartpole"  # in the names of run directories, and in checkpoints
Count = Annotated[int, 1, 10**9]  # a type, and the range that a flag must lie in
Positive = Annotated[float, 1e-12, 1e9]
Fraction = Annotated[float, 0, 1]


@dataclass
class Args:
    """DQN (Mnih et al. 2015) for any environment with a vector observation and discrete actions."""

    # algorithm
    total_timesteps: Count = 100_000  # transitions, summed over the environments
    learning_starts: Count = 1_000  # transitions before the first gradient step
    train_frequency: Count = 4  # transitions played per gradient step
    target_frequency: Count = 4  # transitions per update of the target network (the paper counts gradient steps)
    tau: Annotated[float, 1e-6, 1] = 0.02  # an update moves the target network by this share of the way; 1: a copy
    gamma: Fraction = 0.99  # discount per step
    buffer_size: Count = 100_000  # transitions in the replay memory
    batch_size: Count = 256  # transitions in a minibatch
    hidden_size: Annotated[int, 1, 10_000] = 128  # units in each of the two hidden layers

    # exploration
    epsilon_start: Fraction = 1.0  # probability of a random action at the start
    epsilon_end: Fraction = 0.2  # probability of a random action once the schedule has ended
    exploration_steps: Count = 10_000  # transitions over which epsilon falls, in a straight line

    # optimisation
    learning_rate: Positive = 1e-3  # step size of Adam at the start
    learning_rate_end: Annotated[float, 0, 1e9] = 0.0  # step size at the end; it falls linearly over total_timesteps
    optimizer_eps: Positive = 1e-4  # Adam's epsilon: added to the denominator of its step
    loss: Literal["mse", "huber"] = "mse"  # squared TD error; huber: half of it, but linear for errors beyond 1

    # environment
    env_id: str = "CartPole-v1"  # any Gymnasium id; module:EnvName-v0 imports your own module first
    num_envs: Annotated[int, 1, 1_000] = 8  # environments side by side: one forward pass chooses all their actions
    vec_env: Literal["dummy", "subproc"] = "dummy"  # in this process; or a process each, for slow steps
    time_limit: Annotated[int | None, -1, 10**9] = None  # steps per episode instead of the environment's own; -1: none

    # evaluation
    eval_every: Count = 5_000  # transitions between evaluations
    eval_episodes: Count = 16  # greedy episodes per evaluation
    final_eval_episodes: Count = 100  # greedy episodes at the end; other seeds than those that chose best.pt
    target_return: Annotated[float, -1e9, 1e9] = 1e9  # stop once the last 100 training episodes have this mean return

    # run
    seed: Annotated[int, 0, 2**30] = 1  # of the network, exploration, replay memory and environments
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps; auto is the CPU, which is faster for so small a network
    run_dir: str = ""  # where to write the run (default: runs/{env}__{script}__{seed}__{time})
    checkpoint_every: Count = 50_000  # transitions between checkpoints
    resume: str = ""  # run directory of a stopped run: go on with it
    play: str = ""  # checkpoint file: evaluate it, without training
    render: bool = False  # with --play: show three episodes in a window
    video: bool = False  # film an episode of the best network into the run's videos/
    track: Literal["none", "swanlab", "wandb"] = "none"  # mirror TensorBoard to a tracker

    def __post_init__(self):
        check_args(self)
        fits = self.num_envs <= self.learning_starts < self.total_timesteps
        require(self, "learning_starts", fits, "give at least --num-envs and less than --total-timesteps")


# === Network ==========================================================================================================
class QNetwork(nn.Module):
    """Q(s, a) of all A actions at once, with no activation at the end: obs (B, obs_dim) -> q_values (B, A)."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__()
        d, h, n = observation_space.shape[0], args.hidden_size, action_space.n
        self.layers = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, n))

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
    """A ring of the last `capacity` transitions, in tensors that are allocated once."""

    def __init__(self, capacity: int, obs_dim: int):
        self.capacity = capacity
        self.added = 0  # transitions ever added; the next one goes to slot added % capacity
        zeros = partial(torch.zeros, capacity)  # zeros(obs_dim): (capacity, obs_dim)
        self.columns = Batch(zeros(obs_dim), zeros(dtype=torch.int64), zeros(), zeros(obs_dim), zeros())

    def add(self, *arrays: np.ndarray):
        """Store one transition per environment: arrays (num_envs, ...) in the order of Batch. Overwrites the oldest."""
        slots = np.arange(self.added, self.added + len(arrays[0])) % self.capacity
        for column, values in zip(self.columns, arrays, strict=True):
            column.numpy()[slots] = values  # writes into the tensor's memory; faster than column[slots]
        self.added += len(slots)

    def sample(self, batch_size: int, device: torch.device) -> Batch:
        """Draw batch_size transitions uniformly, with replacement."""
        slots = torch.randint(min(self.added, self.capacity), (batch_size,))
        return Batch(*(column.index_select(0, slots).to(device) for column in self.columns))  # faster than [slots]

    def state_dict(self) -> dict:
        return {"added": self.added, "columns": list(self.columns)}

    def load_state_dict(self, state: dict):
        if len(state["columns"][0]) != self.capacity:
            raise ValueError("its replay memory has another --buffer-size")
        self.added = state["added"]
        for column, saved in zip(self.columns, state["columns"], strict=True):
            column.copy_(saved)


# === Equations ========================================================================================================
def td_loss(q_values: torch.Tensor, next_q_values: torch.Tensor, batch: Batch, gamma: float, loss_function):
    """Return the temporal-difference (TD) loss (Mnih et al. 2015), and Q(s, a) of the actions taken, (B,).

    y = r + gamma * max_a' Q_target(s', a')    where the episode went on, or only ran out of time (truncated)
    y = r                                      where it ended for good (terminated): no reward can follow

    The target uses the best next action, not the one taken: so old and random transitions can be used (off-policy).
    q_values: Q(s, .), (B, A). next_q_values: Q_target(s', .), (B, A), without gradient: only Q(s, a) is trained.
    """
    q_taken = q_values.gather(1, batch.actions.unsqueeze(1)).squeeze(1)  # (B, A) -> (B,)
    next_q_max = next_q_values.max(dim=1).values  # (B, A) -> (B,)
    td_target = batch.rewards + gamma * (1.0 - batch.terminated) * next_q_max
    assert q_taken.shape == td_target.shape  # (B, 1) against (B,) would broadcast to (B, B) and train on noise
    return loss_function(q_taken, td_target), q_taken


@torch.no_grad()
def update_target(target_parameters: list[nn.Parameter], parameters: list[nn.Parameter], tau: float):
    """theta_target <- theta_target + tau * (theta - theta_target); tau 1 is a copy."""
    for target, parameter in zip(target_parameters, parameters, strict=True):
        target.lerp_(parameter, tau)


def linear_schedule(start: float, end: float, steps: int, t: int) -> float:
    """Go from start to end in a straight line over `steps` transitions, then stay."""
    return start + (end - start) * min(t / steps, 1.0)


# === Training =========================================================================================================
def train(args: Args) -> dict:
    """Train from the start, or go on from the run directory args.resume, with the flags in args; return the results."""
    device = select_device(args.device, auto="cpu")
    torch.set_num_threads(1)  # so small a network is faster on one core than on several
    set_random_seed(args.seed)  # seeds torch, random and np.random; many environments draw from the last two
    # Below 2^30, so that seed + i fits the 32-bit int that some environments use.
    train_seed, eval_seed, final_seed = (np.random.SeedSequence(args.seed).generate_state(3) % 2**30).tolist()

    envs = make_envs(args)
    q_network = QNetwork(envs.observation_space, envs.action_space, args).to(device)
    target_network = copy.deepcopy(q_network)
    parameters, target_parameters = list(q_network.parameters()), list(target_network.parameters())
    optimizer = torch.optim.Adam(q_network.parameters(), args.learning_rate, eps=args.optimizer_eps, fused=True)
    memory = ReplayMemory(args.buffer_size, envs.observation_space.shape[0])
    loss_function = nn.functional.mse_loss if args.loss == "mse" else nn.functional.smooth_l1_loss
    loss = torch.zeros(())  # until the first gradient step
    run = Run(args, envs, q_network, target_network=target_network, optimizer=optimizer, memory=memory)
    global_step, gradient_steps = run.counts["global_step"], run.counts["gradient_steps"]  # 0, or as Run loaded them
    # After a resume, transitions count from global_step on: changed flags leave no gradient steps to catch up on.
    learning_starts = max(args.learning_starts, global_step) - gradient_steps * args.train_frequency
    envs.seed((train_seed + global_step) % 2**30)  # environment i gets this + i; a resumed run gets new episodes
    obs = envs.reset()

    while global_step < args.total_timesteps and run.mean_return(at_least=100) < args.target_return:
        # Act: at random with probability epsilon, else greedily. Each environment draws for itself.
        epsilon = linear_schedule(args.epsilon_start, args.epsilon_end, args.exploration_steps, global_step)
        with torch.no_grad():
            q_values = q_network(torch.from_numpy(obs).to(device))  # (num_envs, A)
        explore = torch.rand(args.num_envs) < epsilon
        random_actions = torch.randint(envs.action_space.n, (args.num_envs,))
        actions = torch.where(explore, random_actions, q_values.argmax(dim=1).cpu()).numpy()
        envs.step_async(actions.tolist())  # results come below: worker processes step while this one learns
        global_step += args.num_envs

        # Learn: one gradient step per train_frequency transitions, however many environments there are.
        learning_rate = linear_schedule(args.learning_rate, args.learning_rate_end, args.total_timesteps, global_step)
        optimizer.param_groups[0].update(lr=learning_rate, eps=args.optimizer_eps)  # eps too: a resume loads old ones
        while gradient_steps < (global_step - learning_starts) // args.train_frequency:
            batch = memory.sample(args.batch_size, device)
            with torch.no_grad():
                next_q_values = target_network(batch.next_obs)
            loss, q_taken = td_loss(q_network(batch.obs), next_q_values, batch, args.gamma, loss_function)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            gradient_steps += 1

            # Update the target every target_frequency transitions (by default after each gradient step; never more).
            if (gradient_steps * args.train_frequency) % args.target_frequency < args.train_frequency:
                update_target(target_parameters, parameters, args.tau)
            if gradient_steps % 100 == 0:
                metrics = {"loss": loss.item(), "q_taken": q_taken.mean().item()}
                run.log(global_step, "train", **metrics, epsilon=epsilon, learning_rate=learning_rate)

        # Receive. Where an episode ended, obs is already the first of the next one; its own last one is in the info.
        last_obs = obs
        obs, rewards, dones, infos = envs.step_wait()
        next_obs = obs.copy()
        for i in np.flatnonzero(dones):
            next_obs[i] = infos[i]["terminal_observation"]

        # Store. Where time ran out (truncated), rewards would have followed: only a termination drops max Q from y.
        truncated = np.array([info["TimeLimit.truncated"] for info in infos])  # SB3 sets it at every step
        terminated = dones & ~truncated
        run.check_finite(global_step, observation=[last_obs, next_obs], reward=rewards, loss=loss.item())
        memory.add(last_obs, actions, rewards, next_obs, terminated)
        run.log_episodes(global_step, infos)

        # Evaluate each time a multiple of eval_every is crossed, and keep the best network; save where it is due.
        if global_step % args.eval_every < args.num_envs:
            run.evaluate(global_step, eval_seed)
        run.tick(global_step=global_step, gradient_steps=gradient_steps)

    return run.finish(eval_seed, final_seed)


# === Evaluation =======================================================================================================
@torch.no_grad()
def evaluate(args: Args, network: nn.Module, num_episodes: int, seed: int, **env_options) -> np.ndarray:
    """Play num_episodes greedily, num_envs side by side; return their returns, (num_episodes,)."""
    n, device = min(args.num_envs, num_episodes), next(network.parameters()).device
    envs = DummyVecEnv([partial(make_env, args, evaluation=True, **env_options)] * n)
    envs.seed(seed)
    obs, returns = envs.reset(), [[] for _ in range(n)]
    while sum(map(len, returns)) < num_episodes:
        actions = network(torch.from_numpy(obs).to(device)).argmax(dim=1)
        obs, _, _, infos = envs.step(actions.tolist())
        for i, info in enumerate(infos):
            # 100 on 8 environments: 12 or 13 each, fixed beforehand; the first 100 to end would be the short ones.
            if "episode" in info and len(returns[i]) < (num_episodes + i) // n:
                returns[i].append(info["episode"]["r"])
    envs.close()
    return np.concatenate(returns)


# === Environment ======================================================================================================
class FlatEnv(gym.Wrapper):
    """Gives an environment the form that the rest relies on: float32 vectors out, NumPy integers in, an empty info."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        space, actions = env.observation_space, env.action_space
        picture = isinstance(space, gym.spaces.Box) and len(space.shape) > 1 and np.prod(space.shape) > 4_000
        if picture or not space.is_np_flattenable or not isinstance(actions, gym.spaces.Discrete):
            needs = "this script needs vectors, discrete actions (pictures: dqn_atari.py; continuous: ppo_cartpole.py)"
            raise UsageError(f"--env-id {env.spec.id}: {space}, {actions}; {needs}")
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (gym.spaces.flatdim(space),), np.float32)
        self.action_space = gym.spaces.Discrete(int(actions.n))

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is not None:  # reset seeds no spaces, but some environments draw from theirs
            self.env.observation_space.seed(seed)
            self.env.action_space.seed(seed)
        return self.vector(self.env.reset(seed=seed, options=options)[0]), {}

    def step(self, action: int):
        obs, reward, terminated, truncated, _ = self.env.step(np.int64(action) + self.env.action_space.start)
        return self.vector(obs), float(reward), bool(terminated), bool(truncated), {}

    def vector(self, obs) -> np.ndarray:
        if not isinstance(self.env.observation_space, gym.spaces.Box):  # flatten would cast the numbers of a Box
            obs = gym.spaces.flatten(self.env.observation_space, obs)
        return np.array(obs, np.float32).reshape(self.observation_space.shape)  # a copy: some envs overwrite theirs


def make_env(args: Args, evaluation: bool = False, video_dir: Path | None = None, **options):
    """Return one environment; its info holds {"episode": {"r": return, "l": length}} where an episode ended."""
    try:
        env = gym.make(args.env_id, max_episode_steps=args.time_limit, **options)
    except (gym.error.Error, ModuleNotFoundError) as error:  # no such id, or a package is missing
        raise UsageError(f"--env-id {args.env_id}: {error}") from None
    if evaluation and env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, 10_000)  # without a limit a good policy would never end its evaluation
    env = gym.wrappers.RecordEpisodeStatistics(FlatEnv(env), buffer_length=1)
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
