"""DQN: exact values, what the training loop stores and counts, that it learns, and the command line."""

import csv
import dataclasses
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace

import moviepy
import numpy as np
import pytest
import torch
import toy_envs
from conftest import ROOT, SCRIPTS, environment, load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dqn_cartpole as dqn

# Those that learn from single transitions; what the recurrent one shares with them is the same text.
DQN_SCRIPTS = [path for path in SCRIPTS if path.stem.startswith("dqn") and "lstm" not in path.stem]


@pytest.fixture(params=DQN_SCRIPTS, ids=lambda path: path.stem)
def module(request):
    """Each DQN script in turn, for the equations that they share."""
    return load(request.param)


# --- Equations ---

# A transition in the middle of an episode, one that terminated, one that was truncated.
Q_VALUES = [[7.0, -50.0], [60.0, 4.0], [0.3, 8.0]]
ACTIONS = [0, 1, 0]
NEXT_Q_VALUES = [[5.0, 7.0], [100.0, 200.0], [-4.0, -3.0]]
REWARDS = [1.0, 2.0, 3.0]
TERMINATED = [0.0, 1.0, 0.0]
TARGETS = [1 + 0.9 * 7, 2, 3 - 0.9 * 3]  # 7.3, 2, 0.3: off by 0.3, -2 and 0


def loss_by_hand(module, loss="mse", **changes):
    columns = {
        "actions": torch.tensor(ACTIONS),
        "rewards": torch.tensor(REWARDS),
        "terminated": torch.tensor(TERMINATED),
    }
    q_values = torch.tensor(Q_VALUES, requires_grad=True)
    batch = SimpleNamespace(**{**columns, **changes})  # as much of a Batch as the loss reads
    return q_values, *module.td_loss(q_values, torch.tensor(NEXT_Q_VALUES), batch, 0.9, loss)


def test_squared_td_errors_by_hand(module):
    _, loss, q_taken = loss_by_hand(module, "mse")
    assert q_taken.tolist() == pytest.approx([7, 4, 0.3])
    assert loss.item() == pytest.approx((0.3**2 + 2**2 + 0) / 3, abs=1e-6)


def test_huber_td_errors_by_hand(module):
    _, loss, _ = loss_by_hand(module, "huber")
    assert loss.item() == pytest.approx((0.5 * 0.3**2 + (2 - 0.5) + 0) / 3, abs=1e-6)


@pytest.mark.parametrize("row", range(3), ids=["middle", "terminated", "truncated"])
def test_td_target_of_one_transition(module, row):
    # The loss is zero exactly where Q(s, a) is the target.
    q_values = torch.zeros(1, 2)
    q_values[0, ACTIONS[row]] = TARGETS[row]
    one = slice(row, row + 1)
    columns = {"actions": ACTIONS, "rewards": REWARDS, "terminated": TERMINATED}
    batch = SimpleNamespace(**{name: torch.tensor(values[one]) for name, values in columns.items()})
    loss, _ = module.td_loss(q_values, torch.tensor(NEXT_Q_VALUES[one]), batch, 0.9, "mse")
    assert loss.item() == pytest.approx(0, abs=1e-10)


def test_gradient_reaches_only_the_actions_taken(module):
    q_values, loss, q_taken = loss_by_hand(module)
    loss.backward()
    expected = np.zeros((3, 2))
    expected[range(3), ACTIONS] = 2 * (q_taken.detach().numpy() - TARGETS) / 3
    np.testing.assert_allclose(q_values.grad, expected, atol=1e-6)


@pytest.mark.parametrize("column", ["rewards", "terminated"])
def test_a_column_that_would_broadcast_is_refused(module, column):
    values = {"rewards": REWARDS, "terminated": TERMINATED}[column]
    with pytest.raises(AssertionError):
        loss_by_hand(module, **{column: torch.tensor(values).unsqueeze(1)})


def test_linear_schedule_point_by_point(module):
    points = {0: 1.0, 25: 0.775, 50: 0.55, 100: 0.1, 101: 0.1, 10**9: 0.1}
    assert {t: module.linear_schedule(1.0, 0.1, 100, t) for t in points} == pytest.approx(points, abs=1e-12)


def test_exponential_schedule_point_by_point(module):
    points = {0: 1.0, 50: 0.1 + 0.9 * math.exp(-0.5), 100: 0.1 + 0.9 / math.e, 10**9: 0.1}
    assert {t: module.exponential_schedule(1.0, 0.1, 100, t) for t in points} == pytest.approx(points, abs=1e-12)


def two_networks():
    target, online = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    for network, values in ((target, [0.0, 10.0, -20.0]), (online, [10.0, 0.0, 20.0])):
        torch.nn.utils.vector_to_parameters(torch.tensor(values), network.parameters())
    return target, online


def values_of(network):
    return torch.nn.utils.parameters_to_vector(network.parameters()).tolist()


