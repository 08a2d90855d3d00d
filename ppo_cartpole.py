# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["gymnasium==1.4.0", "moviepy==2.2.1", "numpy==2.4.6", "pygame==2.6.1", "stable-baselines3==2.9.2",
#                 "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.16"]
# ///
"""PPO on CartPole: proximal policy optimisation, small and complete (Schulman et al., arXiv 1707.06347, 2017).

    L   = -mean of min(ratio * A, clip(ratio, 1 - c, 1 + c) * A)    ratio = pi(a|s) / pi_old(a|s); c is --clip-coef
    A_t = delta_t + gamma * lambda * A_(t+1)                        GAE; delta_t = r_t + gamma * V(s_(t+1)) - V(s_t)

A policy pi(a|s) plays a rollout. Each action is judged by its advantage A, how much better it turned out than the value
network V(s) expected, and the policy moves towards the better ones. A rollout serves many gradient steps, which is safe
only while pi stays close to pi_old, the policy that played it: clipping takes away the incentive to go further.

    python ppo_cartpole.py
    python ppo_cartpole.py --resume runs/NAME --total-timesteps 120000    # rate and clip range are back at half
    python ppo_cartpole.py --play runs/NAME/best.pt --render

Measured, seeds 1 to 20: the final network's greedy return over 100 episodes is 500.0 on 19 (95 % interval of that rate:
75 to 99.9 %) and 499.3 on one, in 4 s each. (The defaults were chosen on seeds 1 to 10, with other environment seeds.)

Is my run healthy?       at 10 %    at 50 %    at 100 %     (medians of 20 seeds; lowest and highest at the end)
    evaluation           239        500        500          (500 to 500; 16 episodes)
    return_mean_100      35         208        444          (367 to 482: training episodes explore)
    entropy              0.57       0.48       0.36         (0.30 to 0.49; 0.69 = log 2: both actions equally likely)

Differences from the paper: orthogonal initial weights, advantages normalised in each minibatch and a clipped gradient,
as in its authors' code (openai/baselines, ppo2); half the squared error as the value loss (that code: a quarter, also
clipped); where only time ran out, V of the last observation stands for the rewards to come. Not different: learning
rate and clip range fall to 0 (in the paper on Atari), and continuous actions come from a Gaussian (docs/results.md has
three such tasks).
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
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

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
SCRIPT = "ppo_cartpole"  # in the names of run directories, and in checkpoints
Count = Annotated[int, 1, 10**9]  # a type, and the range that a flag must lie in
Positive = Annotated[float, 1e-12, 1e9]
NonNegative = Annotated[float, 0, 1e9]
Fraction = Annotated[float, 0, 1]


@dataclass
class Args:
    """PPO (Schulman et al. 2017) for any environment with a vector observation, and discrete or continuous actions."""

    # algorithm
    total_timesteps: Count = 60_000  # transitions, summed over the environments
    num_steps: Count = 32  # steps of each environment per rollout
    update_epochs: Count = 8  # passes over each rollout
    num_minibatches: Count = 4  # minibatches per pass, one gradient step each
    gamma: Fraction = 0.98  # discount per step
    gae_lambda: Fraction = 0.9  # of GAE: 0 trusts V after one reward; 1 adds all rewards up to the rollout's end
    norm_advantages: bool = True  # to mean 0 and standard deviation 1, in each minibatch
    clip_coef: Positive = 0.2  # the ratio of new to old probability is clipped to 1 - this ... 1 + this
    anneal_clip: bool = True  # let clip_coef fall to 0 over total_timesteps
    value_coef: Positive = 1.0  # weight of the value loss, which is half the mean squared error
    entropy_coef: NonNegative = 0.0  # weight of the entropy bonus, which keeps the policy from settling early
    target_kl: NonNegative = 1e9  # end the passes early if the last minibatch's approx_kl exceeds this; 1e9: never
    hidden_size: Annotated[int, 1, 10_000] = 64  # units in each of the two hidden layers, of the actor and the critic

    # optimisation
    learning_rate: Positive = 2e-3  # step size of Adam at the start; it falls in a straight line to 0
    optimizer_eps: Positive = 1e-5  # Adam's epsilon: added to the denominator of its step
    max_grad_norm: NonNegative = 0.5  # largest global norm of the gradient; 0: not clipped

    # environment
    env_id: str = "CartPole-v1"  # any Gymnasium id; module:EnvName-v0 imports your own module first
    num_envs: Annotated[int, 1, 1_000] = 32  # environments side by side: one forward pass chooses all their actions
    vec_env: Literal["dummy", "subproc"] = "dummy"  # in this process; or a process each, for slow steps
    time_limit: Annotated[int | None, -1, 10**9] = None  # steps per episode instead of the environment's own; -1: none

    # evaluation
    eval_every: Count = 3_000  # transitions between evaluations
    eval_episodes: Count = 16  # greedy episodes per evaluation
    final_eval_episodes: Count = 100  # greedy episodes at the end; other seeds than those that chose best.pt
    target_return: Annotated[float, -1e9, 1e9] = 1e9  # stop once the last 100 training episodes have this mean return

    # run
    seed: Annotated[int, 0, 2**30] = 1  # of the network, the actions, the minibatches and the environments
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
        size, rest = divmod(self.num_envs * self.num_steps, self.num_minibatches)
        fits = rest == 0 and size > 1  # one sample has no standard deviation
        require(self, "num_minibatches", fits, "give a smaller divisor of --num-envs * --num-steps")


# === Network ==========================================================================================================
class ActorCritic(nn.Module):
    """Two networks without a shared weight: obs (B, obs_dim) -> policy, and obs -> value (B,).

    policy: the logits of n discrete actions, (B, n); of continuous actions, mean and log standard deviation of a
    Gaussian in each of their n dimensions, (B, 2 * n). The standard deviations are learned, the same in every state.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__()
        d, h, n = observation_space.shape[0], args.hidden_size, gym.spaces.flatdim(action_space)
        self.actor = nn.Sequential(nn.Linear(d, h), nn.Tanh(), nn.Linear(h, h), nn.Tanh(), nn.Linear(h, n))
        self.critic = nn.Sequential(nn.Linear(d, h), nn.Tanh(), nn.Linear(h, h), nn.Tanh(), nn.Linear(h, 1))
        gains = (2**0.5, 2**0.5, 0.01, 2**0.5, 2**0.5, 1.0)  # 0.01: the policy starts almost the same in all states
        for layer, gain in zip([*self.actor[::2], *self.critic[::2]], gains, strict=True):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
        self.log_std = nn.Parameter(torch.zeros(n)) if isinstance(action_space, gym.spaces.Box) else None

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        policy = self.actor(obs)
        return policy if self.log_std is None else torch.cat([policy, self.log_std.expand_as(policy)], dim=1)

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        return self.critic(obs).squeeze(-1)


