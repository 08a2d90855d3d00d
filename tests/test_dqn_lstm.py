"""Recurrent DQN: sequences, hidden states, what carries loss, and that its memory remembers."""

from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy_envs
from conftest import same
from gymnasium.envs.classic_control import CartPoleEnv

import dqn_lstm_cartpole as lstm

CPU = torch.device("cpu")
NEXT = np.array([0, 0, 1], np.float32)  # an observation of random_memory is [environment, episode, step]
COLUMNS = ("obs", "actions", "rewards", "next_obs", "terminated", "steps", "states")


def options(tmp_path, **changes):
    """Flags of a short run on a toy environment that learns nothing until its last steps."""
    flags = {"env_id": "toy_envs:Mixed-v0", "hide": "none", "run_dir": str(tmp_path / "run"), "num_envs": 3}
    flags |= {"total_timesteps": 200, "learning_starts": 190, "train_frequency": 4, "target_frequency": 10}
    flags |= {"batch_size": 16, "buffer_size": 1_000, "hidden_size": 8, "sequence_length": 3, "burn_in": 2}
    flags |= {"eval_every": 10**9, "final_eval_episodes": 1, "checkpoint_every": 10**9}
    return lstm.Args(**{**flags, **changes})


def make_network(args, seed=0):
    torch.manual_seed(seed)
    env = lstm.make_env(args)
    return lstm.QNetwork(env.observation_space, env.action_space, args)


@pytest.fixture
def memories(monkeypatch):
    """The replay memories that `train` makes."""
    made = []

    class Kept(lstm.ReplayMemory):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(lstm, "ReplayMemory", Kept)
    return made


def rows_of(memory):
    """Return the transitions of each environment, oldest first: {environment: [{column: value}, ...]}."""
    slots = np.arange(max(0, memory.added - memory.capacity), memory.added) % memory.capacity
    columns = {name: memory.columns[name].numpy()[slots] for name in COLUMNS}
    rows = [{name: column[i] for name, column in columns.items()} for i in range(len(slots))]
    return {env: rows[env :: memory.num_envs] for env in range(memory.num_envs)}


# --- What the agent sees ---


def test_velocities_are_hidden_and_the_last_action_is_shown():
    hidden, plain = (lstm.make_env(lstm.Args(hide=hide)) for hide in ("velocity", "none"))
    (seen, _), (full, _) = hidden.reset(seed=3), plain.reset(seed=3)
    state = plain.unwrapped.state / np.array([0.1, 0.5, 0.02, 0.5])
    assert full.tolist() == pytest.approx([*state, 0, 0], rel=1e-5)
    assert seen.tolist() == [full[0], full[2], 0, 0]
    for action in (1, 0, 1):
        seen, full = hidden.step(action)[0], plain.step(action)[0]
        assert seen.tolist() == [full[0], full[2], 1 - action, action]
        assert full.tolist()[4:] == [1 - action, action]
        assert seen.dtype == full.dtype == np.float32
        assert hidden.observation_space.contains(seen) and plain.observation_space.contains(full)
    assert hidden.reset()[0].tolist()[2:] == [0, 0]


gym.register("OtherCartPole-v0", entry_point=CartPoleEnv, max_episode_steps=100)


@pytest.mark.parametrize("hide", ["velocity", "none"])
@pytest.mark.parametrize("env_id, size", [("toy_envs:Positions-v0", 2), ("OtherCartPole-v0", 4), ("Acrobot-v1", 6)])
def test_hide_has_no_effect_on_any_other_environment(env_id, size, hide):
    env, plain = lstm.make_env(lstm.Args(env_id=env_id, hide=hide)), gym.make(env_id)
    assert env.reset(seed=3)[0].tolist() == [*plain.reset(seed=3)[0].tolist(), *[0] * env.action_space.n]
    assert env.step(1)[0][:size].tolist() == plain.step(1)[0].tolist()