def test_hard_target_update_is_a_copy_that_stays_behind(module):
    target, online = two_networks()
    module.update_target(list(target.parameters()), list(online.parameters()), tau=1.0)
    assert values_of(target) == values_of(online) == [10, 0, 20]
    torch.nn.init.zeros_(online.weight)
    assert values_of(target) == [10, 0, 20]


def test_soft_target_update_goes_a_tenth_of_the_way(module):
    target, online = two_networks()
    module.update_target(list(target.parameters()), list(online.parameters()), tau=0.1)
    assert values_of(target) == [1, 9, -16]
    assert values_of(online) == [10, 0, 20]


# --- Replay memory ---

CPU = torch.device("cpu")


def transition(number):
    """Transition `number`, every column of which tells its number."""
    return [number, -number], number % 2, number / 4, [number + 0.5, number], number % 3 == 0


def add_transitions(memory, numbers):
    columns = zip(*map(transition, numbers), strict=True)
    memory.add(*(np.array(column, dtype) for column, dtype in zip(columns, "fifff", strict=True)))


def rows_of(batch):
    obs, actions, rewards, next_obs, terminated = (column.tolist() for column in batch)
    return [
        (tuple(o), a, r, tuple(n), t) for o, a, r, n, t in zip(obs, actions, rewards, next_obs, terminated, strict=True)
    ]


@pytest.mark.parametrize("num_envs", [1, 3, 4, 10])
def test_memory_holds_the_last_transitions_like_a_deque(num_envs):
    torch.manual_seed(0)
    memory, expected = dqn.ReplayMemory(10, 2), deque(maxlen=10)
    for step in range(random.Random(num_envs).randint(12, 30)):
        numbers = range(step * num_envs, (step + 1) * num_envs)
        add_transitions(memory, numbers)
        expected.extend((tuple(o), a, r, tuple(n), t) for o, a, r, n, t in map(transition, numbers))
        # 400 draws miss one of ten with a chance of 5e-18.
        assert set(rows_of(memory.sample(400, CPU))) == set(expected)


def test_sampling_is_uniform():
    torch.manual_seed(0)
    memory = dqn.ReplayMemory(10, 2)
    for start in range(0, 24, 3):
        add_transitions(memory, range(start, start + 3))
    counts = Counter(memory.sample(20_000, CPU).obs[:, 0].int().tolist())
    assert counts.keys() == set(range(14, 24))
    chi_square = sum((count - 2_000) ** 2 / 2_000 for count in counts.values())
    assert chi_square < 33.7  # 9 degrees of freedom: one seed in 10,000 is above


def test_a_batch_is_float32_and_int64():
    memory = dqn.ReplayMemory(10, 2)
    add_transitions(memory, range(4))
    dtypes = [column.dtype for column in memory.sample(8, CPU)]
    assert dtypes == [torch.float32, torch.int64, torch.float32, torch.float32, torch.float32]


def test_a_batch_is_a_copy():
    memory = dqn.ReplayMemory(10, 2)
    add_transitions(memory, range(10))
    batch = memory.sample(50, CPU)
    rows = rows_of(batch)
    add_transitions(memory, range(100, 110))
    assert rows_of(batch) == rows
    for column in batch:
        column.fill_(-1)
    assert all(number >= 100 for number in memory.sample(50, CPU).obs[:, 0])


@pytest.mark.parametrize("added", [3, 25])
def test_memory_survives_a_checkpoint(added, tmp_path):
    memory, restored = dqn.ReplayMemory(10, 2), dqn.ReplayMemory(10, 2)
    for number in range(added):
        add_transitions(memory, [number])
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    restored.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    for other in (memory, restored):
        add_transitions(other, [100, 101])  # into the same slots
    batches = []
    for other in (memory, restored):
        torch.manual_seed(0)
        batches.append(rows_of(other.sample(200, CPU)))
    assert batches[0] == batches[1]


# --- The training loop ---


@pytest.fixture
def options(tmp_path):
    """Flags of a short run on a toy environment that learns nothing until its last steps."""
    return {
        "env_id": "toy_envs:Mixed-v0",
        "run_dir": str(tmp_path / "run"),
        "total_timesteps": 200,
        "learning_starts": 190,
        "train_frequency": 4,
        "target_frequency": 10,
        "batch_size": 16,
        "buffer_size": 1_000,
        "hidden_size": 16,
        "num_envs": 3,
        "vec_env": "dummy",
        "eval_every": 10**9,
        "final_eval_episodes": 1,
    }


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


def stored_transitions(memory, num_envs):
    """Return what the memory holds, one list per environment, oldest first."""
    assert memory.added <= memory.capacity
    obs, actions, rewards, next_obs, terminated = (column[: memory.added].tolist() for column in memory.columns)
    rows = list(zip(obs, actions, rewards, next_obs, terminated, strict=True))
    return [rows[i::num_envs] for i in range(num_envs)]