# === Rollout ==========================================================================================================
class Rollout:
    """T = num_steps steps of N = num_envs environments, in arrays that each rollout overwrites."""

    def __init__(self, num_steps: int, num_envs: int, obs_dim: int, action_space: gym.Space):
        self.obs = np.zeros((num_steps + 1, num_envs, obs_dim), np.float32)  # one more: where the rollout was cut off
        dtype = np.float32 if action_space.shape else np.int64
        self.actions = np.zeros((num_steps, num_envs, *action_space.shape), dtype)
        self.rewards = np.zeros((num_steps, num_envs), np.float32)
        self.ended = np.zeros((num_steps, num_envs), bool)  # this step terminated or truncated the episode


# === Equations ========================================================================================================
def compute_gae(rewards, values, ended, gamma: float, gae_lambda: float):
    """Return advantages and returns, (T, N) each: generalised advantage estimation (GAE; Schulman et al. 2016).

    delta_t = r_t + gamma * goes_on_t * V(s_(t+1)) - V(s_t)     goes_on_t: 0 where an episode ended after step t, else 1
    A_t     = delta_t + gamma * lambda * goes_on_t * A_(t+1)    A_T = 0; return_t = A_t + V(s_t)

    rewards, ended: (T, N). values: (T + 1, N); row T: of the observations after the last step.
    Where only time ran out, r_t already holds gamma * V(last observation).
    """
    goes_on = 1.0 - ended
    deltas = rewards + gamma * goes_on * values[1:] - values[:-1]  # all at once: only A_t needs a loop
    advantages, advantage = np.zeros_like(rewards), np.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        advantages[t] = advantage = deltas[t] + gamma * gae_lambda * goes_on[t] * advantage
    return advantages, advantages + values[:-1]


def choose_actions(policy: torch.Tensor, action_space: gym.Space, greedy: bool = False) -> torch.Tensor:
    """Draw one action from each pi(.|s), or take its most probable one; policy as ActorCritic gives it."""
    if isinstance(action_space, gym.spaces.Discrete):  # (B, n) -> (B,)
        # Gumbel-max: argmax(logits + Gumbel noise) is a draw from softmax(logits), and -log(Exp(1)) is that noise.
        # torch.multinomial draws the same way, but with its checks the whole run takes a tenth longer.
        return (policy if greedy else policy - torch.empty_like(policy).exponential_().log()).argmax(dim=1)
    means, log_stds = policy.chunk(2, dim=1)  # (B, 2 * n) -> (B, n)
    return means if greedy else torch.normal(means, log_stds.exp())


