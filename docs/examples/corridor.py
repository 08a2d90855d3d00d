"""Ten cells in a row: an environment in one file."""

import gymnasium as gym
import numpy as np


class Corridor(gym.Env):
    """Ten cells. Action 1 goes right, 0 left. Every step costs 1; the last cell ends the episode."""

    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = int(self.np_random.integers(9))
        return np.array([self.cell / 9], np.float32), {}

    def step(self, action):
        self.cell = max(self.cell + (1 if action == 1 else -1), 0)
        return np.array([self.cell / 9], np.float32), -1.0, self.cell == 9, False, {}


gym.register("Corridor-v0", entry_point=Corridor, max_episode_steps=50)