def what_happened(env_id, number, actions):
    """Replay an environment by the rules in its docstring, without its code."""
    limit = toy_envs.COUNTING[env_id].get("max_episode_steps", math.inf)
    lengths = toy_envs.COUNTING[env_id].get("kwargs", {}).get("lengths", [math.inf])
    episode, step, last_action = 0, 0, -1
    for action in actions:
        length = lengths[(number + episode) % len(lengths)]
        obs, next_obs = [number, episode, step, last_action], [number, episode, step + 1, action]
        yield obs, action, step + action / 2, next_obs, float(step + 1 == length)
        step, last_action = step + 1, action
        if step >= min(length, limit):
            episode, step, last_action = episode + 1, 0, -1


def assert_memory_holds_what_happened(memory, env_id, num_envs):
    per_environment = stored_transitions(memory, num_envs)
    numbers = [int(rows[0][0][0]) for rows in per_environment]
    assert len(set(numbers)) == num_envs
    for number, rows in zip(numbers, per_environment, strict=True):
        assert len(rows) >= 50
        assert rows == list(what_happened(env_id, number, [row[1] for row in rows]))


@pytest.mark.parametrize("env_id", toy_envs.COUNTING)
@pytest.mark.parametrize("num_envs", [1, 3])
def test_memory_holds_exactly_what_happened(env_id, num_envs, options, memories):
    dqn.train(dqn.Args(**{**options, "env_id": f"toy_envs:{env_id}", "num_envs": num_envs}))
    assert_memory_holds_what_happened(memories[0], env_id, num_envs)


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_memory_holds_what_happened_in_worker_processes(start_method, options, memories, monkeypatch):
    # Where there is no forkserver, as on Windows and macOS, SB3 spawns its workers.
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: [start_method])
    dqn.train(dqn.Args(**{**options, "num_envs": 2, "vec_env": "subproc"}))
    assert_memory_holds_what_happened(memories[0], "Mixed-v0", 2)


@pytest.mark.parametrize("num_envs", [1, 3, 8])
@pytest.mark.parametrize("train_frequency, target_frequency", [(4, 10), (1, 7), (8, 8)])
def test_counts_do_not_depend_on_the_number_of_environments(
    num_envs, train_frequency, target_frequency, options, monkeypatch
):
    calls = Counter()

    def counted(name):
        function = getattr(dqn, name)

        def wrapper(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(dqn, name, wrapper)

    counted("td_loss")
    counted("update_target")
    options |= {"learning_starts": 50, "num_envs": num_envs}
    options |= {"train_frequency": train_frequency, "target_frequency": target_frequency}
    result = dqn.train(dqn.Args(**options))
    assert result["global_step"] == math.ceil(200 / num_envs) * num_envs
    assert result["gradient_steps"] == (result["global_step"] - 50) // train_frequency == calls["td_loss"]
    synced = result["gradient_steps"] * train_frequency // target_frequency
    assert result["target_syncs"] == synced == calls["update_target"]


@pytest.mark.parametrize("learning_starts", [0, 5])
def test_learning_can_start_before_the_first_transitions_are_in(learning_starts, options):
    try:
        args = dqn.Args(**{**options, "learning_starts": learning_starts, "num_envs": 8, "train_frequency": 1})
    except ValueError:
        return  # refused: as good
    assert dqn.train(args)["gradient_steps"] == 200 - learning_starts


def test_evaluations_fire_when_their_step_is_crossed(options):
    result = dqn.train(dqn.Args(**{**options, "eval_every": 50, "eval_episodes": 1, "num_envs": 8}))
    assert [step for step, _ in result["evaluation_curve"]] == [56, 104, 152, 200]


def test_exploration_is_drawn_for_each_environment(options, memories, monkeypatch):
    monkeypatch.setattr(dqn.QNetwork, "forward", lambda self, obs: torch.eye(5)[0].expand(len(obs), 5))
    half = {"epsilon_start": 0.5, "epsilon_end": 0.5, "num_envs": 8}
    dqn.train(dqn.Args(**{**options, **half, "total_timesteps": 3_200, "learning_starts": 3_199, "buffer_size": 4_000}))
    actions = memories[0].columns.actions[:3_200].reshape(400, 8)
    # Action 0 is greedy, and one of five random ones: 0.6 of all actions.
    assert np.mean(actions == 0) == pytest.approx(0.6, abs=0.04)
    # One draw for the whole step would leave half of the steps all greedy; eight draws leave 0.6 ** 8 = 0.017.
    assert np.mean((actions == 0).all(axis=1)) < 0.06
    # One random action for all who explore would give a step at most two different ones.
    assert np.mean([len(set(step)) > 2 for step in actions]) > 0.5


def epsilons_used(options, monkeypatch, **changes):
    """Return {transition: epsilon} for a run in which every random action shows, since it is drawn below epsilon."""
    thresholds = []

    class Draws(torch.Tensor):
        def __lt__(self, epsilon):
            thresholds.append(epsilon)
            return self.as_subclass(torch.Tensor) < epsilon

    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: rand(*args, **kwargs).as_subclass(Draws))
    dqn.train(dqn.Args(**{**options, **changes, "num_envs": 8}))
    return dict(zip(range(0, 200, 8), thresholds, strict=True))


