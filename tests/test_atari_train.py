"""dqn_atari.py as a whole, on short runs of real games: learning rate, precision, counts, resume, memory, learning."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_envs
from conftest import ROOT, count_updates

import dqn_atari
from dqn_atari import Args, QNetwork, fit_memory, make_env, push_frames, train

SHORT = {
    **{"total_timesteps": 600, "learning_starts": 200, "buffer_size": 1_000, "num_envs": 2, "vec_env": "dummy"},
    **{"time_limit": 30, "eval_every": 10_000, "batch_size": 4, "train_frequency": 4},
    **{"eval_episodes": 1, "final_eval_episodes": 1},
    **{"precision": "float32"},
}


def run(tmp_path, name="run", **changes):
    return train(Args(**{**SHORT, "run_dir": str(tmp_path / name), **changes}))


def test_it_learns_from_frames_that_are_no_atari_game(tmp_path):
    flags = {"total_timesteps": 1_400, "train_frequency": 4, "network": "nips", "init": "he", "learning_rate": 5e-4}
    flags |= {"gamma": 0.0, "exploration_steps": 600, "batch_size": 16, "eval_epsilon": 0.0, "final_eval_episodes": 6}
    result = run(tmp_path, env_id="toy_envs:Squares-v0", **flags | {"time_limit": None})
    assert result["final_return_mean"] == 56  # 8 steps of 7: whole episodes, raw rewards; at random: 24


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_no_number_ends_the_run_at_its_step(reward, tmp_path, monkeypatch):
    step = toy_envs.Squares.step
    spoiled = lambda env, action: (*step(env, action)[:1], reward, *step(env, action)[2:])  # noqa: E731
    monkeypatch.setattr(toy_envs.Squares, "step", spoiled)
    with pytest.raises(SystemExit, match="reward is not finite at step 2"):
        run(tmp_path, env_id="toy_envs:Squares-v0")


# --- The optimiser, the memory ---


def test_the_learning_rate_goes_to_its_end_in_a_straight_line(tmp_path, monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def watched(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    run(tmp_path, learning_rate=0.01, learning_rate_end=0.02, learning_rate_steps=400, batch_size=1, train_frequency=4)
    steps = np.minimum(np.arange(204, 601, 4), 400) / 400  # a gradient step per 4 transitions after 200, of 600
    assert rates == pytest.approx(0.01 + steps * (0.02 - 0.01))


def test_denormal_numbers_count_as_zeros_while_it_trains(tmp_path, monkeypatch):
    seen, step = [], torch.optim.Adam.step

    def watched(optimizer):
        seen.append((torch.tensor([1e-39]) * 1.0).item())
        step(optimizer)

    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    torch.set_flush_denormal(False)
    assert (torch.tensor([1e-39]) * 1.0).item() > 0.0
    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    run(tmp_path, total_timesteps=220)
    assert seen == [0.0] * 5


@pytest.mark.parametrize("free, limit", [(1.3e9, "max"), (9e9, 1_900_000_000)], ids=["machine", "container"])
def test_a_memory_that_does_not_fit_shrinks_unless_it_was_asked_for(free, limit, tmp_path, monkeypatch, capsys):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.stat").write_text("anon 600000000\nfile 900000000\n")
    monkeypatch.setattr(dqn_atari, "CONTAINER_LIMIT", tmp_path / "memory.max")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    fit_memory(default := Args())
    assert default.buffer_size == 114_666  # 0.81 GB: room is left for other things, and for less room at a resume
    assert "the replay memory holds 114,666 frames, not 1,000,000: 0.9 of what fits" in capsys.readouterr().out
    fit_memory(asked := Args(buffer_size=127_000))  # 0.9 GB
    assert asked.buffer_size == 127_000 and capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="--buffer-size 130000: 127,406 frames fit"):
        fit_memory(Args(buffer_size=130_000))
    with pytest.raises(ValueError, match="--learning-starts 120000: the replay memory that fits holds 114,666"):
        fit_memory(Args(learning_starts=120_000))  # it would forget before it learns


def test_a_million_transitions_where_they_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dqn_atari, "CONTAINER_LIMIT", tmp_path / "none")
    free = SimpleNamespace(available=9.03e9)  # 10^6 * (84 * 84 + 8) / 0.9^2 + 3e8
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    fit_memory(args := Args())
    assert args.buffer_size == 1_000_000 and capsys.readouterr().out == ""
    fit_memory(args := Args(num_envs=100))  # 1.61e9 less, for their processes
    assert args.buffer_size == 816_421
    fit_memory(args := Args(num_envs=100, vec_env="dummy"))
    assert args.buffer_size == 1_000_000
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])  # as on Windows
    fit_memory(args := Args())
    assert args.buffer_size == 870_314


def test_a_run_whose_memory_shrank_is_resumed_with_the_same_where_less_is_free(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dqn_atari, "CONTAINER_LIMIT", tmp_path / "none")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=3.1e8))
    run(tmp_path, buffer_size=None, checkpoint_memory=True, total_timesteps=240)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["args"]["buffer_size"] == 1_147  # of 1,415 in all
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=3.095e8))
    args = saved["args"] | {"resume": str(tmp_path / "run"), "run_dir": "", "total_timesteps": 280}
    assert train(Args(**args))["gradient_steps"] == 20
    with pytest.raises(ValueError, match="--buffer-size 1147: 1,146 frames fit into free memory"):
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=3.09e8))
        train(Args(**args))


def test_playing_needs_no_room_for_a_replay_memory(tmp_path, monkeypatch, capsys):
    env, path = make_env(Args(**SHORT)), tmp_path / "best.pt"
    torch.manual_seed(0)
    network = QNetwork(env.observation_space, env.action_space, Args(**SHORT))
    dqn_atari.save_checkpoint(path, network=network, args={})
    monkeypatch.setattr(dqn_atari, "CONTAINER_LIMIT", tmp_path / "none")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=0))
    dqn_atari.play(Args(**SHORT, play=str(path)), QNetwork)
    assert "return 0.0 over 1 episodes" in capsys.readouterr().out


# --- The network ---


def networks():
    """The same weights in both precisions."""
    env = make_env(Args(**SHORT))
    torch.manual_seed(0)
    plain = QNetwork(env.observation_space, env.action_space, Args(**SHORT))
    half = QNetwork(env.observation_space, env.action_space, Args(**{**SHORT, "precision": "bfloat16"}))
    half.load_state_dict(plain.state_dict())
    return plain, half


@pytest.mark.parametrize("network, layers", [("nature", 4), ("nips", 3)])
def test_initial_weights(network, layers):
    env = make_env(Args(**SHORT))
    for init in ("torch", "he"):
        torch.manual_seed(0)
        q_network = QNetwork(env.observation_space, env.action_space, Args(**SHORT, network=network, init=init))
        hidden = [layer for layer in q_network.layers if hasattr(layer, "weight")]
        assert len(hidden) == layers
        for layer in hidden:
            variance = (2 if init == "he" else 1 / 3) / layer.weight[0].numel()
            assert layer.weight.var().item() == pytest.approx(variance, rel=0.05)
            assert (layer.bias.abs().max() == 0.0) == (init == "he")


def test_bfloat16_rounds_and_does_no_more():
    plain, half = networks()
    obs = torch.randint(0, 256, (64, 4, 84, 84), dtype=torch.uint8)
    exact, rounded = plain(obs), half(obs)
    assert exact.dtype == rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().max() < 0.02 * exact.abs().max()
    assert {p.dtype for p in half.parameters()} == {torch.float32}  # what the optimiser moves is never rounded


def test_gradients_in_bfloat16_are_those_in_float32_but_for_rounding():
    obs, actions = torch.randint(0, 256, (32, 4, 84, 84), dtype=torch.uint8), torch.arange(32) % 4
    gradients, heads = [], []
    for network in networks():
        network.head.register_forward_hook(lambda _, inputs, q_values: heads.append((inputs[0], q_values)))
        torch.nn.functional.smooth_l1_loss(network(obs)[range(32), actions], torch.arange(32.0) / 8).backward()
        gradients.append(dict((name, parameter.grad) for name, parameter in network.named_parameters()))
    assert all(tensor.dtype == torch.float32 for head in heads for tensor in head)
    (features, q_values), _ = heads[1], heads[0]
    assert torch.equal(q_values, torch.nn.functional.linear(features, network.head.weight, network.head.bias))
    for name, exact in gradients[0].items():
        rounded = gradients[1][name]
        assert rounded.dtype == torch.float32 and exact.abs().max() > 0
        assert not torch.equal(exact, rounded)
        assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.99, name
        assert rounded.norm().item() == pytest.approx(exact.norm().item(), rel=0.02), name


@pytest.mark.parametrize("instructions, cuda, expected", [
    ({"avx512_bf16": True}, False, torch.bfloat16), ({"amx_bf16": True}, False, torch.bfloat16),
    ({"avx512_bf16": False}, False, torch.float32), ({"avx512_bf16": True}, True, torch.float32),
])  # fmt: skip
def test_the_precision_is_what_the_processor_has_instructions_for(instructions, cuda, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    spaces = dqn_atari.gym.spaces.Box(0, 255, (84, 84), np.uint8), dqn_atari.gym.spaces.Discrete(4)
    assert QNetwork(*spaces, Args()).precision == expected
    assert QNetwork(*spaces, Args(precision="float32")).precision == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in torch 2.11
    assert QNetwork(*spaces, Args()).precision == torch.float32


def test_pixels_are_divided_by_255_once():
    plain, _ = networks()
    seen = []
    plain.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    plain(torch.full((1, 4, 84, 84), 255, dtype=torch.uint8))
    assert seen[0].min() == seen[0].max() == 1.0


def test_pixels_given_as_floats_stay_the_callers():
    pixels = torch.full((1, 4, 84, 84), 255.0)
    networks()[0](pixels)
    assert (pixels == 255.0).all()


@pytest.mark.parametrize(
    "network, filters, parameters",
    [("nature", [(32, 8, 4), (64, 4, 2), (64, 3, 1)], 1_686_180), ("nips", [(16, 8, 4), (32, 4, 2)], 677_172)],
)
def test_the_networks_are_those_of_the_papers(network, filters, parameters):
    env = make_env(Args(**SHORT))
    q_network = QNetwork(env.observation_space, env.action_space, Args(**SHORT, network=network))
    convolutions = [layer for layer in q_network.layers if isinstance(layer, torch.nn.Conv2d)]
    kinds = [type(layer).__name__ for layer in q_network.layers]
    assert kinds == ["Conv2d", "ReLU"] * len(filters) + ["Flatten", "Linear", "ReLU"]
    assert [(layer.out_channels, layer.kernel_size[0], layer.stride[0]) for layer in convolutions] == filters
    assert sum(p.numel() for p in q_network.parameters()) == parameters  # with Breakout's four actions
    assert q_network(torch.zeros((3, 4, 84, 84), dtype=torch.uint8)).shape == (3, 4)


@pytest.mark.parametrize("available", [True, False])
def test_auto_is_the_gpu_where_there_is_one(available, monkeypatch):
    class Chosen(Exception):
        pass

    def select_device(name, auto):
        raise Chosen(name, auto)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(dqn_atari, "select_device", select_device)
    with pytest.raises(Chosen) as chosen:
        train(Args(**SHORT))
    assert chosen.value.args == ("auto", "cuda" if available else "cpu")


# --- What the networks see ---


def test_the_online_network_acts_on_the_last_four_frames_of_each_game(tmp_path, monkeypatch):
    step_wait, forward = dqn_atari.DummyVecEnv.step_wait, QNetwork.forward
    steps, seen, actors = [], [], set()

    def watched_step(envs):
        steps.append(step_wait(envs))
        return steps[-1]

    def watched_forward(network, obs):
        if obs.shape[0] == 3:
            seen.append(obs.clone())
            actors.add(network)
        return forward(network, obs)

    monkeypatch.setattr(dqn_atari.DummyVecEnv, "step_wait", watched_step)
    monkeypatch.setattr(QNetwork, "forward", watched_forward)
    run(tmp_path, num_envs=3, total_timesteps=210, time_limit=9)
    assert len(seen) == 70
    (actor,) = actors
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert torch.equal(actor.head.weight, last["network"]["head.weight"])
    assert not torch.equal(actor.head.weight, last["target_network"]["head.weight"])
    ended = 0
    for before, after, (frames, _, dones, _) in zip(seen, seen[1:], steps, strict=False):
        assert np.array_equal(after[:, 3], frames)
        for i in range(3):
            older = torch.zeros_like(before[i, 1:]) if dones[i] else before[i, 1:]
            assert torch.equal(after[i, :3], older)
        ended += dones.sum()
    assert ended > 10


@pytest.mark.parametrize("epsilon", [0.0, 0.25, 1.0])
def test_an_evaluation_stacks_its_own_frames_and_explores_at_eval_epsilon(epsilon, monkeypatch):
    seen, actions = [], []

    class AlwaysLeft(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parameter = torch.nn.Parameter(torch.zeros(1))

        def forward(self, obs):
            seen.append(obs.clone())
            return torch.tensor([[1.0, 0.0]]).expand(len(obs), -1)

    step = dqn_atari.DummyVecEnv.step
    monkeypatch.setattr(dqn_atari.DummyVecEnv, "step", lambda envs, a: actions.append(a) or step(envs, a))
    args = Args(**{**SHORT, "num_envs": 3, "time_limit": None}, env_id="toy_envs:Squares-v0", eval_epsilon=epsilon)
    assert len(dqn_atari.evaluate(args, AlwaysLeft(), 60, seed=1)) == 60
    assert len(seen) == 160  # 20 episodes of 8 steps in each environment
    for t, obs in enumerate(seen):
        begun = t % 8  # steps of this episode before this one
        frames = [seen[t - 3 + k][:, 3] if 3 - k <= begun else torch.zeros(3, 84, 84) for k in range(3)]
        assert all(torch.equal(obs[:, k], frame) for k, frame in enumerate(frames))
        assert obs[:, 3].any()
    other = np.array(actions) == 1  # half of the random actions are 0 too
    assert other.mean() == pytest.approx(epsilon / 2, abs=0.05)
    together = (other.all(axis=1) | ~other.any(axis=1)).mean()  # by chance only: each environment draws for itself
    assert together == pytest.approx((epsilon / 2) ** 3 + (1 - epsilon / 2) ** 3, abs=0.1)


def test_targets_hold_n_rewards_at_first_and_one_later(tmp_path, monkeypatch):
    discounts, td_loss = [], dqn_atari.td_loss  # gamma^m of each transition drawn
    spy = lambda q, q_next, batch, *rest: discounts.append(batch.discounts) or td_loss(q, q_next, batch, *rest)  # noqa: E731
    monkeypatch.setattr(dqn_atari, "td_loss", spy)
    run(tmp_path, gamma=0.5, n_step=3, n_step_until=400, train_frequency=4)  # a gradient step per 4 from 200 on, of 600
    three, one = torch.stack(discounts[:50]), torch.stack(discounts[50:])
    assert {0.125} <= {*three.flatten().tolist()} <= {0.125, 0.25, 0.5}
    assert (three.min(dim=1).values < 0.5).all()
    assert one.shape[0] == 50 and {*one.flatten().tolist()} == {0.5}


def test_the_metrics_come_every_500_gradient_steps(tmp_path):
    run(tmp_path, network="nips", batch_size=1, train_frequency=1, total_timesteps=750)
    with open(tmp_path / "run" / "progress.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] in ("train/loss", "train/q_taken")]
    assert [int(row["step"]) for row in rows] == [700, 700]
    assert all(math.isfinite(float(row["value"])) for row in rows)


# --- Counts and resume ---


@pytest.mark.parametrize("num_envs, train_frequency, target_frequency", [(1, 4, 40), (8, 16, 100)])
def test_gradient_steps_do_not_depend_on_the_number_of_games(
    num_envs, train_frequency, target_frequency, tmp_path, monkeypatch
):
    updates = count_updates(dqn_atari, monkeypatch)
    frequencies = {"train_frequency": train_frequency, "target_frequency": target_frequency}
    result = run(tmp_path, num_envs=num_envs, **frequencies, batch_size=1)
    assert 600 <= result["global_step"] < 600 + num_envs
    assert result["gradient_steps"] == (result["global_step"] - 200) // train_frequency
    assert max(updates.values()) == result["gradient_steps"] * train_frequency // target_frequency


@pytest.mark.parametrize("target_frequency, copied", [(4, True), (10_000, False)])
def test_the_target_network_is_a_copy_as_of_the_last_sync(target_frequency, copied, tmp_path):
    run(tmp_path, total_timesteps=240, train_frequency=4, target_frequency=target_frequency)
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert copied == all(torch.equal(last["network"][name], last["target_network"][name]) for name in last["network"])
    run(tmp_path, "other", total_timesteps=240, train_frequency=4, target_frequency=target_frequency, learning_rate=0.1)
    other = torch.load(tmp_path / "other" / "last.pt", weights_only=True)  # copied the wrong way, these were equal
    assert not torch.equal(last["network"]["head.weight"], other["network"]["head.weight"])


def test_the_same_seed_gives_the_same_parameters_also_with_workers(tmp_path):
    networks = []
    for name, seed, vec_env in (("first", 1, "dummy"), ("again", 1, "subproc"), ("other", 2, "dummy")):
        run(tmp_path, name, vec_env=vec_env, seed=seed, batch_size=32, total_timesteps=320)
        networks.append(torch.load(tmp_path / name / "last.pt", weights_only=True)["network"])
    first, again, other = networks
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize("checkpoint_memory", [False, True])
def test_a_resumed_run_learns_on_at_once_only_with_its_memory(checkpoint_memory, tmp_path, capsys):
    first = run(tmp_path, checkpoint_memory=checkpoint_memory, total_timesteps=280)
    assert first["gradient_steps"] == 20
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert ("memory" in saved) == checkpoint_memory
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    args |= {"resume": str(tmp_path / "run"), "run_dir": "", "total_timesteps": 520}
    capsys.readouterr()
    result = train(Args(**args))
    assert ("no learning until 200 transitions" in capsys.readouterr().out) != checkpoint_memory
    # 240 more transitions make 60 gradient steps, or 10 after 200 transitions that refill the memory.
    assert result["gradient_steps"] == (80 if checkpoint_memory else 30)


def test_a_run_stopped_before_it_learned_refills_its_memory_too(tmp_path, monkeypatch):
    monkeypatch.setattr(dqn_atari.Run, "signal", 2)  # stops it after its first step
    with pytest.raises(SystemExit):
        run(tmp_path)
    monkeypatch.setattr(dqn_atari.Run, "signal", 0)
    result = run(tmp_path, run_dir="", resume=str(tmp_path / "run"), total_timesteps=300)
    assert result["gradient_steps"] == (300 - (2 + 200)) // 4


def test_everything_but_the_replay_memory_takes_well_under_a_gigabyte(python, tmp_path):
    flags = ["--buffer-size", 30_000, "--num-envs", 2, "--out", tmp_path]
    done = python(ROOT / "benchmarks" / "atari_memory.py", *flags)
    assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader((tmp_path / "atari_memory.csv").open())
    assert int(row["frames"]) >= 30_000 * 84 * 84
    limit = 700e6 if torch.version.cuda is None else 1000e6  # a build with CUDA maps larger libraries
    assert 100e6 < int(row["everything_else"]) < limit


# --- Learning a real game ---


def foresight(tmp_path, gradient_steps, monkeypatch):
    """Train on Asterix with random actions; return how Q(s, a) correlates with what a random player then gets."""
    args = Args(
        **{"env_id": "AsterixNoFrameskip-v4", "run_dir": str(tmp_path), "num_envs": 8, "vec_env": "dummy"},
        network="nips",
        **{"total_timesteps": 800 + 4 * gradient_steps, "learning_starts": 800, "buffer_size": 4_000},
        **{"target_frequency": 200, "train_frequency": 4, "epsilon_end": 1.0, "gamma": 0.9, "learning_rate": 5e-4},
        **{"learning_rate_end": 5e-4, "n_step": 1, "precision": "float32"},
        **{"eval_every": 10_000, "final_eval_episodes": 1, "time_limit": 1_000},
    )
    monkeypatch.setattr(dqn_atari, "evaluate", lambda args, network, n, seed: np.zeros(n))  # its games take a while
    assert train(args)["gradient_steps"] == gradient_steps
    envs = [make_env(args) for _ in range(4)]
    network = QNetwork(envs[0].observation_space, envs[0].action_space, args)
    network.load_state_dict(torch.load(tmp_path / "last.pt", weights_only=True)["network"])
    rng, steps, last = np.random.default_rng(0), 400, 360  # the last 40 steps: their returns are cut off
    frames = np.stack([env.reset(seed=1_000 + i)[0] for i, env in enumerate(envs)])
    stacks, ended = np.zeros((4, 4, 84, 84), np.uint8), np.ones(4, bool)
    q_taken, rewards, ends = np.zeros((steps, 4)), np.zeros((steps, 4)), np.zeros((steps, 4), bool)
    for t in range(steps):
        push_frames(stacks, frames, ended)
        actions = rng.integers(envs[0].action_space.n, size=4)
        with torch.no_grad():
            q_taken[t] = network(torch.from_numpy(stacks)).numpy()[np.arange(4), actions]
        for i, env in enumerate(envs):
            frames[i], rewards[t, i], *over, _ = env.step(actions[i])
            ended[i] = ends[t, i] = any(over)
            if ended[i]:
                frames[i], _ = env.reset()
    returns = np.zeros((steps + 1, 4))
    for t in reversed(range(steps)):
        returns[t] = rewards[t] + args.gamma * ~ends[t] * returns[t + 1]
    assert rewards.sum() > 20
    return np.corrcoef(q_taken[:last].ravel(), returns[:last].ravel())[0, 1]


def test_q_values_foretell_a_game_that_was_not_trained_on(tmp_path, monkeypatch):
    assert foresight(tmp_path / "run", 600, monkeypatch) > 0.45


def test_an_untrained_network_foretells_nothing(tmp_path, monkeypatch):
    assert foresight(tmp_path / "run", 2, monkeypatch) < 0.25
