"""The replay memory against a naive one that keeps whole stacks."""

import io

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv

import dqn_atari
from dqn_atari import ReplayMemory, push_frames

CPU = torch.device("cpu")
GAMMA = 0.5  # sums of rewards with it are exact


class Naive:
    """Per environment, every observation ever stored as a whole stack, with its transition where one followed."""

    def __init__(self, num_envs):
        self.rows = [[] for _ in range(num_envs)]  # [stack, transition or None]

    def observe(self, env, stack):
        self.rows[env].append([stack.copy(), None])

    def valid(self, slots, n_step):
        """What a ring of `slots` must still be able to draw: all with an action, but for the oldest three.

        Each with the transitions that follow in its episode, n_step in all, as far as they have happened.
        """
        for rows in self.rows:
            oldest = max(0, len(rows) - slots + 3)
            for first in range(oldest, len(rows)):
                if rows[first][1] is None:
                    continue
                followers = [transition for _, transition in rows[first : first + n_step]]
                chain = followers[: followers.index(None)] if None in followers else followers
                obs, action, *_ = chain[0]
                *_, next_obs, terminated = chain[-1]
                reward = sum(GAMMA**k * transition[2] for k, transition in enumerate(chain))
                yield key(obs, action, reward, next_obs, terminated, GAMMA ** len(chain))


def key(obs, action, reward, next_obs, terminated, discount):
    return obs.tobytes(), int(action), float(reward), next_obs.tobytes(), bool(terminated), float(discount)