@pytest.mark.parametrize("schedule", ["linear", "exponential"])
def test_epsilon_follows_its_schedule_in_transitions(schedule, options, monkeypatch):
    changes = {"epsilon_schedule": schedule, "exploration_steps": 100, "epsilon_start": 1.0, "epsilon_end": 0.1}
    used = epsilons_used(options, monkeypatch, **changes)
    expected = {
        "linear": lambda t: max(1 - 0.9 * t / 100, 0.1),
        "exponential": lambda t: 0.1 + 0.9 * math.exp(-t / 100),
    }[schedule]
    assert used == pytest.approx({t: expected(t) for t in used})


def test_a_time_limit_replaces_the_environments_own():
    def length(**flags):
        env = dqn.make_env(dqn.Args(env_id="toy_envs:Truncated-v0", **flags))
        env.reset(seed=0)
        return next((t for t in range(1, 30) if any(env.step(0)[2:4])), None)

    assert length() == toy_envs.TIME_LIMIT
    assert length(time_limit=7) == 7
    assert length(time_limit=-1) is None


# --- The same again ---

SHORT = {
    "total_timesteps": 400,
    "learning_starts": 100,
    "train_frequency": 4,
    "batch_size": 16,
    "buffer_size": 1_000,
    "hidden_size": 16,
    "num_envs": 2,
    "vec_env": "dummy",
    "eval_every": 200,
    "eval_episodes": 2,
    "final_eval_episodes": 2,
}


@pytest.fixture(scope="session")
def parameters_of(tmp_path_factory):
    """Train for a moment on CartPole and return the parameters of last.pt, the same run once only."""
    known = {}

    def parameters(repetition=0, **changes):
        key = (repetition, *sorted(changes.items()))
        if key not in known:
            run_dir = tmp_path_factory.mktemp("runs") / "run"
            dqn.train(dqn.Args(**{**SHORT, "seed": 1, **changes, "run_dir": str(run_dir)}))
            known[key] = torch.load(run_dir / "last.pt", weights_only=True)["network"]
        return known[key]

    return parameters


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_seed_gives_the_same_parameters_to_the_bit(parameters_of):
    assert same(parameters_of(), parameters_of(repetition=1))


def test_another_seed_gives_other_parameters(parameters_of):
    assert not same(parameters_of(), parameters_of(seed=2))


def test_worker_processes_give_the_same_parameters_to_the_bit(parameters_of):
    assert same(parameters_of(), parameters_of(vec_env="subproc"))


def test_evaluating_does_not_change_the_training(parameters_of):
    assert same(parameters_of(), parameters_of(eval_every=50, eval_episodes=5, checkpoint_every=70))


# --- Evaluation ---


def returns_of_toy_episodes(num_episodes, seed):
    for number in range(seed, seed + num_episodes):
        length = toy_envs.LENGTHS[number % 3]
        yield sum(step + 1 / 2 for step in range(length))


def test_evaluation_counts_one_whole_episode_of_each_environment(monkeypatch):
    monkeypatch.setattr(dqn.QNetwork, "forward", lambda self, obs: torch.eye(5)[1].expand(len(obs), 5))
    args = dqn.Args(env_id="toy_envs:Terminated-v0", gamma=0.1, num_envs=2)
    env = dqn.make_env(args)
    network = dqn.QNetwork(env.observation_space, env.action_space, args)
    returns = dqn.evaluate(args, network, num_episodes=7, seed=5)
    assert returns.tolist() == list(returns_of_toy_episodes(7, seed=5))
    assert len(set(returns)) == 3


def test_evaluation_ends_without_a_time_limit():
    env = dqn.make_env(dqn.Args(env_id="toy_envs:Truncated-v0", time_limit=-1), evaluation=True)
    env.reset(seed=0)
    assert any(any(env.step(0)[2:4]) for _ in range(20_000))


def test_the_best_network_is_kept_and_the_last_one_too(options, monkeypatch):
    scripted = iter([3.0, 9.0, 4.0, 5.0, 5.0, 5.0])
    calls = []

    def scripted_evaluate(args, network, num_episodes, seed, **env_options):
        parameters = {name: value.clone() for name, value in network.state_dict().items()}
        calls.append((num_episodes, seed, parameters))
        return np.full(num_episodes, next(scripted))

    monkeypatch.setattr(dqn, "evaluate", scripted_evaluate)
    changes = {"learning_starts": 16, "num_envs": 2, "eval_every": 50, "eval_episodes": 4, "final_eval_episodes": 6}
    result = dqn.train(dqn.Args(**{**options, **changes}))

    assert [num_episodes for num_episodes, _, _ in calls] == [4, 4, 4, 4, 6, 6]
    first, second, third, fourth, final, best = (parameters for _, _, parameters in calls)
    assert not same(first, second) and not same(second, third)
    saved = {name: torch.load(Path(options["run_dir"], name), weights_only=True) for name in ("best.pt", "last.pt")}
    assert same(saved["best.pt"]["network"], second) and same(best, second)
    assert saved["best.pt"]["return_mean"] == 9
    assert same(saved["last.pt"]["network"], fourth) and same(final, fourth)
    assert [e[1] for e in result["evaluation_curve"]] == [3, 9, 4, 5]
    assert (result["final_return_mean"], result["best_return_mean"]) == (5, 5)

    selection_seeds, final_seeds = {seed for _, seed, _ in calls[:4]}, {seed for _, seed, _ in calls[4:]}
    assert len(selection_seeds) == len(final_seeds) == 1
    assert selection_seeds != final_seeds


