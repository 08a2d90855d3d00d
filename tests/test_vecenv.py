"""dqn_vecenv.py: what each kind of vector environment feeds to the memory, and what happens when a worker fails."""

import contextlib
import dataclasses
import importlib.util
import itertools
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import ClassVar

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
import toy_envs
from conftest import ROOT, checkpoint_of, count_updates, environment, small, train, words
from stable_baselines3.common.vec_env import DummyVecEnv
from test_dqn import assert_memory_holds_what_happened, learned_value

import dqn_cartpole
import dqn_vecenv as dqn

ENVPOOL = [
    *("CartPole-v1", "FrozenLake-v1", "toy_envs:Constant-v0"),
    *(f"toy_envs:{name}" for name in toy_envs.COUNTING),
]


class FakePool:
    """EnvPool as its documentation describes it, made of Gymnasium's environments.

    An environment that ended is reset by its next step, whose action it ignores, or before that by reset(env_ids),
    which reads 32-bit numbers. What ends at the very step of the limit is truncated, and never terminated. What it
    returned may not be written to, and is overwritten by the next step.
    """

    def __init__(self, env_id, num_envs, seed, max_episode_steps):
        self.envs = [gym.make(env_id, max_episode_steps=max_episode_steps) for _ in range(num_envs)]
        self.seeds = [seed + i for i in range(num_envs)]
        self.ended = np.ones(num_envs, bool)
        self.obs = np.zeros((num_envs, *self.envs[0].observation_space.shape), np.float32)

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
        self.obs.flags.writeable = True
        self.obs[:] = obs
        self.obs.flags.writeable = False
        return self.obs, rewards.astype(np.float32), terminated & ~truncated, truncated, {}


@pytest.fixture
def fake_envpool(monkeypatch):
    """A module `envpool` that is there, and knows the toy environments."""
    fake = SimpleNamespace(make_gymnasium=FakePool, list_all_envs=lambda: ENVPOOL)
    monkeypatch.setitem(sys.modules, "envpool", fake)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: fake if name == "envpool" else find_spec(name, *rest)
    )


class FakeRay:
    """Ray as its documentation describes it, on this machine: what an actor is sent or returns is a copy."""

    class Actor:
        def __init__(self, made):
            self.made = made

        def __getattr__(self, name):
            FakeRay.called.append(name)

            def call(*args):
                return pickle.loads(pickle.dumps(getattr(self.made, name)(*pickle.loads(pickle.dumps(args)))))

            return SimpleNamespace(remote=call)

    called: ClassVar[list] = []
    numbers: ClassVar[list] = []  # of the workers made

    def init(self, address, runtime_env, log_to_driver, ignore_reinit_error):
        if address.endswith(":1"):
            raise ConnectionError("nobody there")
        if ":" not in address and address != "local":
            raise ValueError("no port")
        self.address, self.runtime_env = address, runtime_env
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray does

    def remote(self, scheduling_strategy):
        assert scheduling_strategy == "SPREAD"
        return lambda kind: SimpleNamespace(remote=lambda *args: self.Actor(kind(*pickle.loads(pickle.dumps(args)))))

    def get(self, results):
        return list(results)

    def wait(self, results, num_returns):
        assert len(results) == num_returns


@pytest.fixture
def fake_ray(monkeypatch):
    fake, find_spec = FakeRay(), importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(dqn, "make_worker_env", toy_worker)  # without the signals and process groups of a worker
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: fake if name == "ray" else find_spec(name, *rest)
    )
    return fake


def toy_worker(args, index):
    FakeRay.numbers.append(index)
    return dqn.make_env(args)