class Run:
    """Random frames, episode ends, life losses and truncations into a ReplayMemory and a Naive."""

    def __init__(self, num_envs, buffer_size, seed, end_rate=0.2):
        self.n, self.end_rate = num_envs, end_rate
        self.rng = np.random.default_rng(seed)
        self.memory, self.naive = ReplayMemory(buffer_size, num_envs), Naive(num_envs)
        self.begin()

    def frames(self):
        # Never zero where padding could hide: each frame is one random non-zero byte pattern.
        return self.rng.integers(1, 256, (self.n, 84, 84), dtype=np.uint8)

    def begin(self):
        frames = self.frames()
        self.stacks = np.zeros((self.n, 4, 84, 84), np.uint8)
        push_frames(self.stacks, frames, np.ones(self.n, bool))
        self.memory.begin(frames)
        for env in range(self.n):
            self.naive.observe(env, self.stacks[env])

    def step(self):
        rng, n = self.rng, self.n
        actions, rewards = rng.integers(18, size=n), rng.choice([-1.0, 0.0, 1.0, 2.5], n)
        ended = rng.random(n) < self.end_rate
        terminated = ended & (rng.random(n) < 0.6)  # the others are truncated
        last, first = self.frames(), self.frames()
        first[~ended] = last[~ended]
        before = self.stacks.copy()
        next_stacks = self.stacks.copy()
        push_frames(next_stacks, last, np.zeros(n, bool))
        push_frames(self.stacks, first, ended)
        for env in range(n):
            row = self.naive.rows[env]
            row[-1][1] = (before[env], actions[env], rewards[env], next_stacks[env], terminated[env])
            self.naive.observe(env, next_stacks[env])
            if ended[env]:
                self.naive.observe(env, self.stacks[env])
        self.memory.add(actions, rewards, last, terminated, ended, first)

    def expected(self, n_step):
        return list(self.naive.valid(self.memory.capacity // self.n, n_step))


def num_drawable(memory):
    return int(memory.arrays["drawable"].sum())


def drawn(memory, batch_size, seed=0, n_step=1):
    torch.manual_seed(seed)
    batch = memory.sample(batch_size, n_step, GAMMA, CPU)
    return [key(*row) for row in zip(*(column.numpy() for column in batch), strict=True)]


def check(run, n_step=1):
    expected = run.expected(n_step)
    assert num_drawable(run.memory) == len(expected)
    # 12 draws per transition leave one out with probability e^-12 each.
    assert set(drawn(run.memory, 12 * len(expected) + 64, n_step=n_step)) == set(expected)


@pytest.mark.parametrize("num_envs, buffer_size", [(1, 1), (1, 7), (1, 23), (2, 20), (3, 31), (5, 17), (8, 64)])
@pytest.mark.parametrize("end_rate", [0.0, 0.15, 0.6, 1.0])
def test_equals_a_memory_of_whole_stacks(num_envs, buffer_size, end_rate):
    run = Run(num_envs, buffer_size, seed=buffer_size, end_rate=end_rate)
    slots = run.memory.capacity // num_envs
    for step in range(2 * slots + 5):  # more than two turns of the ring
        run.step()
        if step < 4 or step % 3 == 0:
            check(run)


@pytest.mark.parametrize("num_envs, buffer_size", [(1, 23), (3, 31)])
@pytest.mark.parametrize("end_rate", [0.0, 0.15, 0.6])
@pytest.mark.parametrize("n_step", [2, 3, 7])
def test_n_step_equals_a_memory_of_whole_stacks(n_step, num_envs, buffer_size, end_rate):
    run = Run(num_envs, buffer_size, seed=n_step, end_rate=end_rate)
    for step in range(2 * run.memory.capacity // num_envs + 5):
        run.step()
        if step < 4 or step % 4 == 0:
            check(run, n_step)


def test_next_obs_of_an_ended_episode_is_its_last_observation():
    memory = ReplayMemory(10, 1)
    frame = {name: np.full((1, 84, 84), value, np.uint8) for value, name in enumerate(["first", "last", "reset"], 1)}
    memory.begin(frame["first"])
    memory.add([2], [1.0], frame["last"], np.array([False]), np.array([True]), frame["reset"])
    obs, actions, rewards, next_obs, terminated, _ = memory.sample(3, 1, GAMMA, CPU)
    assert obs[:, :, 0, 0].tolist() == [[0, 0, 0, 1]] * 3
    assert next_obs[:, :, 0, 0].tolist() == [[0, 0, 1, 2]] * 3
    assert (actions.tolist(), rewards.tolist(), terminated.tolist()) == ([2] * 3, [1.0] * 3, [0.0] * 3)


def test_types_and_shapes():
    run = Run(3, 30, seed=0)
    run.step()
    obs, actions, rewards, next_obs, terminated, discounts = run.memory.sample(32, 3, GAMMA, CPU)
    assert obs.shape == next_obs.shape == (32, 4, 84, 84) and obs.dtype == next_obs.dtype == torch.uint8
    for stacks in (obs, next_obs):  # the convolutions' layout: else each would rearrange them, as floats
        assert stacks.is_contiguous(memory_format=torch.channels_last)
    assert actions.shape == rewards.shape == terminated.shape == discounts.shape == (32,)
    assert actions.dtype == torch.int64
    assert {rewards.dtype, terminated.dtype, discounts.dtype} == {torch.float32}


def test_draws_are_uniform_and_repeatable():
    run = Run(2, 20, seed=1)
    for _ in range(40):
        run.step()
    assert drawn(run.memory, 50) == drawn(run.memory, 50) != drawn(run.memory, 50, seed=1)
    draws = [hash(row) for row in drawn(run.memory, 4000)]
    counts = np.unique(draws, return_counts=True)[1]
    expected = 4000 / num_drawable(run.memory)
    assert len(counts) == num_drawable(run.memory)
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected)


def test_batches_do_not_share_memory_with_the_ring():
    run = Run(2, 20, seed=2)
    run.step()
    obs = run.memory.sample(4, 1, GAMMA, CPU)[0]
    kept = obs.clone()
    run.memory.arrays["frames"][:] = 0
    assert torch.equal(obs, kept)


@pytest.mark.parametrize("num_envs", [1, 4, 7])
def test_it_holds_buffer_size_transitions(num_envs):
    run = Run(num_envs, 100, seed=0, end_rate=0.0)
    for _ in range(250):
        run.step()
    assert 100 <= num_drawable(run.memory) <= 100 + 2 * num_envs


def test_a_million_transitions_need_7_gigabytes():
    arrays = ReplayMemory(1_000_000, 8).arrays.values()  # the pages are never touched
    assert 7.05e9 < sum(array.nbytes for array in arrays) < 7.07e9


@pytest.mark.parametrize("num_envs, buffer_size", [(2, 30), (3, 60), (3, 15)])
def test_the_state_of_another_memory_is_refused(num_envs, buffer_size):
    """Of a smaller one, too: full, it goes on at its first slot, and not behind its last."""
    run = Run(num_envs, buffer_size, seed=3)
    for _ in range(60):
        run.step()
    with pytest.raises(ValueError, match="another --buffer-size or --num-envs; --no-checkpoint-memory leaves it out"):
        ReplayMemory(30, 3).load_state_dict(run.memory.state_dict())


@pytest.mark.parametrize("num_steps", [0, 1, 6, 60])  # unwritten, part full, wrapped
def test_state_dict(num_steps):
    run = Run(3, 40, seed=3)
    for _ in range(num_steps):
        run.step()
    file = io.BytesIO()
    torch.save(run.memory.state_dict(), file)
    assert len(file.getvalue()) < run.memory.filled * (84 * 84 + 16) + 10_000  # only what is filled
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = Run(3, 40, seed=4)
    for _ in range(50):
        other.step()  # stale contents must not survive
    other.memory.load_state_dict(state)
    if num_steps:
        assert drawn(other.memory, 200) == drawn(run.memory, 200)
    run.memory = other.memory
    run.begin()  # a resumed run starts new episodes
    for _ in range(30):
        run.step()
        check(run)
        check(run, 3)


# --- What the training loop feeds to it ---


class Numbered(gym.Env):
    """Frames that are all 10 * episode + step; episodes of 3 steps that terminate and run out of time in turn."""

    observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)
    action_space = gym.spaces.Discrete(4)
    episode = 0

    def reset(self, *, seed=None, options=None):
        self.episode, self.steps = self.episode + 1, 0
        return self.frame(), {}

    def step(self, action):
        self.steps += 1
        ended, even = self.steps == 3, self.episode % 2 == 0
        return self.frame(), 0.0, ended and even, ended and not even, {}

    def frame(self):
        return np.full((84, 84), 10 * self.episode + self.steps, np.uint8)


def test_training_stores_the_last_frame_of_an_episode_too(tmp_path, monkeypatch):
    memories = []

    class Kept(ReplayMemory):
        def __init__(self, *args):
            super().__init__(*args)
            memories.append(self)

    monkeypatch.setattr(dqn_atari, "ReplayMemory", Kept)
    monkeypatch.setattr(dqn_atari, "make_envs", lambda args: DummyVecEnv([Numbered] * args.num_envs))
    quick = {"total_timesteps": 48, "learning_starts": 47, "time_limit": 2, "final_eval_episodes": 1}
    dqn_atari.train(dqn_atari.Args(**quick, num_envs=2, buffer_size=200, run_dir=str(tmp_path / "run")))
    arrays = {name: array[:66].reshape(33, 2, -1) for name, array in memories[0].arrays.items()}
    expected = [10 * episode + step for episode in range(1, 9) for step in range(4)] + [90]  # 24 steps
    assert arrays["frames"][:, 0, 0].tolist() == arrays["frames"][:, 1, 0].tolist() == expected
    assert np.flatnonzero(arrays["terminated"][:, 0, 0]).tolist() == [6, 14, 22, 30]  # step 2 of episodes 2, 4, 6, 8
    assert np.flatnonzero(arrays["starts"][:, 0, 0]).tolist() == list(range(0, 33, 4))