def test_cartpole_v0_hides_its_velocities_too():
    assert lstm.make_env(lstm.Args(env_id="CartPole-v0")).reset(seed=3)[0].shape == (4,)


# --- What is stored ---


def what_happened(env_id, number, actions):
    """Replay an environment by the rules in its docstring, without its code."""
    limit = toy_envs.COUNTING[env_id].get("max_episode_steps", np.inf)
    lengths = toy_envs.COUNTING[env_id].get("kwargs", {}).get("lengths", [np.inf])
    one_hot = {-1: [0] * 5, **{action: np.eye(5)[action].tolist() for action in range(5)}}
    episode, step, last = 0, 0, -1
    for action in actions:
        length = lengths[(number + episode) % len(lengths)]
        obs, next_obs = [number, episode, step, last, *one_hot[last]], [number, episode, step + 1, action]
        yield obs, step + action / 2, next_obs + one_hot[action], float(step + 1 == length), step
        step, last = step + 1, action
        if step >= min(length, limit):
            episode, step, last = episode + 1, 0, -1


@pytest.mark.parametrize("env_id", toy_envs.COUNTING)
def test_memory_holds_exactly_what_happened(env_id, tmp_path, memories):
    lstm.train(options(tmp_path, env_id=f"toy_envs:{env_id}"))
    for rows in rows_of(memories[0]).values():
        assert len(rows) == 67
        expected = what_happened(env_id, int(rows[0]["obs"][0]), [row["actions"] for row in rows])
        for row, (obs, reward, next_obs, terminated, step) in zip(rows, expected, strict=True):
            assert (row["obs"].tolist(), row["next_obs"].tolist()) == (obs, next_obs)
            assert (row["rewards"], row["terminated"], row["steps"]) == (reward, terminated, step)


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_states_begin_at_zero_and_move_with_every_observation(epsilon, tmp_path, memories):
    # Episodes of Mixed-v0 terminate, or are truncated, or both. The network stays as it is until transition 199.
    flags = {"epsilon_start": epsilon, "epsilon_end": epsilon, "num_layers": 2, "learning_starts": 199}
    args = options(tmp_path, train_frequency=1, num_envs=2, **flags)
    lstm.train(args)
    torch.manual_seed(args.seed)
    env = lstm.make_env(args)
    network = lstm.QNetwork(env.observation_space, env.action_space, args)  # as train made it
    for rows in rows_of(memories[0]).values():
        lengths, previous = set(), 0
        for row in rows:
            if row["steps"] == 0:
                lengths.add(previous)
                state = network.initial_state(1)
            previous = row["steps"] + 1
            torch.testing.assert_close(torch.from_numpy(row["states"]), state[0], rtol=0, atol=1e-6)
            with torch.no_grad():
                q_values, state = network(torch.from_numpy(row["obs"]).reshape(1, 1, -1), state)
            if epsilon == 0:
                assert row["actions"] == q_values.argmax()
            assert state.abs().sum() > 0
        assert lengths >= {3, 4}  # some terminated, some were truncated


# --- Sequences ---