@pytest.fixture
def no_envpool(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in ("envpool", "ray") else find_spec(name, *rest)
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


@pytest.fixture
def run(tmp_path):
    """Train for a moment, without an evaluation on the way; return the result."""
    return lambda **changes: train("dqn_vecenv", tmp_path / "run", **{"eval_every": 10**9, **changes})


# --- What the memory holds ---


@pytest.mark.parametrize("vec_env, env_id", [
    *itertools.product(("envpool", "ray"), toy_envs.COUNTING), ("dummy", "Mixed-v0"), ("subproc", "Mixed-v0"),
])  # fmt: skip
def test_memory_holds_exactly_what_happened(vec_env, env_id, run, memories, fake_envpool, fake_ray):
    flags = {"total_timesteps": 600, "learning_starts": 500, "num_envs": 3}
    result = run(env_id=f"toy_envs:{env_id}", vec_env=vec_env, **flags)
    assert memories[0].added == result["global_step"] == 600
    assert_memory_holds_what_happened(memories[0], env_id, 3)


@pytest.mark.parametrize("limit, lengths", [(None, {3, 4}), (2, {2}), (-1, {3, 4, 5})])
@pytest.mark.parametrize("backend", [dqn.EnvPoolVecEnv, dqn.RayVecEnv])
def test_it_answers_as_sb3_does(backend, limit, lengths, fake_envpool, fake_ray):
    flags = {"env_id": "toy_envs:Mixed-v0", "num_envs": 16, "time_limit": limit}
    envs, expected = backend(dqn.Args(**flags)), dqn.make_envs(dqn.Args(**flags, vec_env="dummy"))
    assert (envs.observation_space, envs.action_space) == (expected.observation_space, expected.action_space)
    rng, episodes = np.random.default_rng(0), []
    for either in (envs, expected):
        either.seed(5)
        np.testing.assert_array_equal(either.reset()[:, 0], range(5, 21))
    for _ in range(50):
        actions = rng.integers(0, 5, 16).tolist()
        for either in (envs, expected):
            either.step_async(actions)
        (obs, rewards, dones, infos), (obs2, rewards2, dones2, infos2) = envs.step_wait(), expected.step_wait()
        assert obs.dtype == obs2.dtype
        np.testing.assert_array_equal(obs, obs2)
        np.testing.assert_array_equal(rewards, rewards2)
        np.testing.assert_array_equal(dones, dones2)
        for info, info2 in zip(infos, infos2, strict=True):
            assert info.keys() == info2.keys()
            assert info["TimeLimit.truncated"] == info2["TimeLimit.truncated"]
            if "episode" in info:
                np.testing.assert_array_equal(info["terminal_observation"], info2["terminal_observation"])
                assert [info["episode"][k] for k in "rl"] == [info2["episode"][k] for k in "rl"]
                episodes.append(info["episode"]["l"])
    assert set(episodes) == lengths


def test_actors_of_ray_end_with_the_run_and_get_the_folder_only_on_a_cluster(run, fake_ray, monkeypatch):
    run(vec_env="ray", num_envs=3)
    assert fake_ray.called[-3:] == ["close"] * 3
    assert (fake_ray.address, fake_ray.runtime_env) == ("local", {})
    fake_ray.numbers.clear()
    envs = dqn.RayVecEnv(dqn.Args(vec_env="ray", num_envs=3))
    assert fake_ray.numbers == [0, 1, 2]  # each draws its own random numbers
    actors = [weakref.ref(actor) for actor in envs.actors]
    envs.close()
    assert [actor() for actor in actors] == [None] * 3  # nobody refers to them
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.7:6379")
    dqn.RayVecEnv(dqn.Args(vec_env="ray"))
    assert fake_ray.address == "192.0.2.7:6379"
    assert fake_ray.runtime_env["working_dir"] == sys.path[0] and "runs" in fake_ray.runtime_env["excludes"]
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.7:1")
    with pytest.raises(dqn.UsageError, match="nobody there"):
        dqn.RayVecEnv(dqn.Args(vec_env="ray"))
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.7")
    with pytest.raises(dqn.UsageError, match=r"RAY_ADDRESS 192\.0\.2\.7: no port"):
        dqn.RayVecEnv(dqn.Args(vec_env="ray"))


def test_an_actor_that_fails_does_so_before_there_is_a_run_directory(run, fake_ray, tmp_path, monkeypatch):
    def fails(self, seed):
        raise OSError("this node cannot make it")

    monkeypatch.setattr(DummyVecEnv, "seed", fails)
    with pytest.raises(OSError, match="this node"):
        run(vec_env="ray")
    assert list(tmp_path.iterdir()) == []


def test_environments_on_ray_can_be_made_in_a_thread(fake_ray):
    with ThreadPoolExecutor(1) as pool:  # where Python sets no signal handler; Ray does not try either
        fake_ray.init = lambda *_, **__: None
        assert pool.submit(dqn.RayVecEnv, dqn.Args(vec_env="ray")).result().reset().shape == (8, 4)


def test_ray_leaves_the_handler_that_saves_the_run(fake_ray, monkeypatch):
    before = signal.signal(signal.SIGTERM, saves := lambda *_: None)
    try:
        dqn.RayVecEnv(dqn.Args(vec_env="ray"))
        assert signal.getsignal(signal.SIGTERM) is saves
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_real_ray_plays_as_sb3_does_and_a_dead_actor_ends_the_run(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    envs, expected = (dqn.Args(env_id="toy_envs:Mixed-v0", num_envs=3, vec_env=v) for v in ("ray", "dummy"))
    envs, expected = dqn.RayVecEnv(envs), dqn.make_envs(expected)
    envs.seed(5), expected.seed(5)
    np.testing.assert_array_equal(envs.reset(), expected.reset())
    for _ in range(20):
        envs.step_async([1, 2, 3]), expected.step_async([1, 2, 3])
        for ours, theirs in zip(envs.step_wait()[:3], expected.step_wait()[:3], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    ray.kill(envs.actors[1])
    with pytest.raises(ray.exceptions.RayActorError, match=r"dead|died"):
        for _ in range(10_000):  # it is killed a moment later
            envs.step_async([1, 2, 3])
            envs.step_wait()
    envs.close()
    ray.shutdown()


def test_the_real_envpool_plays_cartpole_as_gymnasium_does():
    pytest.importorskip("envpool")
    args = dqn.Args(vec_env="envpool", num_envs=6, time_limit=15)
    envs, reference = dqn.EnvPoolVecEnv(args), gym.make("CartPole-v1").unwrapped
    reference.reset()
    envs.seed(1)
    obs, rng, truncations = envs.reset(), np.random.default_rng(0), 0
    for _ in range(500):
        actions = rng.integers(0, 2, 6).tolist()
        envs.step_async(actions)
        next_obs, rewards, dones, infos = envs.step_wait()
        for i in range(6):
            reference.state, reference.steps_beyond_terminated = obs[i].astype(float), None
            expected, reward, terminated, *_ = reference.step(actions[i])
            np.testing.assert_allclose(infos[i].get("terminal_observation", next_obs[i]), expected, atol=1e-5)
            assert rewards[i] == reward
            assert infos[i]["TimeLimit.truncated"] == (dones[i] and not terminated)
            assert not terminated or dones[i]
            if dones[i]:
                truncations += not terminated
                assert np.abs(next_obs[i]).max() <= 0.05  # where CartPole begins
        obs = next_obs
    assert truncations > 10


@pytest.mark.parametrize("env_id, message", [
    ("Acrobot-v1", "EnvPool has none"),
    ("FrozenLake-v1", "EnvPool's observations"),  # numbers where the networks read vectors
])  # fmt: skip
def test_what_envpool_cannot_play_is_refused(env_id, message, fake_envpool, cli, tmp_path):
    status, _, err = cli("--vec-env", "envpool", "--env-id", env_id, script="dqn_vecenv.py")
    assert status == 2 and f"--env-id {env_id}: {message}" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["envpool", "ray"])
def test_a_missing_package_is_named(name, no_envpool, cli, tmp_path):
    status, _, err = cli("--vec-env", name, script="dqn_vecenv.py")
    assert status == 2 and f"pip install {name}" in err
    assert list(tmp_path.iterdir()) == []


def test_what_learned_in_envpool_is_played_without_it(run, fake_envpool, cli, tmp_path, request):
    run(vec_env="envpool", eval_every=200)
    request.getfixturevalue("no_envpool")
    play = ("--play", tmp_path / "run" / "best.pt", "--final-eval-episodes", 2)
    status, out, err = cli(*play, script="dqn_vecenv.py")
    assert (status, err) == (0, "") and "over 2 episodes" in out


# --- What the network learns from it ---


def test_truncation_does_not_end_the_value(fake_envpool, tmp_path):
    assert learned_value("dqn_vecenv", tmp_path / "run", vec_env="envpool") == pytest.approx(10, abs=0.5)


def test_an_environment_of_ones_own_is_learned(run):
    # The shortest way from a random cell costs 5 on average; an untrained network that goes left for ever, 50.
    flags = {"total_timesteps": 4_000, "exploration_steps": 2_000, "batch_size": 64, "final_eval_episodes": 100}
    assert run(env_id="corridor:Corridor-v0", vec_env="dummy", **flags)["final_return_mean"] > -6


def test_the_readme_shows_that_environment():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (shown,) = (block for block in blocks if "class Corridor" in block)
    assert shown.strip() in (ROOT / "docs" / "examples" / "corridor.py").read_text()


def test_it_learns_the_same_as_dqn_cartpole_to_the_bit(tmp_path):
    train("dqn_cartpole", tmp_path / "one", vec_env="dummy")
    train("dqn_vecenv", tmp_path / "many", vec_env="subproc")
    one, many = (checkpoint_of(tmp_path / name) for name in ("one", "many"))
    assert one["counts"] == many["counts"] and one["record"]["returns"] == many["record"]["returns"]
    assert all(torch.equal(one["network"][name], many["network"][name]) for name in one["network"])
    defaults = [dataclasses.asdict(script.Args()) | {"vec_env": ""} for script in (dqn_cartpole, dqn)]
    assert defaults[0] == defaults[1]


# --- Workers, and those that fail ---


def test_each_worker_is_seeded_for_itself():
    envs = dqn.make_envs(dqn.Args(env_id="toy_envs:GlobalRandom-v0", num_envs=3, seed=7))
    drawn = envs.reset()
    groups = {os.getpgid(process.pid) for process in envs.processes}  # what a terminal signals at once
    assert len(groups) == 3 and os.getpgrp() not in groups
    envs.close()
    seeds = [np.random.SeedSequence((7, i)).generate_state(1).item() for i in range(3)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    expected = [
        [random.Random(seed).random(), np.random.RandomState(seed).rand(), torch.rand((), generator=generator).item()]
        for seed, generator in zip(seeds, generators, strict=True)
    ]
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)


def test_the_fork_server_loads_what_the_workers_need(monkeypatch):
    loaded = []
    monkeypatch.setattr(multiprocessing, "set_forkserver_preload", loaded.extend)
    dqn.make_envs(dqn.Args(num_envs=1)).close()
    needed = ["torch", "gymnasium", "stable_baselines3.common.vec_env", "torch.utils.tensorboard", "tyro"]
    code = f"import sys, {', '.join(loaded)}; sys.exit(bool({set(needed)} - sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


POOL = """
import multiprocessing
import dqn_vecenv

if __name__ == "__main__":
    pool = multiprocessing.Pool(1)
    pool.map(abs, [1])  # a worker that is killed while it waits leaves a lock behind, on which the exit would hang
    dqn_vecenv.make_envs(dqn_vecenv.Args(num_envs=1))
"""


def test_processes_that_are_no_environments_end_as_their_owner_ends_them(python, tmp_path):
    (tmp_path / "own.py").write_text(POOL)
    assert python(tmp_path / "own.py", PYTHONPATH=str(ROOT)).returncode == 0


SAFETY_NET = 300  # seconds, which no loaded machine takes
SPAWN = "import multiprocessing\nmultiprocessing.get_all_start_methods = lambda: ['spawn']\n"


def workers_of(process):
    """Return the processes that step environments: children of the fork server, or of the run where it spawns them."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [p for p in children if not p.children() and "resource_tracker" not in " ".join(p.cmdline())]


def assert_nothing_is_left(processes):
    _, alive = psutil.wait_procs(processes, timeout=SAFETY_NET)
    assert alive == []


@pytest.fixture
def running(request, tmp_path):
    """A run in its third evaluation or later, and all processes that it has started."""
    if getattr(request, "param", "") == "spawn":  # as on Windows
        (tmp_path / "sitecustomize.py").write_text(SPAWN)
    flags = {"total_timesteps": 10**7, "vec_env": "subproc", "checkpoint_every": 500, "eval_every": 500}
    process = subprocess.Popen(
        [sys.executable, ROOT / "dqn_vecenv.py", *words(small("dqn_vecenv", **flags, run_dir="run"))],
        cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**environment(), "PYTHONPATH": str(tmp_path)}, start_new_session=True,
    )  # fmt: skip
    children = []
    try:
        lines = (line for line in process.stdout if " eval " in line)
        assert all(next(lines, None) for _ in range(3)), process.stderr.read()
        children += psutil.Process(process.pid).children(recursive=True)
        yield process, children
    finally:
        for child in [process, *children]:  # the main process first: it would end its workers in an order of its own
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                child.kill()
        process.communicate()


def test_a_killed_worker_ends_the_run(running, tmp_path):
    process, children = running
    workers = workers_of(process)
    assert len(workers) == 2
    workers[1].kill()
    _, err = process.communicate(timeout=SAFETY_NET)
    assert process.returncode == 1
    assert "Where a worker process of the environments has ended" in err
    assert checkpoint_of(tmp_path / "run")["counts"]["global_step"] >= 1_500
    assert_nothing_is_left(children)


@pytest.mark.parametrize(
    "running, number", [("default", signal.SIGTERM), ("spawn", signal.SIGINT)], indirect=["running"]
)
def test_a_signal_to_all_processes_is_for_the_main_one(running, number, tmp_path):
    process, children = running
    for child in children:  # a terminal or a scheduler signals all of them
        child.send_signal(number)
    assert any(" eval " in line for line in process.stdout), process.stderr.read()  # the workers go on
    process.send_signal(number)
    out, err = process.communicate(timeout=SAFETY_NET)
    assert process.returncode == 128 + number
    assert "dqn_vecenv.py --resume run" in out + err and "Traceback" not in err
    assert checkpoint_of(tmp_path / "run")["counts"]["global_step"] >= 1_500
    assert_nothing_is_left(children)


# --- What must not depend on the number of environments ---


@pytest.mark.parametrize("num_envs", [1, 3, 8])
def test_gradient_steps_are_counted_in_transitions(num_envs, run, monkeypatch):
    updates = count_updates(dqn, monkeypatch)
    result = run(num_envs=num_envs, target_frequency=10)
    assert result["gradient_steps"] == (result["global_step"] - 100) // 4
    assert updates.total() == result["gradient_steps"] * 4 // 10


def test_exploration_is_drawn_for_each_environment(run, memories, monkeypatch):
    monkeypatch.setattr(dqn.QNetwork, "forward", lambda self, obs: torch.eye(5)[0].expand(len(obs), 5))
    flags = {"env_id": "toy_envs:Mixed-v0", "num_envs": 8, "epsilon_start": 0.5, "epsilon_end": 0.5}
    run(**flags, total_timesteps=3_200, learning_starts=3_199, buffer_size=4_000)
    actions = memories[0].columns.actions[:3_200].reshape(400, 8).numpy()
    # Action 0 is greedy, and one of five random ones: 0.6 of all actions, and all eight in 0.6 ** 8 = 0.017 of the
    # steps. With one draw for the whole step that would be half of them.
    assert np.mean(actions == 0) == pytest.approx(0.6, abs=0.04)
    assert np.mean((actions == 0).all(axis=1)) < 0.06
