"""DQN: exact values, what the training loop stores and counts, that it learns, and how a run is resumed and played."""

import copy
import math
import random
import sys
from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import moviepy
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy_envs
from conftest import SCRIPTS, Interrupted, checkpoint_of, load, rows_of, same, small, train
from gymnasium.envs.classic_control import CartPoleEnv
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


def td_loss(module, q_values, next_q_values, loss_function, **columns):
    """Call td_loss with gamma 0.9; a batch of n-step returns brings it along."""
    columns = {name: torch.as_tensor(column) for name, column in columns.items()}
    gamma = [] if "discounts" in module.Batch._fields else [0.9]
    batch = SimpleNamespace(**columns, discounts=torch.full((len(q_values),), 0.9))  # what a loss reads of a Batch
    return module.td_loss(q_values, torch.tensor(next_q_values), batch, *gamma, loss_function)


def loss_by_hand(module, loss_function=F.mse_loss, **changes):
    q_values = torch.tensor(Q_VALUES, requires_grad=True)
    columns = {"actions": ACTIONS, "rewards": REWARDS, "terminated": TERMINATED} | changes
    return q_values, *td_loss(module, q_values, NEXT_Q_VALUES, loss_function, **columns)


def test_squared_td_errors_by_hand(module):
    _, loss, q_taken = loss_by_hand(module, F.mse_loss)
    assert q_taken.tolist() == pytest.approx([7, 4, 0.3])
    assert loss.item() == pytest.approx((0.3**2 + 2**2 + 0) / 3, abs=1e-6)


def test_huber_td_errors_by_hand(module):
    _, loss, _ = loss_by_hand(module, F.smooth_l1_loss)
    assert loss.item() == pytest.approx((0.5 * 0.3**2 + (2 - 0.5) + 0) / 3, abs=1e-6)


@pytest.mark.parametrize("row", range(3), ids=["middle", "terminated", "truncated"])
def test_td_target_of_one_transition(module, row):
    # The loss is zero exactly where Q(s, a) is the target.
    q_values = torch.zeros(1, 2)
    q_values[0, ACTIONS[row]] = TARGETS[row]
    one = slice(row, row + 1)
    columns = {"actions": ACTIONS[one], "rewards": REWARDS[one], "terminated": TERMINATED[one]}
    loss, _ = td_loss(module, q_values, NEXT_Q_VALUES[one], F.mse_loss, **columns)
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


def two_networks():
    target, online = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    for network, values in ((target, [0.0, 10.0, -20.0]), (online, [10.0, 0.0, 20.0])):
        torch.nn.utils.vector_to_parameters(torch.tensor(values), network.parameters())
    return target, online


def values_of(network):
    return torch.nn.utils.parameters_to_vector(network.parameters()).tolist()


def test_hard_target_update_is_a_copy_that_stays_behind():
    target, online = two_networks()
    dqn.update_target(list(target.parameters()), list(online.parameters()), tau=1.0)
    assert values_of(target) == values_of(online) == [10, 0, 20]
    torch.nn.init.zeros_(online.weight)
    assert values_of(target) == [10, 0, 20]


def test_soft_target_update_goes_a_tenth_of_the_way():
    target, online = two_networks()
    dqn.update_target(list(target.parameters()), list(online.parameters()), tau=0.1)
    assert values_of(target) == [1, 9, -16]
    assert values_of(online) == [10, 0, 20]


# --- Replay memory ---

CPU = torch.device("cpu")


def transition(number):
    """Transition `number`, every column of which tells its number."""
    return [number, -number], number % 2, number / 4, [number + 0.5, number], number % 3 == 0


def add_transitions(memory, numbers):
    columns = zip(*map(transition, numbers), strict=True)
    memory.add(*(np.array(column, dtype) for column, dtype in zip(columns, "fidf?", strict=True)))