def random_memory(num_envs=3, capacity=60, transitions=150, end_rate=0.2, obs_dim=3, state_shape=(2, 1, 4), seed=0):
    """Episodes of random length; an observation is [environment, episode, step], a state and a reward tell the same."""
    rng = np.random.default_rng(seed)
    memory = lstm.ReplayMemory(capacity, num_envs, obs_dim, state_shape)
    episodes, steps = np.zeros(num_envs, int), np.zeros(num_envs, int)
    ends = {}  # (environment, episode): its number of steps, where it ended
    for _ in range(transitions // num_envs):
        obs = np.stack([np.arange(num_envs), episodes, steps], axis=1).astype(np.float32)
        ended = rng.random(num_envs) < end_rate
        terminated = ended & (rng.random(num_envs) < 0.5)
        states = np.tile(steps[:, None, None, None], state_shape)
        memory.add(obs, steps % 2, steps / 4, obs + NEXT, terminated, steps, states)
        for env in np.flatnonzero(ended):
            ends[env, episodes[env]] = steps[env] + 1, terminated[env]
        episodes, steps = episodes + ended, np.where(ended, 0, steps + 1)
    return memory, ends


SHAPES = [(1, 0), (4, 0), (1, 1), (3, 2), (8, 4), (10, 5)]  # length, burn_in


@pytest.mark.parametrize("length, burn_in", SHAPES)
@pytest.mark.parametrize("capacity, transitions", [(60, 3), (60, 45), (60, 150), (10, 150), (3, 30)])
@pytest.mark.parametrize("end_rate", [0.0, 0.15, 1.0])
def test_a_sequence_is_a_stretch_of_one_episode(length, burn_in, capacity, transitions, end_rate):
    memory, ends = random_memory(capacity=capacity, transitions=transitions, end_rate=end_rate)
    assert capacity <= memory.capacity < capacity + 3
    held = {tuple(row["obs"]) for rows in rows_of(memory).values() for row in rows}
    torch.manual_seed(0)
    batch = memory.sample(400, length, burn_in, CPU)
    assert batch.obs.shape == (burn_in + length + 1, 400, 3) and batch.state.shape == (400, 2, 1, 4)
    assert batch.loss_mask.shape == (length, 400) and batch.burned_in.shape == (400,)
    assert batch.actions.shape == batch.rewards.shape == batch.terminated.shape == batch.loss_mask.shape
    learned = set()
    for i in range(400):
        begin = 0 if batch.burned_in[i] else burn_in
        env, episode, first = batch.obs[begin, i].tolist()
        assert (batch.state[i] == first).all()
        # Less than the whole burn-in only where the episode begins, or the ring has forgotten what was before.
        assert batch.burned_in[i] or first == 0 or (env, episode, first - 1) not in held
        carrying = int(batch.loss_mask[:, i].sum())
        assert carrying > 0 and batch.loss_mask[:carrying, i].all()
        end = burn_in + carrying
        assert batch.obs[begin : end + 1, i].tolist() == [[env, episode, first + k] for k in range(end + 1 - begin)]
        for k in range(carrying):
            step = first + burn_in - begin + k
            assert (batch.actions[k, i], batch.rewards[k, i]) == (step % 2, step / 4)
            assert batch.terminated[k, i] == (ends.get((env, episode)) == (step + 1, True))
            learned.add((env, episode, step))
        # It ends only where the window, the episode or the memory ends.
        assert carrying == length or (env, episode, step + 1) not in held
    assert learned == held  # 400 draws miss one of 60 with a chance of 0.001 each, at this seed none


def test_what_is_drawn_stands_anywhere_in_its_sequence():
    memory, _ = random_memory(num_envs=1, transitions=30, end_rate=0.0)  # one episode, of 30 steps
    torch.manual_seed(0)
    batch = memory.sample(20_000, 6, 4, CPU)
    carried = torch.bincount(batch.obs[4:-1, :, 2][batch.loss_mask].long(), minlength=30) / 20_000
    expected = np.zeros(30)
    for drawn in range(30):
        for back in range(6):
            first = drawn - back if drawn - back >= 4 else 0
            expected[first : first + 6] += 1 / (30 * 6)
    np.testing.assert_allclose(carried, expected, atol=0.015)
    assert expected[-1] < 0.6 * expected[15]


def test_a_sequence_is_no_copy_of_the_memory():
    memory, _ = random_memory()
    batch = memory.sample(50, 3, 2, CPU)
    before = [column.clone() for column in batch]
    for column in memory.columns.values():
        column.fill_(7)
    assert all(torch.equal(a, b) for a, b in zip(batch, before, strict=True))


def test_a_restored_memory_does_not_join_the_episodes_before_and_after(tmp_path):
    memory, _ = random_memory(capacity=300, transitions=60, end_rate=0.0)
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    restored = lstm.ReplayMemory(300, 3, 3, (2, 1, 4))
    restored.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    for step in range(5):  # new episodes: number 9
        obs = np.array([[env, 9, step] for env in range(3)], np.float32)
        steps = np.full(3, step)
        restored.add(obs, steps, steps, obs + NEXT, np.zeros(3), steps, np.zeros((3, 2, 1, 4)))
    batch = restored.sample(500, 6, 3, CPU)
    episodes, burned_in = batch.obs[..., 1], batch.burned_in
    assert {0, 9} == set(episodes[3].tolist())
    for steps in (episodes[3:-1], episodes[4:]):
        assert (steps == episodes[3])[batch.loss_mask].all()
    assert (episodes[:3, burned_in] == episodes[3, burned_in]).all() and burned_in.any() and not burned_in.all()


@pytest.mark.parametrize("capacity, num_envs", [(300, 2), (600, 3), (150, 3), (1, 3)])
def test_a_memory_of_another_shape_is_refused(capacity, num_envs):
    state = random_memory(capacity=300, num_envs=3)[0].state_dict()
    memory = lstm.ReplayMemory(capacity, num_envs, 3, (2, 1, 4))
    with pytest.raises(ValueError, match="another --buffer-size or --num-envs"):
        memory.load_state_dict(state)
    assert memory.added == 0


# --- The unrolled network ---


@pytest.fixture(params=["lstm", "none"])
def network(request):
    return make_network(lstm.Args(hide="none", memory=request.param, num_layers=2, hidden_size=16))


def random_batch(network, burn_in, burned_in, learn):
    """A batch of random observations, states and actions; learn (T, B)."""
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(burn_in + len(learn) + 1, len(burned_in), 6, generator=generator)
    state = torch.randn(len(burned_in), 2, 2, 16, generator=generator) * 0.5
    actions, ones = torch.randint(2, learn.shape, generator=generator), torch.ones(learn.shape)
    return lstm.Batch(obs, state, torch.tensor(burned_in), learn, actions, ones, 0.0 * ones)


@pytest.mark.parametrize("burn_in", [0, 3])
def test_unrolling_a_sequence_equals_stepping_through_it(network, burn_in):
    batch = random_batch(network, burn_in, [True, False, False, True], torch.ones(6, 4, dtype=torch.bool))
    with torch.no_grad():
        unrolled = lstm.unroll(network, batch, burn_in)
        assert unrolled.shape == (7, 4, 2)
        for i, burned_in in enumerate(batch.burned_in):
            state, stepped = batch.state[i : i + 1], []
            for obs in batch.obs[0 if burned_in else burn_in :, i]:
                q_values, state = network(obs.reshape(1, 1, 6), state)
                stepped.append(q_values[0, 0])
            torch.testing.assert_close(unrolled[:, i], torch.stack(stepped[-7:]), rtol=0, atol=1e-6)


def test_only_the_lstm_remembers():
    for memory, remembers in (("lstm", True), ("none", False)):
        network = make_network(lstm.Args(hide="none", memory=memory))
        obs = torch.zeros(4, 2, 6)
        obs[0, 1] = 1.0  # two histories that differ in their first observation
        last = network(obs, network.initial_state(2))[0][-1]
        assert torch.equal(last[0], last[1]) != remembers


def test_the_control_is_as_wide_and_as_deep():
    for memory in ("lstm", "none"):
        network, seen = make_network(lstm.Args(hidden_size=32, num_layers=3, memory=memory)), []
        network.head.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        network(torch.randn(5, 2, 4), network.initial_state(2))
        assert [features.shape for features in seen] == [(5, 2, 32)]
        assert memory == "lstm" or (seen[0] >= 0).all()  # ReLUs: linear layers alone would be no fair control
        layers = network.lstm.num_layers if memory == "lstm" else len(network.layers)
        assert layers == 3


def test_forget_gates_start_open():
    network = make_network(lstm.Args(hidden_size=8, num_layers=2))
    for layer in range(2):
        inputs, forget, cell, output = getattr(network.lstm, f"bias_ih_l{layer}").detach().split(8)
        assert (forget == 2.0).all() and torch.cat([inputs, cell, output]).abs().max() < 1.0


def loss_of(network, batch, burn_in, n_step=1):
    with torch.no_grad():
        next_q_values = lstm.unroll(network, batch, burn_in)[1:]
    return lstm.td_loss(lstm.unroll(network, batch, burn_in)[:-1], next_q_values, batch, 0.9, n_step, F.mse_loss)[0]


def test_no_gradient_from_burn_in_and_padding():
    network = make_network(lstm.Args(hide="none", num_layers=2, hidden_size=16))
    # Sequences: begins with its episode; begins within it; the same, and ends 2 steps before the window.
    learn = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0]], dtype=torch.bool)
    batch = random_batch(network, 3, [False, True, True], learn)
    batch.obs.requires_grad_()
    batch.state.requires_grad_()
    loss_of(network, batch, 3).backward()
    moved = (batch.obs.grad != 0).any(dim=2)  # (burn_in + T + 1, B)
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert torch.equal(moved, torch.cat([nothing, nothing, nothing, learn, nothing]))  # the last: for the target only


