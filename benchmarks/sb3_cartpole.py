"""Run Stable-Baselines3's DQN and PPO on CartPole-v1 over seeds, with the hyperparameters that RL Zoo publishes.

    python benchmarks/sb3_cartpole.py dqn
    python benchmarks/sb3_cartpole.py ppo

Judged much as our scripts are: every 5,000 transitions 20 greedy episodes, off the clock; at the end 100 of the final
network, and of the best one, on seeds that served no other purpose. Writes benchmarks/results/sb3_{dqn,ppo}_cartpole/
as run_seeds.py does, but seconds are those of the processor: all runs on one thread, and what else the machine does is
not counted. A seed that has its row is not run again.
"""

import copy
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import run_seeds
import torch
import tyro
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

ENV_ID = "CartPole-v1"
EVAL_EVERY, EVAL_EPISODES, FINAL_EVAL_EPISODES = 5_000, 20, 100


@dataclass
class Setting:
    """What RL Zoo's hyperparams/dqn.yml and ppo.yml list for CartPole-v1."""

    algorithm: type
    total_timesteps: int  # transitions
    num_envs: int
    options: dict


SETTINGS = {
    "dqn": Setting(
        DQN,
        50_000,
        1,
        {
            "learning_rate": 2.3e-3,
            "batch_size": 64,
            "buffer_size": 100_000,
            "learning_starts": 1_000,
            "gamma": 0.99,
            "target_update_interval": 10,
            "train_freq": 256,
            "gradient_steps": 128,
            "exploration_fraction": 0.16,
            "exploration_final_eps": 0.04,
            "policy_kwargs": {"net_arch": [256, 256]},
        },
    ),
    "ppo": Setting(
        PPO,
        100_000,
        8,
        {
            "n_steps": 32,
            "batch_size": 256,
            "gae_lambda": 0.8,
            "gamma": 0.98,
            "n_epochs": 20,
            "ent_coef": 0.0,
            "learning_rate": lambda remaining: 1e-3 * remaining,  # remaining: falls from 1 to 0
            "clip_range": lambda remaining: 0.2 * remaining,
        },
    ),
}


@dataclass
class Args:
    algorithm: tyro.conf.Positional[Literal["dqn", "ppo"]]  # which one
    seeds: list[int] = field(default_factory=lambda: list(range(1, 11)))  # one run each
    total_timesteps: int | None = None  # transitions, in place of RL Zoo's
    name: str = ""  # directory under benchmarks/results (default: sb3_{algorithm}_cartpole)


def evaluate(policy, num_episodes: int, seed: int) -> np.ndarray:
    """Play greedily, one episode per environment, side by side; environment i gets seed + i. Return the returns."""
    envs = [gym.make(ENV_ID) for _ in range(num_episodes)]
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    returns, running = np.zeros(num_episodes), list(range(num_episodes))
    while running:
        actions, _ = policy.predict(obs[running], deterministic=True)
        for i, action in zip(tuple(running), actions, strict=True):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += reward
            if terminated or truncated:
                running.remove(i)
    return returns


class Evaluations(BaseCallback):
    """Evaluates each time a multiple of EVAL_EVERY is crossed, off the clock, and keeps the best network."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed, self.paused, self.best, self.best_policy = seed, 0.0, -np.inf, None
        self.curve = []  # [step, mean return, seconds]
        self.rows = ["step,metric,value"]  # of progress.csv
        self.started = time.process_time()

    def seconds(self) -> float:
        return time.process_time() - self.started - self.paused

    def _on_step(self) -> bool:
        step = self.num_timesteps
        if step // EVAL_EVERY > (step - self.training_env.num_envs) // EVAL_EVERY:
            before, seconds = time.process_time(), self.seconds()
            returns = evaluate(self.model.policy, EVAL_EPISODES, self.seed)
            self.curve.append([step, float(returns.mean()), seconds])
            self.rows += [f"{step},eval/return_mean,{returns.mean()}", f"{step},eval/return_min,{returns.min()}"]
            if self.model.ep_info_buffer:
                training = np.mean([episode["r"] for episode in self.model.ep_info_buffer])
                self.rows.append(f"{step},train/return_mean_100,{training}")
            if returns.mean() >= self.best:
                self.best, self.best_policy = returns.mean(), copy.deepcopy(self.model.policy.state_dict())
            self.paused += time.process_time() - before
        return True


def train(setting: Setting, seed: int, total_timesteps: int, out: Path) -> dict:
    """Train one seed; write seed_N.csv and return the row of summary.csv."""
    _, eval_seed, final_seed = (int(s) % 2**30 for s in np.random.SeedSequence(seed).generate_state(3))  # as in ours
    envs = make_vec_env(ENV_ID, setting.num_envs, seed=seed)
    model = setting.algorithm("MlpPolicy", envs, seed=seed, device="cpu", **setting.options)
    evaluations = Evaluations(eval_seed)
    model.learn(total_timesteps, callback=evaluations)
    seconds = evaluations.seconds()
    finals = evaluate(model.policy, FINAL_EVAL_EPISODES, final_seed)
    best = copy.deepcopy(model.policy)
    best.load_state_dict(evaluations.best_policy)
    result = {
        "final_return_mean": float(finals.mean()),
        "final_return_min": float(finals.min()),
        "final_return_std": float(finals.std()),
        "best_return_mean": float(evaluate(best, FINAL_EVAL_EPISODES, final_seed).mean()),
        "seconds": seconds,
        "global_step": model.num_timesteps,
        "gradient_steps": model._n_updates,  # of PPO: passes, which hold one minibatch here
        "evaluations": evaluations.curve,
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "result.json").write_text(json.dumps(result))
        Path(folder, "args.json").write_text(json.dumps({"seed": seed}))
        Path(folder, "progress.csv").write_text("\n".join(evaluations.rows) + "\n")
        return run_seeds.collect(Path(folder), out)


def main():
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    setting = SETTINGS[args.algorithm]
    out = run_seeds.ROOT / "benchmarks" / "results" / (args.name or f"sb3_{args.algorithm}_cartpole")
    seeds = run_seeds.seeds_to_run(args.seeds, out)
    total_timesteps = args.total_timesteps or setting.total_timesteps
    if seeds:
        command = f"python benchmarks/sb3_cartpole.py {args.algorithm}"
        if args.total_timesteps:
            command += f" --total-timesteps {total_timesteps}"
        run_seeds.describe(out, command, jobs=1)
    for seed in seeds:
        run_seeds.add_row(train(setting, seed, total_timesteps, out), out)


if __name__ == "__main__":
    main()
