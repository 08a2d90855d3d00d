"""Environments small enough to know everything about; ids such as toy_envs:Mixed-v0."""

import multiprocessing
import os
import random
import subprocess
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.classic_control import CartPoleEnv


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


class Squares(gym.Env):
    """A bright square, left or right: the action of its side pays 7, the other -1. 8 steps, or without end."""

    action_space = gym.spaces.Discrete(2, start=1)

    def __init__(self, num_steps=8, shape=(84, 84), dtype=np.uint8, render_mode=None):
        self.observation_space = gym.spaces.Box(0, 255, shape, dtype)
        self.num_steps, self.render_mode, self.info = num_steps, render_mode, {"episode": "of its own"}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.frame = 0, np.zeros(self.observation_space.shape, self.observation_space.dtype)
        return self.draw(), self.info

    def step(self, action):
        assert isinstance(action, np.integer) and action in self.action_space
        reward, self.steps = 7 if action == 1 + self.right else -1, self.steps + 1
        return self.draw(), reward, self.steps == self.num_steps, False, self.info

    def draw(self):  # always into the same array
        self.right = int(self.np_random.integers(2))
        self.frame[:] = 0
        self.frame[20:60, 42 * self.right : 42 * self.right + 40] = 200
        return self.frame


class Target(gym.Env):
    """Two numbers in [-1, 1] are to be hit: the reward is minus the squared distance. One step, whatever was done."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-0.8, 0.8, 1).astype(np.float32)
        return self.state, {}

    def step(self, action):
        assert action in self.action_space and action.dtype == np.float32, action
        return self.state, -float(((action - [self.state[0], 0.5]) ** 2).sum()), True, False, {}


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
    def __init__(self, shape=(40, 40, 3), dtype=np.uint8, render_mode=None):
        super().__init__(render_mode)
        self.observation_space = gym.spaces.Box(0, 255, shape, dtype)


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


class Blank(Constant):
    """Says that it can draw itself, and draws nothing."""

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 30}

    def render(self):
        return None


# --- As users write them, with one trait each ---


class Walk(gym.Env):
    """Starts at 0; action 1 goes an eighth to the right, 0 to the left; each step earns 1. Six steps terminate it."""

    observation_space = gym.spaces.Box(-10, 10, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.steps = 0.0, 0
        return self.first(), {}

    def first(self):
        return np.array([self.x], np.float32)

    def see(self):
        return np.array([self.x], np.float32)

    def step(self, action):
        self.x += 0.125 if action == 1 else -0.125
        self.steps += 1
        return self.see(), 1.0, self.steps == 6, False, {}


class Forms(Walk):
    """Its observations come in another form at each reset and each step."""

    first_forms = (lambda x: np.array([x], np.int64), lambda x: np.array([[x]], np.int64), int, lambda x: [int(x)])
    forms = (lambda x: np.array([[x]]), np.float32, lambda x: [x], float)
    episode = -1

    def first(self):
        self.episode += 1
        return self.first_forms[self.episode % len(self.first_forms)](self.x)

    def see(self):
        return self.forms[self.steps % len(self.forms)](self.x)


class Fractions(Walk):
    """Its space holds bytes, and its observations are fractions."""

    observation_space = gym.spaces.Box(0, 255, (1,), np.uint8)


class OneInfo(Walk):
    """Has one info dict for its whole life, emptied in reset, with entries whose names are taken."""

    def __init__(self):
        self.info = {}

    def reset(self, *, seed=None, options=None):
        self.info.clear()
        return super().reset(seed=seed)[0], self.info

    def step(self, action):
        self.info |= {"episode": 7.0, "TimeLimit.truncated": True}
        return *super().step(action)[:4], self.info


def with_statistics():
    return gym.wrappers.RecordEpisodeStatistics(Walk())


class GlobalRandom(Walk):
    """Draws from random, np.random and torch."""

    observation_space = gym.spaces.Box(0, 1, (3,), np.float32)

    def first(self):
        return self.see()

    def see(self):
        return np.array([random.random(), np.random.rand(), torch.rand(()).item()], np.float32)


class Samples(Walk):
    """Draws from its own spaces, whose generators reset(seed=seed) does not touch."""

    def __init__(self):
        self.observation_space = gym.spaces.Box(0, 1, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(1_000)

    def first(self):
        return self.observation_space.sample()

    def see(self):
        return self.observation_space.sample() * np.float32([1, 0]) + np.float32(
            [0, self.action_space.sample() / 1_000]
        )


class IntSeed(Walk):
    """Hands its seed to something that takes a C int; `seeds` holds those that came."""

    seeds: ClassVar[list] = []

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.seeds.append(int(np.int32(seed)))
        return super().reset(seed=seed)


class Counted(Walk):
    """Counts how many of it there are, and how many there were at most."""

    alive = most = 0

    def __init__(self):
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def close(self):
        Counted.alive -= 1


class Item(Walk):
    """Written for what action_space.sample() gives."""

    def step(self, action):
        return super().step(action.item())


class StartsAtOne(Walk):
    action_space = gym.spaces.Discrete(2, start=1)

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(action - 1)


class Aliases(Walk):
    """A board and a flat view of it, a list that two names share, and a list that holds itself."""

    observation_space = gym.spaces.Box(0, 20, (2,), np.float32)

    def __init__(self):
        self.board = np.zeros((3, 3), np.float32)
        self.cells = self.board.reshape(-1)  # the same memory
        self.body = [[0], [0]]
        self.head = self.body[-1]  # the same list
        self.ring = []
        self.ring.append(self.ring)

    def first(self):
        self.board[:] = self.head[0] = 0
        return self.see()

    def see(self):
        self.cells[self.steps] += 1
        self.head[0] += 1
        assert self.board.sum() == self.body[-1][0] == self.steps + 1, "the views have come apart"
        return np.array([self.board.sum(), self.body[-1][0]], np.float32)


class Table(Walk):
    """Holds 4 MB of data."""

    def __init__(self):
        self.table = np.random.default_rng(0).normal(size=500_000)


class Mixture(Walk):
    """Observations of several kinds in one; `shown` is the last one."""

    observation_space = gym.spaces.Dict(
        {
            "buttons": gym.spaces.MultiBinary(3),
            "cards": gym.spaces.MultiDiscrete([2, 3]),
            "pair": gym.spaces.Tuple((gym.spaces.Discrete(3), gym.spaces.Box(0, 1, (2, 2), np.float32))),
        }
    )

    def first(self):
        return self.see()

    def see(self):
        self.shown = self.observation_space.sample()
        return self.shown


class Matrix(Walk):
    observation_space = gym.spaces.Box(0, 1, (2, 3), np.float64)

    def first(self):
        return self.see()

    def see(self):
        self.shown = self.np_random.random((2, 3))
        return self.shown


class Board(Matrix):
    observation_space = gym.spaces.Box(0, 255, (7, 7, 3), np.uint8)  # a grid of MiniGrid, small for a picture

    def see(self):
        self.shown = self.np_random.integers(0, 255, (7, 7, 3), np.uint8)
        return self.shown


class Positions(CartPoleEnv):
    """CartPole that shows two of its four numbers."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode=render_mode)
        self.observation_space = gym.spaces.Box(-10, 10, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return obs[[0, 2]], info

    def step(self, action):
        obs, *rest = super().step(action)
        return obs[[0, 2]], *rest


class BrokenInit(Walk):
    """Has an error in what its __init__ calls."""

    def __init__(self):
        self.limits = self.read(None)

    def read(self, table):
        return table["limits"]


class Raises(Walk):
    """Raises this error at its 60th step."""

    count = 0

    def __init__(self, error):
        self.error = error

    def step(self, action):
        self.count += 1
        if self.count == 60:
            raise self.error
        return super().step(action)


class Huge(Walk):
    """Gives rewards whose squares are too large for float32."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward * 1e30, *rest


class Signals(Walk):
    """Sends the signals $TOY_SIGNALS to its main process and all of that one's group, as a terminal does.

    It does so at its 150th step, if its seed is even: one of two environments in a row.
    """

    count = 0

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.even = seed % 2 == 0
        return super().reset(seed=seed)

    def step(self, action):
        self.count += 1
        if self.even and self.count == 150:
            in_worker = multiprocessing.parent_process() is not None  # the fork server stays in the group
            for number in os.environ["TOY_SIGNALS"].split():
                os.killpg(os.getpgid(os.getppid() if in_worker else 0), int(number))
        return super().step(action)


class Simulator(Signals):
    """Starts a process of its own, out of reach of a terminal, and ends it when it is closed."""

    def __init__(self):
        self.process = subprocess.Popen(["sleep", "1000"], start_new_session=True)

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=60)


class LongFilm(Walk):
    """Draws a small picture in each of its 1,600 steps."""

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array", "human"], "render_fps": 30}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, self.steps == 1_600, truncated, info

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)


class Pictures(LongFilm):
    """Gives pictures and has no window of its own."""

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 30}


class ForgetsMode(Walk):
    """Draws, but does not keep the render_mode that it takes, which RecordVideo asks for."""

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode=None):
        super().__init__()

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)


class FixedMode(Walk):
    """Always draws, and takes no render_mode."""

    render_mode = "rgb_array"

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)


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
gym.register("Raising-v0", entry_point=Raising, disable_env_checker=True, max_episode_steps=5)
gym.register("NotANumber-v0", entry_point=NotANumber, disable_env_checker=True, max_episode_steps=5)
gym.register("Space/Constant-v0", entry_point=Constant, disable_env_checker=True, max_episode_steps=20)
gym.register("Image-v0", entry_point=Image, disable_env_checker=True, max_episode_steps=5)
gym.register("Blank-v0", entry_point=Blank, disable_env_checker=True, max_episode_steps=5)
for name, which in {"NanFirst-v0": 1, "NanLater-v0": 30}.items():
    gym.register(name, entry_point=NanReset, disable_env_checker=True, max_episode_steps=5, kwargs={"which": which})
for entry_point in (
    *(Walk, Forms, Fractions, OneInfo, GlobalRandom, Samples, IntSeed, Counted, Item, StartsAtOne, Aliases),
    *(Table, Mixture, Matrix, Board, Positions, BrokenInit, Huge, Signals, Simulator, LongFilm, Pictures, FixedMode),
    ForgetsMode,
):
    gym.register(f"{entry_point.__name__}-v0", entry_point=entry_point)
gym.register("WithStatistics-v0", entry_point=with_statistics)
gym.register("Target-v0", entry_point=Target, disable_env_checker=True)
gym.register("Squares-v0", entry_point=Squares, disable_env_checker=True)
gym.register("EndlessSquares-v0", entry_point=Squares, disable_env_checker=True, kwargs={"num_steps": 10**9})
gym.register("FloatSquares-v0", entry_point=Squares, kwargs={"dtype": np.float32})
gym.register("Grey-v0", entry_point=Image, kwargs={"shape": (84, 84)})
gym.register("FloatImage-v0", entry_point=Image, kwargs={"dtype": np.float32})
for error in (RuntimeError("no slot could be allocated"), FloatingPointError("a division"), ValueError("my own")):
    gym.register(f"{type(error).__name__}-v0", entry_point=Raises, kwargs={"error": error})
