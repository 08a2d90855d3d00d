"""Environments small enough to know everything about; ids such as toy_envs:Mixed-v0."""

import os
from typing import ClassVar

import gymnasium as gym
import numpy as np


class Counting(gym.Env):
    """Every observation tells where it is from: [environment, episode, step, last action].

    The environment's number comes from its seed, and episode e of environment n has lengths[(n + e) % len(lengths)]
    steps unless a time limit ends it before. The reward is step + action / 2. With reuse_array, all observations are
    the same array, overwritten.
    """

    def __init__(self, lengths=(10**9,), reuse_array=False, render_mode=None):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.action_space = gym.spaces.Discrete(5)
        self.render_mode = render_mode
        self.lengths, self.reuse_array = lengths, reuse_array
        self.array = np.zeros(4, np.float32)
        self.number, self.episode = 0, -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.number, self.episode = seed % 1000, -1
        self.episode += 1
        self.steps, self.last_action = 0, -1
        return self.observe(), {}

    def step(self, action):
        reward = self.steps + action / 2
        self.steps, self.last_action = self.steps + 1, action
        return self.observe(), float(reward), self.steps == self.length(self.number, self.episode), False, {}

    def length(self, number, episode):
        return self.lengths[(number + episode) % len(self.lengths)]

    def observe(self):
        array = self.array if self.reuse_array else np.zeros(4, np.float32)
        array[:] = self.number, self.episode, self.steps, self.last_action
        return array


class Constant(gym.Env):
    """One state, reward 1 at every step, no end but the time limit: V = 1 / (1 - gamma)."""

    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        return np.ones(1, np.float32), 1.0, False, False, {}


class Cue(gym.Env):
    """Shows -1 or 1 at the first step and asks for it DELAY steps later; the observation is [cue, whether it asks].

    Actions are wait, -1 and 1. The right answer earns 1, anything else 0, and an answer before the question ends the
    episode, so that nobody can carry the cue in what he does. Without a memory the best is 0.5 on average.
    """

    DELAY = 3
    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.cue = 0, 2 * int(self.np_random.integers(2)) - 1
        return np.array([self.cue, 0], np.float32), {}

    def step(self, action):
        asked, answer = self.steps == self.DELAY, (0, -1, 1)[action]
        self.steps += 1
        obs = np.array([0, self.steps == self.DELAY], np.float32)
        return obs, float(asked and answer == self.cue), asked or answer != 0, False, {}


class Image(Constant):
    observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)


class Crashing(Constant):
    """Takes its process with it after 50 steps, if its seed is even: one of two environments in a row."""

    steps = 0

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.even = seed % 2 == 0
        return super().reset(seed=seed)

    def step(self, action):
        self.steps += 1
        if self.even and self.steps == 50:
            os._exit(1)
        return super().step(action)


class Raising(Constant):
    """Raises an error of its own at its 50th step, if its seed is even: one of two environments in a row."""

    steps = 0

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.even = seed % 2 == 0
        return super().reset(seed=seed)

    def step(self, action):
        self.steps += 1
        if self.even and self.steps == 50:
            raise ZeroDivisionError("the toy broke")
        return super().step(action)


class NotANumber(Constant):
    """Observes NaN from its 400th step on."""

    steps = 0

    def step(self, action):
        self.steps += 1
        obs, *rest = super().step(action)
        return obs * (np.nan if self.steps >= 400 else 1), *rest


class NanReset(Constant):
    """Observes NaN at the start of an episode: of its first one, or of a later one."""

    def __init__(self, which, render_mode=None):
        super().__init__(render_mode)
        self.which, self.resets = which, 0

    def reset(self, *, seed=None, options=None):
        self.resets += 1
        obs, info = super().reset(seed=seed)
        return obs * (np.nan if self.resets == self.which else 1), info


class Unready(Constant):
    """Raises an error at its first step."""

    def step(self, action):
        raise ZeroDivisionError("the toy was not ready")


class Blank(Constant):
    """Says that it can draw itself, and draws nothing."""

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 30}

    def render(self):
        return None


class Engine(Constant):
    """Holds something that is more than data, as a physics engine would be."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.engine = object()


LENGTHS = (3, 4, 5)
TIME_LIMIT = 4
COUNTING = {
    "Terminated-v0": {"kwargs": {"lengths": LENGTHS}},
    "Truncated-v0": {"max_episode_steps": TIME_LIMIT},
    # Episodes of 3 terminate, those of 5 are truncated, and those of 4 are both at once.
    "Mixed-v0": {"kwargs": {"lengths": LENGTHS}, "max_episode_steps": TIME_LIMIT},
    "SameArray-v0": {"kwargs": {"lengths": LENGTHS, "reuse_array": True}, "max_episode_steps": TIME_LIMIT},
}
for name, options in COUNTING.items():
    gym.register(name, entry_point=Counting, disable_env_checker=True, **options)
gym.register("Constant-v0", entry_point=Constant, disable_env_checker=True, max_episode_steps=5)
gym.register("Cue-v0", entry_point=Cue, disable_env_checker=True)
gym.register("Crashing-v0", entry_point=Crashing, disable_env_checker=True, max_episode_steps=5)
gym.register("Raising-v0", entry_point=Raising, disable_env_checker=True, max_episode_steps=5)
gym.register("NotANumber-v0", entry_point=NotANumber, disable_env_checker=True, max_episode_steps=5)
gym.register("Engine-v0", entry_point=Engine, disable_env_checker=True, max_episode_steps=5)
gym.register("Image-v0", entry_point=Image, disable_env_checker=True, max_episode_steps=5)
gym.register("Unready-v0", entry_point=Unready, disable_env_checker=True, max_episode_steps=5)
gym.register("Blank-v0", entry_point=Blank, disable_env_checker=True, max_episode_steps=5)
for name, which in {"NanFirst-v0": 1, "NanLater-v0": 30}.items():
    gym.register(name, entry_point=NanReset, disable_env_checker=True, max_episode_steps=5, kwargs={"which": which})