def transitions_of(batch):
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
        assert set(transitions_of(memory.sample(400, CPU))) == set(expected)


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
    rows = transitions_of(batch)
    add_transitions(memory, range(100, 110))
    assert transitions_of(batch) == rows
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
        batches.append(transitions_of(other.sample(200, CPU)))
    assert batches[0] == batches[1]


# --- What the training loop stores ---

# A short run that learns nothing until its last steps.
TOY = {
    **{"env_id": "toy_envs:Mixed-v0", "total_timesteps": 200, "learning_starts": 190, "target_frequency": 10},
    **{"hidden_size": 16, "num_envs": 3, "eval_every": 10**9, "final_eval_episodes": 1},
}


@pytest.fixture
def run(tmp_path):
    """Train on a toy environment; return the result."""
    return lambda **changes: train("dqn_cartpole", tmp_path / "run", **{**TOY, **changes})


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
    rows = list(zip(*(column[: memory.added].tolist() for column in memory.columns), strict=True))
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


def numbers_after_checking(env_id, per_environment):
    """Check that these rows are what happened since the environments were seeded; return their numbers."""
    numbers = [int(rows[0][0][0]) for rows in per_environment]
    assert len(set(numbers)) == len(numbers)
    for number, rows in zip(numbers, per_environment, strict=True):
        assert len(rows) >= 50
        assert rows == list(what_happened(env_id, number, [row[1] for row in rows]))
    return set(numbers)


def assert_memory_holds_what_happened(memory, env_id, num_envs):
    numbers_after_checking(env_id, stored_transitions(memory, num_envs))


@pytest.mark.parametrize("env_id", toy_envs.COUNTING)
@pytest.mark.parametrize("num_envs", [1, 3])
def test_memory_holds_exactly_what_happened(env_id, num_envs, run, memories):
    run(env_id=f"toy_envs:{env_id}", num_envs=num_envs)
    assert_memory_holds_what_happened(memories[0], env_id, num_envs)


def test_memory_holds_what_happened_in_a_spawned_worker(run, memories, monkeypatch):
    # Where there is no forkserver, as on Windows, SB3 spawns its workers.
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    run(num_envs=1, vec_env="subproc")
    assert_memory_holds_what_happened(memories[0], "Mixed-v0", 1)


# --- What it counts ---


