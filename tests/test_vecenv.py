"""dqn_vecenv.py: what each kind of vector environment feeds to the memory, and what happens when a worker fails."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
import toy_envs
from conftest import ROOT, environment
from test_dqn import assert_memory_holds_what_happened

import dqn_vecenv as dqn

SCRIPT = ROOT / "dqn_vecenv.py"
SHORT = {
    "total_timesteps": 400,
    "learning_starts": 100,
    "train_frequency": 4,
    "batch_size": 16,
    "buffer_size": 10_000,
    "hidden_size": 16,
    "num_envs": 2,
    "eval_every": 200,
    "eval_episodes": 2,
    "final_eval_episodes": 2,
}


class FakePool:
    """EnvPool as its documentation describes it, made of Gymnasium's environments.

    An environment that ended is reset by its next step, whose action it ignores, or before that by reset(env_ids),
    which reads 32-bit numbers. What ends at the very step of the limit is truncated, and never terminated.
    """

    def __init__(self, env_id, num_envs, seed, max_episode_steps):
        self.envs = [gym.make(env_id, max_episode_steps=max_episode_steps) for _ in range(num_envs)]
        self.seeds = [seed + i for i in range(num_envs)]
        self.ended = np.ones(num_envs, bool)

    def reset(self, env_ids=None):
        # All of them come in order; of some, the info tells which is which.
        assert env_ids is None or env_ids.dtype == np.int32
        env_ids = np.arange(len(self.envs)) if env_ids is None else env_ids[::-1]
        return np.stack([self.begin(i) for i in env_ids]), {"env_id": env_ids}

    def begin(self, i):
        seed, self.seeds[i] = self.seeds[i], None
        self.ended[i] = False
        return self.envs[i].reset(seed=seed)[0].copy()

    def send(self, actions):
        self.sent = [
            (self.begin(i), 0.0, False, False) if self.ended[i] else env.step(actions[i])[:4]
            for i, env in enumerate(self.envs)
        ]

    def recv(self):
        obs, rewards, terminated, truncated = (np.stack(column) for column in zip(*self.sent, strict=True))
        self.ended = terminated | truncated
        return obs.astype(np.float32), rewards.astype(np.float32), terminated & ~truncated, truncated, {}


@pytest.fixture
def fake_envpool(monkeypatch):
    """A module `envpool` that is there, and knows the toy environments."""
    fake = SimpleNamespace(
        make_gymnasium=FakePool,
        list_all_envs=lambda: ["CartPole-v1", *(f"toy_envs:{name}" for name in toy_envs.COUNTING)],
    )
    monkeypatch.setitem(sys.modules, "envpool", fake)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: fake if name == "envpool" else find_spec(name, *rest)
    )


@pytest.fixture
def memories(monkeypatch):
    """The replay memories that `train` makes."""
    made = []

    class Kept(dqn.ReplayMemory):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(dqn, "ReplayMemory", Kept)
    return made


# --- What the memory holds ---


@pytest.mark.parametrize("env_id", toy_envs.COUNTING)
@pytest.mark.parametrize("vec_env", ["dummy", "subproc", "envpool"])
def test_memory_holds_exactly_what_happened(vec_env, env_id, memories, fake_envpool, tmp_path):
    changes = {"total_timesteps": 3_000, "learning_starts": 2_900, "num_envs": 3, "eval_every": 10**9}
    args = dqn.Args(env_id=f"toy_envs:{env_id}", vec_env=vec_env, run_dir=str(tmp_path / "run"), **(SHORT | changes))
    result = dqn.train(args)
    assert memories[0].added == result["global_step"] == 3_000
    assert_memory_holds_what_happened(memories[0], env_id, 3)


def test_a_pool_that_resets_late_would_show(memories, fake_envpool, tmp_path, monkeypatch):
    # The power of the test above: left to itself, EnvPool inserts a step that never happened after every episode.
    class Late(dqn.EnvPoolVecEnv):
        def step_wait(self):
            obs, rewards, terminated, truncated, _ = self.pool.recv()
            infos = [{"TimeLimit.truncated": t, "terminal_observation": o} for t, o in zip(truncated, obs, strict=True)]
            return obs, rewards, terminated | truncated, infos

    monkeypatch.setattr(dqn, "EnvPoolVecEnv", Late)
    args = dqn.Args(env_id="toy_envs:Mixed-v0", vec_env="envpool", run_dir=str(tmp_path / "run"), **SHORT)
    dqn.train(args)
    with pytest.raises(AssertionError):
        assert_memory_holds_what_happened(memories[0], "Mixed-v0", 2)


def test_envpool_answers_as_sb3_does(fake_envpool):
    envs = dqn.EnvPoolVecEnv(dqn.Args(env_id="toy_envs:Mixed-v0", vec_env="envpool"))
    expected = dqn.make_envs(dqn.Args(env_id="toy_envs:Mixed-v0", vec_env="dummy"))
    rng, episodes = np.random.default_rng(0), []
    for either in (envs, expected):
        either.seed(5)
        np.testing.assert_array_equal(either.reset()[:, 0], range(5, 5 + envs.num_envs))
    for _ in range(50):
        actions = rng.integers(0, 5, envs.num_envs)
        for either in (envs, expected):
            either.step_async(actions)
        (obs, rewards, dones, infos), (obs2, rewards2, dones2, infos2) = envs.step_wait(), expected.step_wait()
        np.testing.assert_array_equal(obs, obs2)
        np.testing.assert_array_equal(rewards, rewards2)
        np.testing.assert_array_equal(dones, dones2)
        for info, info2 in zip(infos, infos2, strict=True):
            assert info["TimeLimit.truncated"] == info2["TimeLimit.truncated"]
            assert ("episode" in info) == ("episode" in info2)
            if "episode" in info:
                assert [info["episode"][k] for k in "rl"] == [info2["episode"][k] for k in "rl"]
                episodes.append(info["episode"]["l"])
    assert set(episodes) == {3, 4}


def test_the_real_envpool_plays_cartpole_as_gymnasium_does():
    pytest.importorskip("envpool")
    args = dqn.Args(vec_env="envpool", num_envs=6, time_limit=15)
    envs, reference = dqn.EnvPoolVecEnv(args), gym.make("CartPole-v1").unwrapped
    reference.reset()
    envs.seed(1)
    obs, rng, truncations = envs.reset(), np.random.default_rng(0), 0
    for _ in range(500):
        actions = rng.integers(0, 2, 6)
        envs.step_async(actions)
        next_obs, rewards, dones, infos = envs.step_wait()
        for i in range(6):
            reference.state, reference.steps_beyond_terminated = obs[i].astype(float), None
            expected, reward, terminated, *_ = reference.step(int(actions[i]))
            np.testing.assert_allclose(infos[i].get("terminal_observation", next_obs[i]), expected, atol=1e-5)
            assert rewards[i] == reward
            assert infos[i]["TimeLimit.truncated"] == (dones[i] and not terminated)
            assert not terminated or dones[i]
            if dones[i]:
                truncations += not terminated
                assert np.abs(next_obs[i]).max() <= 0.05  # where CartPole begins
        obs = next_obs
    assert truncations > 10


@pytest.mark.parametrize("flags, message", {
    "unknown to it": (["--env-id", "toy_envs:Constant-v0"], "--env-id toy_envs:Constant-v0: is not one of EnvPool's"),
    "window": (["--render"], "--vec-env envpool: its environments have no window"),
}.values())  # fmt: skip
def test_what_envpool_cannot_do_is_refused(flags, message, fake_envpool, cli, tmp_path):
    status, _, err = cli("--vec-env", "envpool", *flags, script="dqn_vecenv.py")
    assert status == 2 and message in " ".join(err.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_a_missing_envpool_is_named(cli, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "envpool" else find_spec(name, *rest)
    )
    status, _, err = cli("--vec-env", "envpool", script="dqn_vecenv.py")
    assert status == 2 and "pip install envpool" in err
    assert list(tmp_path.iterdir()) == []


def test_what_learned_in_envpool_is_played_without_it(fake_envpool, cli, tmp_path, monkeypatch):
    dqn.train(dqn.Args(**SHORT, vec_env="envpool", run_dir=str(tmp_path / "run")))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "envpool" else find_spec(name))
    play = ("--play", tmp_path / "run" / "best.pt", "--render", "--final-eval-episodes", 2)
    status, out, err = cli(*play, script="dqn_vecenv.py")
    assert (status, err) == (0, "") and "over 2 episodes" in out


# --- What the network learns from it ---


@pytest.mark.parametrize("vec_env", ["dummy", "envpool"])
def test_truncation_does_not_end_the_value(vec_env, fake_envpool, tmp_path, monkeypatch):
    sys.modules["envpool"].list_all_envs = lambda: ["toy_envs:Constant-v0"]
    flags = {"gamma": 0.9, "learning_rate": 0.01, "learning_rate_end": 0.01, "tau": 1.0, "target_frequency": 20}
    flags |= {"total_timesteps": 2_000, "learning_starts": 50, "train_frequency": 1, "num_envs": 5}
    flags |= {"eval_every": 10**9, "final_eval_episodes": 1}
    run_dir = tmp_path / "run"
    args = dqn.Args(**{**SHORT, **flags}, env_id="toy_envs:Constant-v0", vec_env=vec_env, run_dir=str(run_dir))
    dqn.train(args)
    env = dqn.make_env(args)
    network = dqn.QNetwork(env.observation_space, env.action_space, args)
    network.load_state_dict(torch.load(run_dir / "last.pt", weights_only=True)["network"])
    assert network(torch.ones(1, 1)).max().item() == pytest.approx(1 / (1 - 0.9), abs=0.5)


def readme_block(first_line):
    return next(
        b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if first_line in b
    )


def test_an_environment_of_ones_own_is_learned(python, tmp_path):
    # The shortest way from a random cell costs 5 on average; an untrained network that goes left for ever, 50.
    run = ("--run-dir", tmp_path / "run", "--num-envs", 2, "--total-timesteps", 6_000, "--exploration-steps", 2_000)
    done = python(SCRIPT, "--env-id", "corridor:Corridor-v0", *run, PYTHONPATH=str(ROOT / "tests"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["final_return_mean"] > -6


def test_the_readme_shows_that_environment():
    shown = readme_block("class Corridor")
    assert shown.strip() in (ROOT / "tests" / "corridor.py").read_text()


# --- Workers that fail ---


def workers_of(pid):
    """The processes that step environments: children of the fork server, or of the run where they are spawned."""
    processes = psutil.Process(pid).children(recursive=True)
    return [
        p for p in processes if p.is_running() and not p.children() and "resource_tracker" not in " ".join(p.cmdline())
    ]


def start(tmp_path, *flags, **env):
    return subprocess.Popen(
        [sys.executable, SCRIPT, "--run-dir", tmp_path / "run", *map(str, flags)],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), "PYTHONPATH": str(ROOT / "tests"), **env},
        start_new_session=True,
    )


def assert_nothing_is_left(processes):
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []


LONG = (
    "--total-timesteps",
    10**7,
    "--eval-every",
    500,
    "--eval-episodes",
    2,
    "--checkpoint-every",
    500,
    "--num-envs",
    3,
)
SPAWN = "import multiprocessing\nmultiprocessing.get_all_start_methods = lambda: ['spawn']\n"


@pytest.fixture(params=["forkserver", "spawn"])
def running(request, tmp_path):
    """A run in its third evaluation or later; with spawn, as on Windows and macOS."""
    (tmp_path / "sitecustomize.py").write_text(SPAWN if request.param == "spawn" else "")
    process = start(tmp_path, *LONG, PYTHONPATH=str(tmp_path))
    lines = (line for line in process.stdout if " eval " in line)
    assert all(next(lines, None) for _ in range(3)), process.stderr.read()
    children = psutil.Process(process.pid).children(recursive=True)
    yield process, children
    for child in [process, *children]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            child.kill()
    process.communicate()


def test_a_killed_worker_ends_the_run(running, tmp_path):
    process, children = running
    workers = workers_of(process.pid)
    assert len(workers) == 3
    workers[1].kill()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "dqn_vecenv: a worker process of the environments died (exit code -9" in err and "--resume" in err
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["counts"]["global_step"] >= 1_000
    assert_nothing_is_left(children)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_all_processes(running, number, tmp_path):
    process, children = running
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: the workers get it too
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "--resume" in err and "Traceback" not in err
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["counts"]["global_step"] >= 1_000
    assert_nothing_is_left(children)


def test_an_error_in_a_worker_ends_the_run_with_its_message(tmp_path):
    process = start(tmp_path, "--env-id", "toy_envs:Raising-v0", *LONG, "--learning-starts", 20)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ZeroDivisionError: the toy broke" in err and "died (exit code 1" in err
    assert (tmp_path / "run" / "last.pt").exists()
    assert_nothing_is_left(
        [p for p in psutil.process_iter() if p.status() != "zombie" and str(tmp_path) in " ".join(p.cmdline())]
    )


# --- What must not depend on the number of environments ---


@pytest.mark.parametrize("num_envs", [1, 3, 8])
def test_gradient_steps_are_counted_in_transitions(num_envs, tmp_path):
    changes = {"num_envs": num_envs, "eval_every": 10**9, "target_frequency": 10}
    result = dqn.train(dqn.Args(**(SHORT | changes), vec_env="dummy", run_dir=str(tmp_path / "run")))
    assert result["gradient_steps"] == (result["global_step"] - 100) // 4
    assert result["target_syncs"] == result["gradient_steps"] * 4 // 10


def test_exploration_is_drawn_for_each_environment(memories, tmp_path, monkeypatch):
    monkeypatch.setattr(dqn.QNetwork, "forward", lambda self, obs: torch.eye(5)[0].expand(len(obs), 5))
    changes = {"epsilon_start": 0.5, "epsilon_end": 0.5, "num_envs": 8, "eval_every": 10**9}
    changes |= {"total_timesteps": 3_200, "learning_starts": 3_199, "env_id": "toy_envs:Mixed-v0"}
    dqn.train(dqn.Args(**(SHORT | changes), vec_env="dummy", run_dir=str(tmp_path / "run")))
    actions = memories[0].columns.actions[:3_200].reshape(400, 8)
    # Action 0 is greedy, and one of five random ones: 0.6 of all actions, and all eight in 0.6 ** 8 = 0.017 of the
    # steps. With one draw for the whole step that would be half of them.
    assert np.mean(actions == 0) == pytest.approx(0.6, abs=0.04)
    assert np.mean((actions == 0).all(axis=1)) < 0.06