# --- It learns ---


def learned_value(run_dir):
    """Train on reward 1 per step, truncated every 5 steps, with gamma 0.9; return V of its only state."""
    flags = {"gamma": 0.9, "learning_rate": 0.01, "learning_rate_end": 0.01, "tau": 1.0, "target_frequency": 20}
    flags |= {"total_timesteps": 2_000, "learning_starts": 50, "train_frequency": 1, "loss": "mse"}
    flags |= {"batch_size": 16, "buffer_size": 500, "hidden_size": 16, "num_envs": 5, "vec_env": "dummy"}
    flags |= {"eval_every": 10**9, "final_eval_episodes": 1}
    args = dqn.Args(env_id="toy_envs:Constant-v0", run_dir=str(run_dir), **flags)
    dqn.train(args)
    env = dqn.make_env(args)
    network = dqn.QNetwork(env.observation_space, env.action_space, args)
    network.load_state_dict(torch.load(run_dir / "last.pt", weights_only=True)["network"])
    return network(torch.ones(1, 1)).max().item()


def test_truncation_does_not_end_the_value(tmp_path):
    assert learned_value(tmp_path / "run") == pytest.approx(10, abs=0.5)


def test_a_truncation_taken_for_an_end_would_show(tmp_path, monkeypatch):
    # The power of the test above: with death at every fifth step, V = 1 + 0.9 * 4/5 * V = 3.6.
    class Deadly(dqn.DummyVecEnv):
        def step_wait(self):
            *rest, infos = super().step_wait()
            return *rest, [{**info, "TimeLimit.truncated": False} for info in infos]

    monkeypatch.setattr(dqn, "DummyVecEnv", Deadly)
    assert learned_value(tmp_path / "run") == pytest.approx(3.6, abs=0.5)


CARTPOLE = {
    **{"total_timesteps": 15_000, "num_envs": 4, "vec_env": "dummy", "seed": 1, "gamma": 0.99, "loss": "mse"},
    **{"learning_starts": 500, "train_frequency": 2, "target_frequency": 2, "tau": 0.02, "hidden_size": 64},
    **{"buffer_size": 15_000, "batch_size": 64, "learning_rate": 1e-3, "learning_rate_end": 0.0},
    **{"epsilon_start": 1.0, "epsilon_end": 0.1, "exploration_steps": 5_000},
    **{"epsilon_schedule": "linear", "max_grad_norm": 10.0, "eval_every": 10**9, "final_eval_episodes": 30},
}
LEARNED = 100.0  # seeds 1 to 6 reach 178 to 237


def test_it_learns_cartpole(tmp_path):
    assert dqn.train(dqn.Args(**CARTPOLE, run_dir=str(tmp_path / "run")))["final_return_mean"] > LEARNED


def test_an_untrained_network_has_not_learned(tmp_path):
    torch.manual_seed(1)
    args = dqn.Args(**CARTPOLE)
    env = dqn.make_env(args)
    returns = [
        dqn.evaluate(args, dqn.QNetwork(env.observation_space, env.action_space, args), 5, seed).mean()
        for seed in range(10)
    ]
    assert max(returns) < LEARNED


def test_a_bootstrap_from_the_grave_does_not_learn(tmp_path, monkeypatch):
    # The power of test_it_learns_cartpole: where falling costs nothing, seeds 1 to 6 end at 9 to 10.
    td_loss = dqn.td_loss

    def broken(q_values, next_q_values, batch, gamma, loss):
        batch = batch._replace(terminated=torch.zeros_like(batch.terminated))
        return td_loss(q_values, next_q_values, batch, gamma, loss)

    monkeypatch.setattr(dqn, "td_loss", broken)
    assert dqn.train(dqn.Args(**CARTPOLE, run_dir=str(tmp_path / "run")))["final_return_mean"] < LEARNED / 2


# --- The command line ---


def flags(options):
    return [str(word) for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]