@pytest.mark.parametrize("num_envs", [1, 3, 8])
@pytest.mark.parametrize("train_frequency, target_frequency", [(4, 10), (1, 7), (8, 8)])
def test_counts_do_not_depend_on_the_number_of_environments(
    num_envs, train_frequency, target_frequency, run, monkeypatch
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
    frequencies = {"train_frequency": train_frequency, "target_frequency": target_frequency}
    result = run(learning_starts=50, num_envs=num_envs, **frequencies)
    assert result["global_step"] == math.ceil(200 / num_envs) * num_envs
    assert result["gradient_steps"] == (result["global_step"] - 50) // train_frequency == calls["td_loss"]
    synced = result["gradient_steps"] * train_frequency // target_frequency
    assert synced == calls["update_target"]


def test_learning_starts_with_the_first_transitions_and_not_before(run):
    with pytest.raises(ValueError, match="--learning-starts 7"):
        run(learning_starts=7, num_envs=8)
    assert run(learning_starts=8, num_envs=8, train_frequency=1)["gradient_steps"] == 200 - 8


@pytest.mark.parametrize("target_return, steps", [(1.0, 100), (1.5, 200)])
def test_a_run_ends_once_its_last_100_episodes_have_the_target_return(target_return, steps, run):
    # Every step is an episode with a return of 1.
    result = run(env_id="toy_envs:Constant-v0", time_limit=1, num_envs=4, target_return=target_return)
    assert result["global_step"] == steps


@pytest.mark.parametrize("name", ["dqn_cartpole", "dqn_atari", "dqn_lstm_cartpole"])
def test_it_learns_while_the_environments_step(name, tmp_path, monkeypatch):
    module, order = load(Path(name)), []

    def noting(owner, function):
        original = getattr(owner, function)
        monkeypatch.setattr(owner, function, lambda *args: order.append(function) or original(*args))

    noting(module.DummyVecEnv, "step_async"), noting(module.DummyVecEnv, "step_wait"), noting(module, "td_loss")
    train(name, tmp_path / "run", eval_every=10**9)
    learning = order.index("td_loss")
    assert order[learning - 1] == "step_async" and order[learning:].count("step_async") > 10


def test_exploration_is_drawn_for_each_environment(run, memories, monkeypatch):
    monkeypatch.setattr(dqn.QNetwork, "forward", lambda self, obs: torch.eye(5)[0].expand(len(obs), 5))
    half = {"epsilon_start": 0.5, "epsilon_end": 0.5, "num_envs": 8, "buffer_size": 4_000}
    run(**half, total_timesteps=3_200, learning_starts=3_199)
    actions = memories[0].columns.actions[:3_200].reshape(400, 8).numpy()
    # Action 0 is greedy, and one of five random ones: 0.6 of all actions.
    assert np.bincount(actions.flatten(), minlength=5) / actions.size == pytest.approx([0.6, *[0.1] * 4], abs=0.03)
    # One draw for the whole step would leave half of the steps all greedy; eight draws leave 0.6 ** 8 = 0.017.
    assert np.mean((actions == 0).all(axis=1)) < 0.06
    # One random action for all who explore would give a step at most two different ones.
    assert np.mean([len(set(step)) > 2 for step in actions]) > 0.5


def test_epsilon_follows_its_schedule_in_transitions(run, monkeypatch):
    thresholds = []

    class Draws(torch.Tensor):
        """Every random action shows, since it is drawn below epsilon."""

        def __lt__(self, epsilon):
            thresholds.append(epsilon)
            return self.as_subclass(torch.Tensor) < epsilon

    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: rand(*args, **kwargs).as_subclass(Draws))
    run(exploration_steps=100, epsilon_start=1.0, epsilon_end=0.1, num_envs=8)
    assert thresholds == pytest.approx([max(1 - 0.9 * t / 100, 0.1) for t in range(0, 200, 8)])


# --- What a gradient step is made of ---


def test_targets_come_from_a_network_that_stays_behind(run, monkeypatch):
    flags = {**TOY, "learning_starts": 50, "target_frequency": 10**9}  # so far behind that it never moves
    args = dqn.Args(**small("dqn_cartpole", **flags))
    env, td_loss, moved = dqn.make_env(args), dqn.td_loss, []
    torch.manual_seed(args.seed)
    initial = dqn.QNetwork(env.observation_space, env.action_space, args)  # as train makes it

    def spy(q_values, next_q_values, batch, *rest):
        assert not next_q_values.requires_grad
        torch.testing.assert_close(next_q_values, initial(batch.next_obs).detach())
        moved.append(bool((q_values - initial(batch.obs)).abs().max() > 1e-3))
        return td_loss(q_values, next_q_values, batch, *rest)

    monkeypatch.setattr(dqn, "td_loss", spy)
    run(**flags)
    assert moved[0] is False and all(moved[1:]) and len(moved) == (201 - 50) // 4