def log_probs_and_entropy(policy: torch.Tensor, actions: torch.Tensor):
    """Return log pi(a|s) of the actions taken and the entropy of pi(.|s), (B,) each; actions (B,), or (B, n) of floats.

    log pi(a|s) = logit_a - log(sum of exp(logits))                                    discrete
    log pi(a|s) = sum over dimensions of -((a - mean) / std)^2 / 2 - log(std) - log(2 pi) / 2    continuous
    """
    if not actions.is_floating_point():
        log_probs = policy.log_softmax(dim=1)  # (B, n)
        entropy = -(log_probs.exp() * log_probs).sum(dim=1)
        return log_probs.gather(1, actions.unsqueeze(1)).squeeze(1), entropy
    means, log_stds = policy.chunk(2, dim=1)
    log_probs = -0.5 * ((actions - means) / log_stds.exp()).square() - log_stds - 0.5 * math.log(2 * math.pi)
    return log_probs.sum(dim=1), (log_stds + 0.5 * math.log(2 * math.pi * math.e)).sum(dim=1)


def ppo_loss(log_probs, old_log_probs, advantages, clip_coef: float):
    """Return the clipped surrogate loss (Schulman et al. 2017, equation 7) and log(ratio), (B,).

    L = -mean of min(ratio * A, clip(ratio, 1 - c, 1 + c) * A)    ratio = pi(a|s) / pi_old(a|s), at first 1

    A sample has no gradient where its ratio went far enough: A > 0 and ratio > 1 + c, or A < 0 and ratio < 1 - c.
    """
    assert log_probs.shape == old_log_probs.shape == advantages.shape  # (B, 1) against (B,) would broadcast to (B, B)
    log_ratio = log_probs - old_log_probs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_coef, 1.0 + clip_coef)
    return -torch.min(ratio * advantages, clipped * advantages).mean(), log_ratio


def approx_kl(log_ratio: torch.Tensor) -> float:
    """Estimate KL(pi_old, pi) as the mean of ratio - 1 - log(ratio): never negative, and of low variance."""
    return (log_ratio.exp() - 1.0 - log_ratio).mean().item()


def critic_loss(values, returns):
    """Return half the mean squared error of the values, (B,) each."""
    assert values.shape == returns.shape
    return 0.5 * (values - returns).square().mean()