def test_a_worker_that_dies_ends_the_run(options, capfd):
    args = dqn.Args(**{**options, "env_id": "toy_envs:Crashing-v0", "num_envs": 2, "vec_env": "subproc"})
    with pytest.raises(SystemExit) as stop:
        dqn.train(args)
    assert stop.value.code == 1
    assert "worker" in capfd.readouterr().err
    for worker in multiprocessing.active_children():
        worker.join(timeout=10)
    assert multiprocessing.active_children() == []
    assert (Path(options["run_dir"]) / "last.pt").exists()


@pytest.fixture
def trained(tmp_path):
    """The directory of a short finished run."""
    run_dir = tmp_path / "trained"
    dqn.train(dqn.Args(**SHORT, run_dir=str(run_dir)))
    return run_dir


def checkpoint_of(run_dir, name="last.pt"):
    return torch.load(run_dir / name, weights_only=True)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def rows_of_progress(run_dir):
    with open(run_dir / "progress.csv") as file:
        return [(int(row["step"]), row["metric"], float(row["value"])) for row in csv.DictReader(file)]


def evaluations_of(run_dir):
    return [step for step, metric, _ in rows_of_progress(run_dir) if metric == "eval/return_mean"]


def test_tensorboard_gets_a_thousand_points_of_a_curve_and_progress_csv_gets_all(tmp_path):
    run_dir = tmp_path / "run"
    changes = {"env_id": "toy_envs:Constant-v0", "time_limit": 1, "total_timesteps": 4_000, "learning_starts": 3_990}
    dqn.train(dqn.Args(**{**SHORT, **changes}, run_dir=str(run_dir)))
    written = [(step, value) for step, metric, value in rows_of_progress(run_dir) if metric == "train/episode_return"]
    assert len(written) == 4_000  # every step of every environment ends an episode
    shown = [
        (event.step, event.value) for event in EventAccumulator(str(run_dir)).Reload().Scalars("train/episode_return")
    ]
    assert shown[0] == written[0] and set(shown) <= set(written)
    assert np.diff([step for step, _ in shown]).min() == 4 and 900 < len(shown) <= 1_000


