"""An environment whose step takes as long as its id says: slow_envs:Wait1ms-v0, slow_envs:Compute0_1ms-v0 and so on."""

import time

import gymnasium as gym
import numpy as np

MILLISECONDS = ("0.1", "1", "10", "100")


class Slow(gym.Env):
    """A step waits (as for a device or a server), or computes (as a simulator does), for this many milliseconds."""

    observation_space = gym.spaces.Box(0, 1, (4,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, milliseconds: float, compute: bool):
        self.seconds, self.compute = milliseconds / 1e3, compute

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(4, np.float32), {}

    def step(self, action):
        if self.compute:
            end = time.thread_time() + self.seconds  # processor time: a share of a core takes longer
            while time.thread_time() < end:
                pass
        else:
            time.sleep(self.seconds)
        return np.zeros(4, np.float32), 1.0, False, False, {}


for milliseconds in MILLISECONDS:
    for kind in ("Wait", "Compute"):
        gym.register(
            f"{kind}{milliseconds}ms-v0".replace(".", "_"),
            entry_point=Slow,
            max_episode_steps=200,
            kwargs={"milliseconds": float(milliseconds), "compute": kind == "Compute"},
        )
