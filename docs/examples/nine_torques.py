"""Reacher-v5, a robot arm with two joints, for scripts that need discrete actions: nine pairs of torques."""

import gymnasium as gym
import numpy as np


class NineTorques(gym.ActionWrapper):
    """Action 3 * i + j: the torque size * (i - 1) at the first joint, size * (j - 1) at the second; 4 does nothing."""

    size = 0.1  # of the 1.0 that is allowed: every step costs the squares of both torques

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.action_space = gym.spaces.Discrete(9)

    def action(self, action):
        return self.size * np.array([action // 3 - 1, action % 3 - 1], np.float32)


gym.register("NineTorques-v0", entry_point=lambda **options: NineTorques(gym.make("Reacher-v5", **options)))