@pytest.mark.parametrize("loss, loss_function", [("mse", F.mse_loss), ("huber", F.smooth_l1_loss)])
def test_a_gradient_step_follows_the_gradient_of_its_own_batch(loss, loss_function, run, monkeypatch):
    networks, gradients, learning_rates = [], [], []
    td_loss, step = dqn.td_loss, torch.optim.Adam.step

    class Kept(dqn.QNetwork):
        def __init__(self, *args):
            super().__init__(*args)
            networks.append(self)

    def spy_on_loss(q_values, next_q_values, batch, gamma, function):
        assert (gamma, function) == (0.9, loss_function)
        loss, q_taken = td_loss(q_values, next_q_values, batch, gamma, function)
        gradients.append(torch.autograd.grad(loss, list(networks[0].parameters()), retain_graph=True))
        return loss, q_taken

    def spy_on_step(optimizer, *rest):
        (group,) = optimizer.param_groups
        torch.testing.assert_close([p.grad for p in group["params"]], list(gradients[-1]))
        learning_rates.append(group["lr"])
        return step(optimizer, *rest)

    monkeypatch.setattr(dqn, "QNetwork", Kept)
    monkeypatch.setattr(dqn, "td_loss", spy_on_loss)
    monkeypatch.setattr(torch.optim.Adam, "step", spy_on_step)
    flags = {"learning_starts": 150, "train_frequency": 3, "num_envs": 3, "total_timesteps": 180, "gamma": 0.9}
    run(**flags, loss=loss, learning_rate=0.02, learning_rate_end=0.002)
    # After transitions 153, 156, ..., 180 of 180, where it is at its end.
    assert learning_rates == pytest.approx([0.02 - 0.018 * t / 180 for t in range(153, 181, 3)])


# --- What it writes ---


def curves_of(run_dir):
    """Return {metric: [(step, value), ...]} of progress.csv."""
    rows = rows_of(run_dir)
    return {name: [(step, value) for step, metric, value in rows if metric == name] for _, name, _ in rows}


def returns_with_action_1(lengths):
    """Return the returns of episodes of Counting in which every action is 1."""
    return [sum(step + 1 / 2 for step in range(length)) for length in lengths]