def test_a_film_that_cannot_be_made_is_refused_before_the_training(cli, tmp_path):
    status, _, err = cli(*flags({**SHORT, "env_id": "toy_envs:Constant-v0", "time_limit": 5}), "--video")
    assert status == 2
    assert "video" in err
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_is_exit_status_2_without_a_traceback(python, tmp_path):
    done = python(ROOT / "dqn_cartpole.py", "--batch-size", "64", "--buffer-size", "32")
    assert done.returncode == 2
    assert "--batch-size 64" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def press_ctrl_c(run_dir, options):
    """Start a run in a process group of its own, interrupt it after its third evaluation; return status and stderr."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "dqn_cartpole.py", *flags({**options, "run_dir": run_dir})],
        cwd=run_dir.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        lines = (line for line in process.stdout if " eval " in line)
        assert all(next(lines, None) for _ in range(3)), process.stderr.read()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
        return process.wait(timeout=60), process.stderr.read()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.parametrize("vec_env", ["dummy", "subproc"])
def test_a_run_stopped_by_ctrl_c_resumes_where_it_stopped(vec_env, cli, tmp_path):
    run_dir = tmp_path / "run"
    options = {**SHORT, "vec_env": vec_env, "total_timesteps": 200_000, "eval_every": 500, "train_frequency": 1}
    options |= {"epsilon_start": 1.0, "epsilon_end": 0.0, "exploration_steps": 50_000, "epsilon_schedule": "linear"}
    status, err = press_ctrl_c(run_dir, options)
    assert status == 130
    assert f"dqn_cartpole.py --resume {run_dir}" in err and "Traceback" not in err

    stopped = checkpoint_of(run_dir)["counts"]["global_step"]
    assert 1_500 <= stopped < 50_000
    end = (stopped // 500 + 4) * 500
    status, _, err = cli("--resume", run_dir, "--total-timesteps", end)
    assert (status, err) == (0, "")

    result = json.loads((run_dir / "result.json").read_text())
    assert result["global_step"] == end
    assert result["gradient_steps"] == end - SHORT["learning_starts"]
    assert evaluations_of(run_dir) == list(range(500, end + 1, 500))
    assert [step for step, _ in result["evaluation_curve"]] == list(range(500, end + 1, 500))
    epsilons = {step: value for step, metric, value in rows_of_progress(run_dir) if metric == "train/epsilon"}
    assert min(epsilons) < stopped < max(epsilons)
    assert epsilons == pytest.approx({step: 1 - (step - SHORT["num_envs"]) / 50_000 for step in epsilons})


def test_resuming_restores_everything(trained, cli):
    before = checkpoint_of(trained)
    assert cli("--resume", trained)[0] == 0  # at its end already: no step is taken
    after = checkpoint_of(trained)
    assert before.keys() == after.keys() >= {"network", "target_network", "optimizer", "memory", "counts", "torch_rng"}
    for checkpoint in (before, after):
        checkpoint["args"] |= {"run_dir": "", "resume": ""}
        del checkpoint["record"]  # holds the clock, which goes on
    assert [name for name in before if not equal(before[name], after[name])] == []


def test_a_resumed_run_is_judged_by_its_own_flags_not_by_the_defaults(trained, cli):
    beyond = dqn.Args().learning_starts  # no run with the other defaults could end here
    assert cli("--resume", trained, "--total-timesteps", max(beyond, 500))[0] == 0


def test_a_resumed_run_takes_its_steps_on_top(trained, cli):
    memory = checkpoint_of(trained)["memory"]
    assert cli("--resume", trained, "--total-timesteps", 600)[0] == 0
    grown = checkpoint_of(trained)["memory"]
    assert (memory["added"], grown["added"]) == (400, 600)
    for before, after in zip(memory["columns"], grown["columns"], strict=True):
        assert torch.equal(before, after[:400])
    assert json.loads((trained / "result.json").read_text())["gradient_steps"] == (600 - 100) // 4


def test_rows_that_a_killed_run_wrote_after_its_checkpoint_are_dropped(trained, cli):
    with open(trained / "progress.csv", "a") as file:
        file.write("450,eval/return_mean,1.0\n500,eval/return_mean,1.0\n50")  # the kernel cut the last row short
    assert cli("--resume", trained, "--total-timesteps", 600)[0] == 0
    assert {line.count(",") for line in (trained / "progress.csv").read_text().splitlines()} == {2}
    assert evaluations_of(trained) == [200, 400, 600]


def test_a_resumed_run_refuses_another_learning_rate(trained, cli):
    files = {file: file.read_bytes() for file in trained.iterdir()}
    status, _, err = cli("--resume", trained, "--total-timesteps", 600, "--learning-rate", 0.5)
    assert status == 2
    assert "--learning-rate" in err
    assert {file: file.read_bytes() for file in trained.iterdir()} == files


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_playing_a_checkpoint_tells_its_return(name, cli, tmp_path):
    args = dqn.Args(**{**SHORT, "env_id": "toy_envs:Terminated-v0", "run_dir": str(tmp_path / "run")})
    dqn.train(args)
    env = dqn.make_env(args)
    network = dqn.QNetwork(env.observation_space, env.action_space, args)
    network.load_state_dict(checkpoint_of(tmp_path / "run", name)["network"])
    files = set(tmp_path.rglob("*"))
    for seed in (7, 8):  # episodes of 4 and 5 steps, and of 5 and 3
        status, out, _ = cli("--play", tmp_path / "run" / name, "--final-eval-episodes", 2, "--seed", seed)
        assert status == 0
        assert f"{dqn.evaluate(args, network, 2, seed).mean():.1f} over 2 episodes" in out
    assert set(tmp_path.rglob("*")) == files


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_cannot_run_code(trained, cli, tmp_path):
    torch.save({**checkpoint_of(trained, "best.pt"), "network": Payload()}, trained / "best.pt")
    status, out, err = cli("--play", trained / "best.pt")
    assert status == 2
    assert "best.pt" in err and "Traceback" not in out + err
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_script_is_refused(trained, cli):
    torch.save({**checkpoint_of(trained, "best.pt"), "script": "ppo_cartpole"}, trained / "best.pt")
    status, _, err = cli("--play", trained / "best.pt")
    assert status == 2
    assert "ppo_cartpole" in err


def test_a_checkpoint_from_a_machine_with_a_gpu_plays_on_one_without(trained, cli):
    checkpoint = checkpoint_of(trained, "best.pt")
    checkpoint["args"]["device"] = "cuda:9"
    torch.save(checkpoint, trained / "best.pt")
    status, out, _ = cli("--play", trained / "best.pt", "--device", "cpu", "--final-eval-episodes", 1)
    assert status == 0
    assert "over 1 episodes" in out


def test_playing_needs_no_room_for_a_replay_memory(cli, tmp_path, monkeypatch):
    atari = load(ROOT / "dqn_atari.py")
    args = atari.Args(buffer_size=1_000)
    env = atari.make_env(args)
    contents = {"script": "dqn_atari", "args": {**dataclasses.asdict(args), "buffer_size": 1_000_000}}
    contents["network"] = atari.QNetwork(env.observation_space, env.action_space, args).state_dict()
    torch.save(contents, tmp_path / "best.pt")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**9))
    status, _, err = cli(
        *("--play", tmp_path / "best.pt", "--final-eval-episodes", 1, "--time-limit", 5), script="dqn_atari.py"
    )
    assert (status, err) == (0, "")


@pytest.mark.parametrize(("free", "limit"), [(10**9, "max"), (10**9, "1000000000000"), (10**12, "1000000000")])
def test_a_replay_memory_that_does_not_fit_is_refused(free, limit, tmp_path, monkeypatch):
    atari = load(ROOT / "dqn_atari.py")
    (tmp_path / "memory.max").write_text(f"{limit}\n")  # of a container
    monkeypatch.setattr(atari, "CONTAINER_LIMIT", tmp_path / "memory.max")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    atari.Args(buffer_size=120_000)
    with pytest.raises(ValueError, match="127406 transitions would fit"):
        atari.Args(buffer_size=130_000)


def test_resuming_on_a_machine_without_the_gpu(trained, cli):
    args = json.loads((trained / "args.json").read_text())
    (trained / "args.json").write_text(json.dumps({**args, "device": "cuda:9"}))
    assert cli("--resume", trained, "--device", "cpu", "--total-timesteps", 600)[0] == 0


def test_a_film_shows_the_best_network(tmp_path):
    run_dir = tmp_path / "run"
    dqn.train(dqn.Args(**SHORT, run_dir=str(run_dir), video=True))
    (film,) = (run_dir / "videos").glob("*.mp4")
    with moviepy.VideoFileClip(str(film)) as clip:
        first, last = clip.get_frame(0), clip.get_frame(clip.duration - 1 / clip.fps)
        assert clip.n_frames >= 5
    assert first.std() > 10 and (first != last).any()  # not blank, and something moves
    (shown,) = EventAccumulator(str(run_dir)).Reload().Images("best network")
    with moviepy.VideoFileClip(str(film.with_suffix(".gif"))) as clip:
        assert shown.encoded_image_string == film.with_suffix(".gif").read_bytes() and clip.n_frames > 1


def test_a_network_alone_cannot_be_resumed(trained, cli):
    (trained / "last.pt").write_bytes((trained / "best.pt").read_bytes())
    status, _, err = cli("--resume", trained)
    assert status == 2 and "cannot be resumed" in err


def test_a_checkpoint_of_another_environment_is_refused(trained, cli, tmp_path):
    other = tmp_path / "other"
    dqn.train(dqn.Args(**{**SHORT, "env_id": "Acrobot-v1"}, run_dir=str(other)))
    (trained / "last.pt").write_bytes((other / "last.pt").read_bytes())
    status, _, err = cli("--resume", trained)
    assert status == 2 and "is not of this run" in err


def test_a_resumed_run_cannot_end_before_it_began(trained, cli):
    status, _, err = cli("--resume", trained, "--total-timesteps", 300)
    assert status == 2 and "--total-timesteps 300" in err


@pytest.mark.parametrize("vec_env", ["dummy", "subproc"])
def test_environment_0_shows_a_window_while_training(vec_env, tmp_path, monkeypatch):
    args = dqn.Args(**{**SHORT, "vec_env": vec_env}, render=True, run_dir=str(tmp_path / "run"))
    made = []
    make_envs = dqn.make_envs
    monkeypatch.setattr(dqn, "make_envs", lambda args: made.append(make_envs(args)) or made[0])
    assert dqn.train(args)["global_step"] == 400
    if vec_env == "dummy":
        assert [env.unwrapped.render_mode for env in made[0].envs] == ["human", None]


# --- What a gradient step is made of ---


def test_targets_come_from_a_network_that_stays_behind(options, monkeypatch):
    args = dqn.Args(**{**options, "learning_starts": 50, "tau": 1e-9})  # so far behind that it does not move
    env, td_loss, moved = dqn.make_env(args), dqn.td_loss, []
    torch.manual_seed(args.seed)
    initial = dqn.QNetwork(env.observation_space, env.action_space, args)  # as train makes it

    def spy(q_values, next_q_values, batch, *rest):
        assert not next_q_values.requires_grad
        torch.testing.assert_close(next_q_values, initial(batch.next_obs).detach())
        moved.append(bool((q_values - initial(batch.obs)).abs().max() > 1e-3))
        return td_loss(q_values, next_q_values, batch, *rest)

    monkeypatch.setattr(dqn, "td_loss", spy)
    dqn.train(args)
    assert moved[0] is False and all(moved[1:]) and len(moved) == (201 - 50) // 4


def test_a_gradient_step_follows_the_gradient_of_its_own_batch(options, monkeypatch):
    networks, gradients, td_loss, step = [], [], dqn.td_loss, torch.optim.Adam.step

    class Kept(dqn.QNetwork):
        def __init__(self, *args):
            super().__init__(*args)
            networks.append(self)

    def spy_on_loss(*args):
        loss, q_taken = td_loss(*args)
        gradients.append(torch.autograd.grad(loss, list(networks[0].parameters()), retain_graph=True))
        return loss, q_taken

    def spy_on_step(optimizer, *rest):
        torch.testing.assert_close([p.grad for p in optimizer.param_groups[0]["params"]], list(gradients[-1]))
        return step(optimizer, *rest)

    monkeypatch.setattr(dqn, "QNetwork", Kept)
    monkeypatch.setattr(dqn, "td_loss", spy_on_loss)
    monkeypatch.setattr(torch.optim.Adam, "step", spy_on_step)
    dqn.train(dqn.Args(**{**options, "learning_starts": 150}))
    assert len(gradients) == (201 - 150) // 4
