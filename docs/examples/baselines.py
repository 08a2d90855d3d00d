"""What an environment gives to a player that learns nothing: 100 episodes of random actions, or of one action alone.

Example: PYTHONPATH=docs/examples python docs/examples/baselines.py nine_torques:NineTorques-v0 --always 4
"""

import argparse

import gymnasium as gym
import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("env_id")
parser.add_argument("--always", type=int, help="this action (in every dimension) at every step, not random ones")
args = parser.parse_args()

env, returns = gym.make(args.env_id), []
env.action_space.seed(0)
fixed = args.always
if fixed is not None and env.action_space.shape:
    fixed = np.full(env.action_space.shape, fixed, env.action_space.dtype)
for seed in range(100):
    env.reset(seed=seed)
    total, ended = 0.0, False
    while not ended:
        action = env.action_space.sample() if fixed is None else fixed
        _, reward, terminated, truncated, _ = env.step(action)
        total, ended = total + float(reward), terminated or truncated
    returns.append(total)
print(f"return {np.mean(returns):.2f} over {len(returns)} episodes ({min(returns):.2f} to {max(returns):.2f})")