def scalars_of(run_dir):
    """Return {metric: [(step, value), ...]} of TensorBoard's files."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_metrics_are_logged_every_100_gradient_steps_and_episodes_as_they_end(run, tmp_path, monkeypatch):
    monkeypatch.setattr(dqn.QNetwork, "forward", lambda self, obs: 0 * self.layers(obs) + torch.eye(5)[1])
    flags = {"epsilon_start": 0, "epsilon_end": 0, "num_envs": 8, "eval_every": 400}
    run(total_timesteps=1_200, learning_starts=100, **flags)
    curves = curves_of(tmp_path / "run")
    lengths, returns = (curves.pop(f"train/episode_{name}") for name in ("length", "return"))
    for name in ("loss", "q_taken", "epsilon", "learning_rate"):
        assert [step for step, _ in curves[f"train/{name}"]] == [504, 904]  # where 100 + 400 and 100 + 800 are crossed
    for name in ("return_mean", "return_min"):
        assert [step for step, _ in curves[f"eval/{name}"]] == [400, 800, 1_200]

    assert {length for _, length in lengths} == {3, 4} and 1_200 - 8 * 3 <= sum(value for _, value in lengths) <= 1_200
    assert returns == [(step, returns_with_action_1([int(length)])[0]) for step, length in lengths]
    for step, mean in curves["train/return_mean_100"]:
        before, after = ([value for at, value in returns if at < end][-100:] for end in (step, step + 1))
        assert mean in (pytest.approx(np.mean(before)), pytest.approx(np.mean(after)))

    shown = scalars_of(tmp_path / "run")  # episodes by the thousand would cost more than the training
    assert shown.keys() == curves.keys()
    for name, points in curves.items():
        assert [step for step, _ in shown[name]] == [step for step, _ in points]
        assert [value for _, value in shown[name]] == pytest.approx([value for _, value in points])


def test_what_is_logged_is_of_the_last_minibatch(run, tmp_path, monkeypatch):
    td_loss, seen = dqn.td_loss, []

    def spy(*args):
        loss, q_taken = td_loss(*args)
        seen.append((loss.item(), q_taken.mean().item()))
        return loss, q_taken

    monkeypatch.setattr(dqn, "td_loss", spy)
    run(train_frequency=1, learning_starts=50, total_timesteps=300)
    curves = curves_of(tmp_path / "run")
    logged = zip(curves["train/loss"], curves["train/q_taken"], strict=True)
    assert [(loss, q_taken) for (_, loss), (_, q_taken) in logged] == [seen[99], seen[199]]


def test_a_time_limit_replaces_the_environments_own():
    def length(**flags):
        env = dqn.make_env(dqn.Args(env_id="toy_envs:Truncated-v0", **flags))
        env.reset(seed=0)
        return next((t for t in range(1, 30) if any(env.step(0)[2:4])), None)

    assert length() == toy_envs.TIME_LIMIT
    assert length(time_limit=7) == 7
    assert length(time_limit=-1) is None


# --- Evaluation ---


class Uneven(toy_envs.Counting):
    """Environments with even numbers have long episodes, those with odd ones short episodes."""

    def length(self, number, episode):
        return 3 if number % 2 else 30


gym.register("Uneven-v0", entry_point=Uneven, disable_env_checker=True)


@pytest.mark.parametrize("env_id, num_episodes, lengths", [
    ("Uneven-v0", 5, [30, 30, 3, 3, 3]),  # the first five to end would be 3, 3, 3, 3, 3
    ("Uneven-v0", 1, [30]),
    ("toy_envs:Terminated-v0", 7, [4, 5, 3, 5, 3, 4, 5]),  # numbers 4 and 5: episodes of 4, 5, 3, ..., and of 5, 3, ...
])  # fmt: skip
def test_evaluation_plays_whole_episodes_fixed_beforehand(env_id, num_episodes, lengths, monkeypatch):
    monkeypatch.setattr(dqn.QNetwork, "forward", lambda self, obs: torch.eye(5)[1].expand(len(obs), 5))
    args = dqn.Args(env_id=env_id, gamma=0.1, num_envs=2)
    env = dqn.make_env(args)
    network = dqn.QNetwork(env.observation_space, env.action_space, args)
    assert dqn.evaluate(args, network, num_episodes, seed=4).tolist() == returns_with_action_1(lengths)


def test_evaluation_ends_without_a_time_limit():
    env = dqn.make_env(dqn.Args(env_id="toy_envs:Truncated-v0", time_limit=-1), evaluation=True)
    env.reset(seed=0)
    assert next(t for t in range(1, 20_000) if any(env.step(0)[2:4])) == 10_000


def test_the_best_network_is_kept_and_the_last_one_too(run, tmp_path, monkeypatch):
    scripted = iter([3.0, 9.0, 9.0, 4.0, 5.0, 6.0])
    calls = []

    def scripted_evaluate(args, network, num_episodes, seed, **env_options):
        calls.append((num_episodes, seed, copy.deepcopy(network.state_dict())))
        return next(scripted) + np.linspace(-1, 1, num_episodes)

    monkeypatch.setattr(dqn, "evaluate", scripted_evaluate)
    result = run(learning_starts=16, num_envs=2, eval_every=50, eval_episodes=4, final_eval_episodes=6)

    assert [num_episodes for num_episodes, _, _ in calls] == [4, 4, 4, 4, 6, 6]
    first, second, third, fourth, final, best = (parameters for _, _, parameters in calls)
    assert not same(first, second) and not same(second, third)
    saved = {name: checkpoint_of(tmp_path / "run", name) for name in ("best.pt", "last.pt")}
    assert same(saved["best.pt"]["network"], third) and same(best, third)  # of two that are as good, the later one
    assert same(saved["last.pt"]["network"], fourth) and same(final, fourth)
    assert [mean for _, mean, _ in result["evaluations"]] == [3, 9, 9, 4]
    assert [value for _, value in curves_of(tmp_path / "run")["eval/return_min"]] == [2, 8, 8, 3]
    assert (result["final_return_mean"], result["final_return_min"], result["best_return_mean"]) == (5, 4, 6)

    selection_seeds, final_seeds = {seed for _, seed, _ in calls[:4]}, {seed for _, seed, _ in calls[4:]}
    assert len(selection_seeds) == len(final_seeds) == 1
    assert selection_seeds != final_seeds


def test_evaluations_do_not_count_as_training(tmp_path, monkeypatch):
    now, step_wait = [0], dqn.DummyVecEnv.step_wait

    def training_takes_a_second_per_step(envs):
        now[0] += 1 if envs.num_envs == 2 else 1_000
        return step_wait(envs)

    monkeypatch.setattr(dqn.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(dqn.DummyVecEnv, "step_wait", training_takes_a_second_per_step)
    result = train("dqn_cartpole", tmp_path / "run", checkpoint_every=100)
    assert result["seconds"] == 200 and [seconds for *_, seconds in result["evaluations"]] == [100, 200]
    assert train("dqn_cartpole", "", resume=str(tmp_path / "run"), total_timesteps=600)["seconds"] == 300


# --- It learns ---


def learned_value(name, run_dir, **changes):
    """Train on reward 1 per step, truncated every 5 steps, with gamma 0.9; return V of its only state."""
    flags = {"gamma": 0.9, "learning_rate": 0.01, "learning_rate_end": 0.01, "tau": 1.0, "target_frequency": 20}
    flags |= {"total_timesteps": 1_200, "learning_starts": 50, "train_frequency": 1, "hidden_size": 16, "num_envs": 5}
    flags |= {"env_id": "toy_envs:Constant-v0", "eval_every": 10**9, "final_eval_episodes": 1, "loss": "mse"}
    train(name, run_dir, **flags, **changes)
    module = load(Path(name))
    env = module.make_env(args := module.Args(env_id="toy_envs:Constant-v0", hidden_size=16))
    network = module.QNetwork(env.observation_space, env.action_space, args)
    network.load_state_dict(checkpoint_of(run_dir)["network"])
    return network(torch.ones(1, 1)).max().item()


def test_truncation_does_not_end_the_value(tmp_path):
    assert learned_value("dqn_cartpole", tmp_path / "run") == pytest.approx(10, abs=0.5)


CARTPOLE = {
    **{"total_timesteps": 8_000, "num_envs": 8, "vec_env": "dummy", "seed": 1, "gamma": 0.99, "loss": "mse"},
    **{"learning_starts": 500, "train_frequency": 4, "target_frequency": 4, "tau": 0.05, "hidden_size": 64},
    **{"buffer_size": 15_000, "batch_size": 64, "learning_rate": 2e-3, "learning_rate_end": 0.0},
    **{"epsilon_start": 1.0, "epsilon_end": 0.1, "exploration_steps": 4_000},
    **{"eval_every": 10**9, "final_eval_episodes": 30},
}
LEARNED = 100.0  # seeds 1 to 6 reach 170 to 326


def test_it_learns_cartpole(tmp_path):
    assert train("dqn_cartpole", tmp_path / "run", **CARTPOLE)["final_return_mean"] > LEARNED


def test_an_untrained_network_has_not_learned():
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

    def broken(q_values, next_q_values, batch, *rest):
        batch = batch._replace(terminated=torch.zeros_like(batch.terminated))
        return td_loss(q_values, next_q_values, batch, *rest)

    monkeypatch.setattr(dqn, "td_loss", broken)
    assert train("dqn_cartpole", tmp_path / "run", **CARTPOLE)["final_return_mean"] < LEARNED / 2


# --- Resumed ---


def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, monkeypatch):
    """Where every step is an episode, so that environments which begin again change nothing."""
    flags = {"env_id": "toy_envs:Constant-v0", "time_limit": 1, "total_timesteps": 1_600, "train_frequency": 2}
    flags |= {"exploration_steps": 1_000, "checkpoint_every": 500, "buffer_size": 1_200}
    train("dqn_cartpole", tmp_path / "whole", **flags)

    def interrupted(run, **counts):
        tick(run, **counts)
        if counts["global_step"] == 900:  # after an evaluation and metrics that no checkpoint knows of
            run.csv.write("90")  # as where the kernel cut the last row short
            run.csv.flush()
            run.tensorboard.flush()
            raise Interrupted

    tick = dqn.Run.tick
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(dqn.Run, "tick", interrupted)
        train("dqn_cartpole", tmp_path / "parts", **flags)
    assert checkpoint_of(tmp_path / "parts")["counts"]["global_step"] == 500
    (events,) = (tmp_path / "parts").glob("events*")
    events.rename(events.with_name("events.out.tfevents.0"))  # TensorBoard reads files in the order of their names
    assert scalars_of(tmp_path / "parts")["eval/return_mean"][-1][0] == 800
    train("dqn_cartpole", "", **flags, resume=str(tmp_path / "parts"))

    whole, parts = (checkpoint_of(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() >= {"network", "target_network", "optimizer", "memory", "counts", "torch_rng"}
    for checkpoint in (whole, parts):
        checkpoint["args"] |= {"run_dir": "", "resume": ""}
        checkpoint["record"]["evaluations"] = [row[:2] for row in checkpoint["record"]["evaluations"]]
        del checkpoint["record"]["seconds"]
    assert [name for name in whole if not same(whole[name], parts[name])] == []
    assert (tmp_path / "whole" / "progress.csv").read_text() == (tmp_path / "parts" / "progress.csv").read_text()
    assert scalars_of(tmp_path / "whole") == scalars_of(tmp_path / "parts")


def test_a_resumed_run_begins_new_episodes(run, memories, tmp_path):
    flags = {"total_timesteps": 300, "learning_starts": 200, "num_envs": 2}
    run(**flags)
    train("dqn_cartpole", "", **{**TOY, **flags, "total_timesteps": 600}, resume=str(tmp_path / "run"))
    first, grown = (stored_transitions(memory, 2) for memory in memories)
    assert [rows[:150] for rows in grown] == first
    before, after = (numbers_after_checking("Mixed-v0", rows) for rows in (first, [rows[150:] for rows in grown]))
    assert not before & after  # and other ones than those that it has seen


@pytest.mark.parametrize("before, flags, steps", [
    (100, {"train_frequency": 8}, 400 // 8),
    (100, {"learning_starts": 500}, 300 // 4),
    (399, {"learning_starts": 100}, 400 // 4),  # nothing to catch up on, also where no gradient step was taken before
])  # fmt: skip
def test_a_resumed_run_trains_as_often_as_its_flags_say_from_there_on(before, flags, steps, run, tmp_path):
    assert run(total_timesteps=400, learning_starts=before, num_envs=2)["gradient_steps"] == (400 - before) // 4
    changes = {"num_envs": 2, "total_timesteps": 800, "learning_starts": 100, "optimizer_eps": 0.5, **flags}
    result = train("dqn_cartpole", "", **{**TOY, **changes}, resume=str(tmp_path / "run"))
    assert result["gradient_steps"] == (400 - before) // 4 + steps
    assert checkpoint_of(tmp_path / "run")["optimizer"]["param_groups"][0]["eps"] == 0.5


@pytest.fixture
def trained(tmp_path):
    """The directory of a short finished run."""
    train("dqn_cartpole", tmp_path / "trained")
    return tmp_path / "trained"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--hidden-size 32", ""),
        ("--buffer-size 500", "its replay memory has another --buffer-size"),
        ("--env-id Acrobot-v1", ""),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_one_line_and_nothing_is_written(flags, message, trained, cli):
    files = {file: file.read_bytes() for file in trained.iterdir()}
    status, _, err = cli("--resume", trained, *flags.split())
    assert status == 2
    assert f"{trained / 'last.pt'} cannot be used: {message}" in err and err.count("\n") == 1
    assert {file: file.read_bytes() for file in trained.iterdir()} == files


# --- Played ---


def test_a_window_shows_three_episodes(trained, cli, monkeypatch):
    frames, begun, render_frame, reset = [], [], CartPoleEnv.render, CartPoleEnv.reset
    monkeypatch.setattr(CartPoleEnv, "render", lambda env: frames.append(env.render_mode) or render_frame(env))

    def begin(env, *, seed=None, options=None):
        begun.append(seed)
        return reset(env, seed=seed, options=options)

    monkeypatch.setattr(CartPoleEnv, "reset", begin)
    status, out, _ = cli("--play", trained / "best.pt", "--render", "--time-limit", 5)
    assert status == 0 and out.count("return 5.0\n") == 3
    assert frames.count("human") > 3 * 5 and len(set(begun) - {None, 0}) == 3  # 0: to see whether it can be drawn


def test_a_window_is_refused_where_nothing_can_be_drawn(cli, tmp_path):
    train("dqn_cartpole", tmp_path / "run", env_id="toy_envs:Constant-v0")
    status, _, err = cli("--play", tmp_path / "run" / "best.pt", "--render")
    assert status == 2 and "--render True: this environment cannot draw itself" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_playing_a_checkpoint_tells_its_return(name, cli, tmp_path):
    run_dir = tmp_path / "run"
    train("dqn_cartpole", run_dir, env_id="toy_envs:Terminated-v0")
    args = dqn.Args(**small("dqn_cartpole", env_id="toy_envs:Terminated-v0"))
    env = dqn.make_env(args)
    network = dqn.QNetwork(env.observation_space, env.action_space, args)
    network.load_state_dict(checkpoint_of(run_dir, name)["network"])
    files = set(tmp_path.rglob("*"))
    for seed in (7, 8):  # episodes of 4 and 5 steps, and of 5 and 3
        status, out, _ = cli("--play", run_dir / name, "--final-eval-episodes", 2, "--seed", seed)
        assert status == 0
        returns = dqn.evaluate(args, network, 2, seed)
        assert f"return {returns.mean():.1f} over 2 episodes ({returns.min():.4g} to {returns.max():.4g})" in out
    assert set(tmp_path.rglob("*")) == files


@pytest.mark.parametrize("flag, value, given", [
    ("device", "cuda:9", ["--device", "cpu"]), ("track", "wandb", []), ("video", True, []), ("earlier_flag", 1, []),
])  # fmt: skip
def test_what_another_machine_run_or_version_had_can_be_done_without(flag, value, given, trained, cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    for name in ("best.pt", "last.pt"):
        checkpoint = checkpoint_of(trained, name)
        checkpoint["args"][flag] = value
        torch.save(checkpoint, trained / name)
    status, out, _ = cli("--play", trained / "best.pt", "--final-eval-episodes", 1, *given)
    assert status == 0 and "over 1 episodes" in out
    assert cli("--resume", trained, "--total-timesteps", 500, *given)[0] == 0
    assert not (trained / "videos").exists()


def test_a_film_shows_the_best_network(tmp_path):
    run_dir = tmp_path / "run"
    result = train("dqn_cartpole", run_dir, video=True, final_eval_episodes=1)
    (film,) = (run_dir / "videos").glob("*.mp4")
    with moviepy.VideoFileClip(str(film)) as clip:
        first, last = clip.get_frame(0), clip.get_frame(clip.duration - 1 / clip.fps)
        assert 1 <= clip.n_frames - result["best_return_mean"] <= 2  # the first frame, and one for each step
    assert first.std() > 10 and (first != last).any()  # not blank, and something moves


def test_a_film_of_a_checkpoint_lies_beside_it(trained, cli):
    status, out, _ = cli("--play", trained / "best.pt", "--video")
    assert status == 0 and "in place of" not in out  # what asks for the film is no change of the saved flags
    assert f"film: {trained / 'videos' / 'rl-video-episode-0.mp4'}" in out
    assert (trained / "videos" / "rl-video-episode-0.mp4").stat().st_size > 1_000