# === Training =========================================================================================================
def train(args: Args) -> dict:
    """Train from the start, or go on from the run directory args.resume, with the flags in args; return the results."""
    device = select_device(args.device, auto="cpu")
    torch.set_num_threads(1)  # so small a network is faster on one core than on several
    set_random_seed(args.seed)  # seeds torch, random and np.random; many environments draw from the last two
    # Below 2^30, so that seed + i fits the 32-bit int that some environments use.
    train_seed, eval_seed, final_seed = (np.random.SeedSequence(args.seed).generate_state(3) % 2**30).tolist()

    envs = make_envs(args)
    network = ActorCritic(envs.observation_space, envs.action_space, args).to(device)
    optimizer = torch.optim.Adam(network.parameters(), args.learning_rate, eps=args.optimizer_eps, fused=True)
    rollout = Rollout(args.num_steps, args.num_envs, envs.observation_space.shape[0], envs.action_space)
    run = Run(args, envs, network, optimizer=optimizer)
    global_step, gradient_steps = run.counts["global_step"], run.counts["gradient_steps"]  # 0, or as Run loaded them
    envs.seed((train_seed + global_step) % 2**30)  # environment i gets this + i; a resumed run gets new episodes
    rollout.obs[-1] = envs.reset()

    while global_step < args.total_timesteps and run.mean_return(at_least=100) < args.target_return:
        remaining = 1.0 - global_step / args.total_timesteps
        clip_coef = args.clip_coef * remaining if args.anneal_clip else args.clip_coef
        learning_rate = args.learning_rate * remaining
        optimizer.param_groups[0].update(lr=learning_rate, eps=args.optimizer_eps)  # eps too: a resume loads old ones

        # Collect: num_steps of every environment, with the policy as it is.
        rollout.obs[0] = rollout.obs[-1]  # go on where the last rollout was cut off
        with torch.no_grad():
            for t in range(args.num_steps):
                policy = network(torch.from_numpy(rollout.obs[t]).to(device)).cpu()
                run.check_finite(global_step, observation=rollout.obs[t], policy=policy.numpy())
                rollout.actions[t] = actions = choose_actions(policy, envs.action_space).numpy()  # (N,) or (N, n)
                # Where an episode ended, obs[t + 1] is already the first of the next one; its own last one is in infos.
                rollout.obs[t + 1], rollout.rewards[t], rollout.ended[t], infos = envs.step(actions.tolist())
                for i in np.flatnonzero([info["TimeLimit.truncated"] for info in infos]):  # where only time ran out:
                    terminal_obs = torch.from_numpy(infos[i]["terminal_observation"]).to(device)
                    rollout.rewards[t, i] += args.gamma * network.value(terminal_obs).item()  # V for what would follow
                global_step += args.num_envs
                run.log_episodes(global_step, infos)

            # Judge: all values in one forward pass; then flatten the rollout to one batch, (T, N, ...) -> (T * N, ...).
            values = network.value(torch.from_numpy(rollout.obs).to(device)).cpu().numpy()  # (T + 1, N)
            advantages, returns = compute_gae(rollout.rewards, values, rollout.ended, args.gamma, args.gae_lambda)
            columns = rollout.obs[:-1], rollout.actions, advantages, returns
            obs, actions, advantages, returns = (torch.from_numpy(c).flatten(0, 1).to(device) for c in columns)
            old_log_probs, _ = log_probs_and_entropy(network(obs), actions)  # the network is still pi_old
            batch = (obs, actions, old_log_probs, advantages, returns)

        # Learn: update_epochs passes over the batch. Each shuffles it and cuts it into minibatches (mb).
        for _ in range(args.update_epochs):
            for indices in torch.randperm(len(obs)).to(device).split(len(obs) // args.num_minibatches):
                mb_obs, mb_actions, mb_old_log_probs, mb_advantages, mb_returns = (column[indices] for column in batch)
                if args.norm_advantages:
                    mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                log_probs, entropy = log_probs_and_entropy(network(mb_obs), mb_actions)
                policy_loss, log_ratio = ppo_loss(log_probs, mb_old_log_probs, mb_advantages, clip_coef)
                value_loss = critic_loss(network.value(mb_obs), mb_returns)
                loss = policy_loss + args.value_coef * value_loss - args.entropy_coef * entropy.mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm or math.inf)  # 0: not clipped
                optimizer.step()
                gradient_steps += 1
            if approx_kl(log_ratio) > args.target_kl:
                break

        # Log the last minibatch, before its gradient step; explained_variance is of the rollout (returns - A are V).
        run.check_finite(global_step, observation=rollout.obs[-1], reward=rollout.rewards, loss=loss.item())
        metrics = {"policy_loss": policy_loss.item(), "value_loss": value_loss.item(), "entropy": entropy.mean().item()}
        metrics["approx_kl"] = approx_kl(log_ratio)
        metrics["clip_fraction"] = ((log_ratio.exp() - 1.0).abs() > clip_coef).float().mean().item()
        metrics["explained_variance"] = 1.0 - (advantages.var() / returns.var().clamp(min=1e-8)).item()
        run.log(global_step, "train", **metrics, learning_rate=learning_rate)

        # Evaluate each time a multiple of eval_every is crossed, and keep the best network; save where it is due.
        if global_step % args.eval_every < len(obs):
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
        actions = choose_actions(network(torch.from_numpy(obs).to(device)), envs.action_space, greedy=True)
        obs, _, _, infos = envs.step(actions.tolist())
        for i, info in enumerate(infos):
            # 100 on 8 environments: 12 or 13 each, fixed beforehand; the first 100 to end would be the short ones.
            if "episode" in info and len(returns[i]) < (num_episodes + i) // n:
                returns[i].append(info["episode"]["r"])
    envs.close()
    return np.concatenate(returns)


# === Environment ======================================================================================================
class FlatEnv(gym.Wrapper):
    """Gives an environment the form that the rest relies on: float32 vectors out; an integer or any floats in."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        space, actions = env.observation_space, env.action_space
        picture = isinstance(space, gym.spaces.Box) and len(space.shape) > 1 and np.prod(space.shape) > 4_000
        continuous = isinstance(actions, gym.spaces.Box) and len(actions.shape) == 1 and actions.dtype.kind == "f"
        if picture or not space.is_np_flattenable or not (continuous or isinstance(actions, gym.spaces.Discrete)):
            needs = "this script needs vectors, Discrete or 1-D Box actions (pictures: dqn_atari.py)"
            raise UsageError(f"--env-id {env.spec.id}: {space}, {actions}; {needs}")
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (gym.spaces.flatdim(space),), np.float32)
        self.action_space = actions if continuous else gym.spaces.Discrete(int(actions.n))

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is not None:  # reset seeds no spaces, but some environments draw from theirs
            self.env.observation_space.seed(seed)
            self.env.action_space.seed(seed)
        return self.vector(self.env.reset(seed=seed, options=options)[0]), {}

    def step(self, action: int | list[float]):
        space = self.env.action_space
        if isinstance(space, gym.spaces.Discrete):
            action = np.int64(action) + space.start
        else:  # clipped only here, not in the rollout: the gradient needs the action that was drawn
            action = np.clip(action, space.low, space.high).astype(space.dtype)
        obs, reward, terminated, truncated, _ = self.env.step(action)
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
    main(ActorCritic)