@pytest.mark.parametrize("burned_in", [True, False])
def test_no_loss_from_burn_in_and_padding(burned_in):
    network = make_network(lstm.Args(hide="none", num_layers=2, hidden_size=16))
    batch = random_batch(network, 3, [burned_in], torch.tensor([[1], [1], [1], [0], [0]], dtype=torch.bool))
    loss = loss_of(network, batch, 3)
    matters = [burned_in] * 3 + [True] * 4 + [False] * 2  # three steps with loss, and the one to bootstrap from
    for position in range(9):
        obs = batch.obs.clone()
        obs[position] += 10.0
        assert (loss_of(network, batch._replace(obs=obs), 3) != loss) == matters[position]
    # The burn-in matters through the state alone: the loss is that of what follows, from the state after it.
    with torch.no_grad():
        state = network(batch.obs[:3], batch.state)[1] if burned_in else batch.state
    torch.testing.assert_close(loss_of(network, batch._replace(obs=batch.obs[3:], state=state), 0), loss)


@pytest.mark.parametrize("initial_state", ["stored", "zero"])
def test_a_sequence_starts_from_the_state_of_that_time_or_from_zero(initial_state, tmp_path, monkeypatch):
    batches, unroll = [], lstm.unroll
    monkeypatch.setattr(lstm, "unroll", lambda net, batch, n: batches.append((net, batch)) or unroll(net, batch, n))
    flags = {"env_id": "toy_envs:Truncated-v0", "learning_starts": 150, "sequence_length": 2, "burn_in": 1}
    lstm.train(options(tmp_path, initial_state=initial_state, **flags))
    assert len({id(network) for network, _ in batches}) == 2 and len(batches) == 2 * ((201 - 150) // 4)
    for _, batch in batches:
        begun = batch.state.abs().sum(dim=(1, 2, 3)) > 0  # (B,)
        first = torch.where(batch.burned_in.unsqueeze(1), batch.obs[0], batch.obs[1])[:, 2]  # its step
        assert torch.equal(begun, (first > 0) if initial_state == "stored" else torch.zeros(16, dtype=torch.bool))
        assert (first == 0).any() and (first > 0).any()
    for (_, online), (_, target) in zip(batches[1::2], batches[::2], strict=True):
        assert online is target  # the same sequence


# --- Hidden states where episodes begin ---


class StepCounter(lstm.QNetwork):
    """A network whose state counts the observations since it was zero, and whose greedy action is that count, mod 5."""

    def forward(self, obs, state):
        state = state + 1
        count = state[:, 0, 0, 0].long() - 1
        return torch.eye(5)[count % 5].unsqueeze(0).expand(len(obs), -1, -1) + 0 * self.head[0].weight.sum(), state


def test_each_environment_has_its_own_state_that_begins_with_the_episode(tmp_path, memories, monkeypatch):
    monkeypatch.setattr(lstm, "QNetwork", StepCounter)
    greedy = {"epsilon_start": 0.0, "epsilon_end": 0.0, "learning_starts": 200, "total_timesteps": 201, "num_envs": 3}
    for env_id in ("Terminated-v0", "Truncated-v0", "Mixed-v0"):
        lstm.train(options(tmp_path / env_id, env_id=f"toy_envs:{env_id}", **greedy))
        for rows in rows_of(memories.pop()).values():
            assert [row["actions"] for row in rows] == [row["steps"] % 5 for row in rows]
            assert {row["steps"] for row in rows} >= {0, 1, 2, 3}


@pytest.mark.parametrize("num_envs", [1, 3, 16])
def test_evaluation_carries_a_state_per_episode(num_envs):
    """Each greedy action of StepCounter is the step, if the state was zero where the episode began."""
    args = lstm.Args(env_id="toy_envs:Terminated-v0", num_envs=num_envs)
    env = lstm.make_env(args)
    returns = lstm.evaluate(args, StepCounter(env.observation_space, env.action_space, args), 7, seed=5)
    episodes = {1: [(0, 7)], 3: [(0, 2), (1, 2), (2, 3)], 16: [(i, 1) for i in range(7)]}[num_envs]  # of environment i
    lengths = [toy_envs.LENGTHS[(5 + i + episode) % 3] for i, count in episodes for episode in range(count)]
    assert returns.tolist() == [sum(step + step / 2 for step in range(length)) for length in lengths]


# --- It learns ---

CUE = {
    **{"env_id": "toy_envs:Cue-v0", "total_timesteps": 6_000, "learning_starts": 500, "train_frequency": 8},
    **{"target_frequency": 8, "tau": 0.05, "gamma": 0.9, "batch_size": 32, "hidden_size": 16, "num_envs": 8},
    **{"sequence_length": 4, "burn_in": 0, "learning_rate": 1e-2, "epsilon_end": 0.1, "exploration_steps": 3_000},
    **{"buffer_size": 6_000, "final_eval_episodes": 100},
}


@pytest.mark.parametrize("initial_state", ["stored", "zero"])
def test_the_lstm_remembers_a_cue(initial_state, tmp_path):
    result = lstm.train(options(tmp_path, **CUE, initial_state=initial_state))
    assert result["final_return_mean"] > 0.95


def test_without_memory_a_cue_is_lost(tmp_path):
    result = lstm.train(options(tmp_path, **CUE, memory="none"))
    assert 0.3 < result["final_return_mean"] < 0.7  # 100 coins


# --- The same again ---


def parameters_after(args):
    lstm.train(args)
    return torch.load(Path(args.run_dir, "last.pt"), weights_only=True)["network"]


SHORT = {"env_id": "CartPole-v1", "hide": "velocity", "total_timesteps": 400, "learning_starts": 100, "num_envs": 2}


@pytest.mark.parametrize("average_steps", [1, 4, 100])
def test_what_is_kept_is_the_average_of_the_online_network(average_steps, tmp_path, monkeypatch):
    online, loss = [], lstm.td_loss
    networks = []
    monkeypatch.setattr(lstm, "unroll", lambda net, *rest, call=lstm.unroll: networks.append(net) or call(net, *rest))

    def watched(*inputs):  # networks[-1] is the online one, with the weights of before this gradient step
        online.append(torch.cat([p.detach().flatten() for p in networks[-1].parameters()]))
        return loss(*inputs)

    monkeypatch.setattr(lstm, "td_loss", watched)
    args = options(tmp_path, **SHORT, average_steps=average_steps, learning_rate=0.01)
    lstm.train(args)
    last = torch.load(Path(args.run_dir, "last.pt"), weights_only=True)
    online.append(torch.cat([p.flatten() for p in last["online_network"].values()]))
    mean = online[1]
    for k in range(2, len(online)):  # after k gradient steps
        mean = mean + (online[k] - mean) / min(k, average_steps)
    assert len(online) > 20 and not torch.equal(online[1], online[-1])
    kept = torch.cat([p.flatten() for p in last["network"].values()])
    torch.testing.assert_close(kept, mean, rtol=1e-4, atol=1e-6)
    assert torch.equal(kept, online[-1]) == (average_steps == 1)


def test_the_online_network_acts(tmp_path, monkeypatch):
    actors, forward = set(), lstm.QNetwork.forward

    def watched(network, obs, state):
        if len(obs) == 1 and not torch.is_grad_enabled():  # one step of the environments
            actors.add(network)
        return forward(network, obs, state)

    monkeypatch.setattr(lstm.QNetwork, "forward", watched)
    monkeypatch.setattr(lstm, "evaluate", lambda args, network, num_episodes, seed: np.zeros(num_episodes))
    lstm.train(args := options(tmp_path, **SHORT, target_frequency=10**6))
    (actor,) = actors
    last = torch.load(Path(args.run_dir, "last.pt"), weights_only=True)
    assert same(dict(actor.state_dict()), last["online_network"])
    assert not same(last["online_network"], last["target_network"])


def test_the_loss_gets_gamma_and_n_of_the_flags(tmp_path, monkeypatch):
    seen, td_loss = set(), lstm.td_loss

    def spy(q_values, next_q_values, batch, gamma, n_step, loss_function):
        seen.add((gamma, n_step))
        return td_loss(q_values, next_q_values, batch, gamma, n_step, loss_function)

    monkeypatch.setattr(lstm, "td_loss", spy)
    lstm.train(options(tmp_path, **SHORT, gamma=0.7, n_step=3))
    assert seen == {(0.7, 3)}


@pytest.mark.parametrize("largest", [0.0, 1e-3])
def test_the_gradient_is_clipped(largest, tmp_path, monkeypatch):
    norms, step = [], torch.optim.Adam.step

    def watched(optimizer):
        grads = [parameter.grad.flatten() for parameter in optimizer.param_groups[0]["params"]]
        norms.append(torch.cat(grads).norm().item())
        step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    lstm.train(options(tmp_path, **SHORT, max_grad_norm=largest))
    assert len(norms) == (400 - 100) // 4
    assert max(norms) == pytest.approx(1e-3, rel=0.01) if largest else min(norms) > 1e-3


def test_a_resumed_run_begins_new_episodes_and_no_sequence_joins_the_old_ones(tmp_path, memories):
    args = options(tmp_path, **{**SHORT, "env_id": "toy_envs:Constant-v0", "time_limit": 60})
    lstm.train(args)
    result = lstm.train(replace(args, run_dir="", resume=args.run_dir, total_timesteps=500))
    assert (result["global_step"], result["gradient_steps"]) == (500, (500 - 100) // 4)
    memory = memories[-1]
    for rows in rows_of(memory).values():
        assert [row["steps"] for row in rows[195:205]] == [15, 16, 17, 18, 19, 0, 1, 2, 3, 4]
        assert [bool(row["states"].any()) for row in rows[195:205]] == [step != 200 for step in range(195, 205)]
    memory.columns["rewards"][:] = torch.arange(memory.capacity) // 2  # each tells its row
    batch = memory.sample(2_000, 6, 3, CPU)
    first, last = batch.rewards[0], (batch.rewards * batch.loss_mask).amax(0)
    started = first - 3 * batch.burned_in  # the row from which it is read
    assert {195, 199, 200, 203} <= set(first.tolist())
    assert ((started >= 200) == (last >= 200)).all()


# --- The TD target ---


def targets_by_hand(q, r, terminated, learn, next_max, gamma, n):
    """The n-step target of one sequence, by a loop over its rewards."""
    found = []
    for t in range(len(r)):
        if not learn[t]:
            continue
        total, k = 0.0, 0
        while True:
            total += gamma**k * r[t + k]
            k += 1
            if terminated[t + k - 1]:
                break
            if k == n or t + k == len(r) or not learn[t + k]:
                total += gamma**k * next_max[t + k - 1]
                break
        found.append(total)
    return found


@pytest.mark.parametrize("n_step", [1, 2, 3, 6])
def test_n_step_targets_by_hand(n_step):
    rng = torch.Generator().manual_seed(n_step)
    length, sequences = 6, 40
    lengths = torch.randint(1, length + 1, (sequences,), generator=rng)
    learn = torch.arange(length)[:, None] < lengths  # some end before the window: terminated, or out of time
    terminated = torch.zeros(length, sequences)
    fell = torch.rand(sequences, generator=rng) < 0.5
    terminated[(lengths - 1)[fell], torch.arange(sequences)[fell]] = 1.0
    q_values, next_q_values = (torch.randn(length, sequences, 2, generator=rng) for _ in range(2))
    actions, rewards = (
        torch.randint(2, (length, sequences), generator=rng),
        torch.randn(length, sequences, generator=rng),
    )
    batch = lstm.Batch(None, None, None, learn, actions, rewards, terminated)
    loss, q_taken = lstm.td_loss(q_values, next_q_values, batch, 0.9, n_step, F.mse_loss)

    errors, taken = [], q_values.gather(2, actions[..., None])[..., 0]
    for i in range(sequences):
        columns = (column[:, i].tolist() for column in (taken, rewards, terminated, learn, next_q_values.amax(2)))
        q, *rest = columns
        targets = targets_by_hand(q, *rest, 0.9, n_step)
        errors += [(target - q[t]) ** 2 for t, target in enumerate(targets)]
    assert len(q_taken) == len(errors) == lengths.sum()
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-5)
    # Padding that holds anything else changes nothing.
    noisy = batch._replace(rewards=torch.where(learn, rewards, 99.0))
    assert lstm.td_loss(q_values, next_q_values, noisy, 0.9, n_step, F.mse_loss)[0] == loss
    square = lstm.Batch(None, None, None, *(column[:, :length] for column in batch[3:]))
    for column in ("rewards", "terminated"):  # (T, B, 1) would broadcast where T = B
        wide = square._replace(**{column: getattr(square, column)[:, :, None]})
        with pytest.raises(AssertionError):
            lstm.td_loss(q_values[:, :length], next_q_values[:, :length], wide, 0.9, 1, F.mse_loss)


# --- What both networks remember ---


class HistoryCounter(lstm.QNetwork):
    """A network whose state and Q-values count the observations read since the state was zero."""

    def read(self, obs, state):
        return state[:, 0, 0, :1] + torch.arange(1, len(obs) + 1).reshape(-1, 1, 1), state + len(obs)  # (T, B, 1)

    def forward(self, obs, state):
        count, state = self.read(obs, state)
        return count.expand(-1, -1, 5) + 0 * self.head[0].weight.sum(), state


@pytest.mark.parametrize("burn_in", [0, 2])
def test_both_networks_know_the_episode_up_to_the_step_that_they_judge(burn_in, tmp_path, monkeypatch):
    batches, td_loss = [], lstm.td_loss

    def spy(q_values, next_q_values, batch, *rest):
        steps, next_steps = batch.obs[burn_in:-1, :, 2], batch.obs[burn_in + 1 :, :, 2]  # an observation tells its own
        torch.testing.assert_close(q_values[..., 0][batch.loss_mask], steps[batch.loss_mask] + 1)
        torch.testing.assert_close(next_q_values[..., 0][batch.loss_mask], next_steps[batch.loss_mask] + 1)
        batches.append(batch)
        return td_loss(q_values, next_q_values, batch, *rest)

    monkeypatch.setattr(lstm, "QNetwork", HistoryCounter)
    monkeypatch.setattr(lstm, "td_loss", spy)
    lstm.train(options(tmp_path, env_id="toy_envs:Terminated-v0", learning_starts=100, burn_in=burn_in))
    assert len(batches) == (201 - 100) // 4
