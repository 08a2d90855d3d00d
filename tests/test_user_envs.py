"""Environments as users write them: each has one trait, and every script that reads vectors copes with it."""

from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy_envs
from conftest import ROOT, SCRIPTS, load, rows_of, train

# Pictures go to dqn_atari.py; dqn_vecenv.py is dqn_cartpole.py with other VecEnvs (test_design.py holds it to that).
NAMES = [path.stem for path in SCRIPTS if path.stem not in ("dqn_atari", "dqn_vecenv")]
each_script = pytest.mark.parametrize("name", NAMES)
pytestmark = pytest.mark.filterwarnings("ignore")  # Gymnasium's checker says, rightly, that these are odd


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Train and evaluate with small flags; return all that the VecEnvs returned, as a list of (obs, infos)."""
    runs = iter(range(100))

    def run(name, env_id, **changes):
        module, returned = load(ROOT / f"{name}.py"), []

        def recording(base):
            class Recording(base):
                def reset(self):
                    returned.append((super().reset(), [{}] * self.num_envs))
                    return returned[-1][0].copy()

                def step_wait(self):
                    obs, rewards, dones, infos = super().step_wait()
                    returned.append((obs, infos))
                    return obs.copy(), rewards, dones, infos

            return Recording

        with monkeypatch.context() as patch:
            for vec_env in ("DummyVecEnv", "SubprocVecEnv"):
                patch.setattr(module, vec_env, recording(getattr(module, vec_env)))
            train(name, tmp_path / f"run{next(runs)}", env_id=env_id, **changes)
        return returned

    return run


@pytest.fixture
def inputs(play):
    """Run as `play` does; return all that the layers of the networks were given, in training and in evaluations."""

    def run(*args, **changes):
        given = []

        def record(layer, tensors):
            if not list(layer.children()):
                given.append((tensors[0].dtype, tensors[0].tolist()))

        with torch.nn.modules.module.register_module_forward_pre_hook(record):
            play(*args, **changes)
        return given

    return run


# --- Observations, actions and infos ---


@pytest.mark.parametrize("name, vec_env, env_id", [
    *((name, "dummy", env_id) for name in NAMES for env_id in ("Forms-v0", "Fractions-v0")),
    ("dqn_cartpole", "subproc", "Forms-v0"),
])  # fmt: skip
def test_training_workers_and_evaluation_see_the_same_vectors(name, vec_env, env_id, inputs):
    expected = inputs(name, "toy_envs:Walk-v0")
    assert len(expected) > 500 and {dtype for dtype, _ in expected} == {torch.float32}
    assert inputs(name, f"toy_envs:{env_id}", vec_env=vec_env) == expected


@pytest.mark.parametrize("env_id", ["Mixture-v0", "Matrix-v0", "Board-v0"])
@each_script
def test_what_is_no_vector_is_flattened(name, env_id, play):
    module = load(ROOT / f"{name}.py")
    env = module.make_env(module.Args(env_id=f"toy_envs:{env_id}"))
    for move in (partial(env.reset, seed=1), partial(env.step, 0), partial(env.step, 1)):
        obs = move()[0]
        expected = gym.spaces.flatten(env.unwrapped.observation_space, env.unwrapped.shown)
        np.testing.assert_allclose(obs[: len(expected)], expected, rtol=1e-6)
    assert play(name, f"toy_envs:{env_id}")[0][0].shape == (2, len(obs))


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Taxi-v4", "Blackjack-v1"])
@each_script
def test_gymnasiums_own_toys_run(name, env_id, play):
    assert play(name, env_id)[0][0].shape[1] >= 16


@pytest.mark.parametrize("env_id", ["Image-v0", "Grey-v0", "FloatImage-v0"])
@each_script
def test_pictures_are_sent_to_the_script_that_learns_from_them(name, env_id, cli):
    status, _, err = cli("--env-id", f"toy_envs:{env_id}", script=f"{name}.py")
    assert status == 2 and "pictures" in err and "dqn_atari.py" in err and err.count("\n") == 1


@pytest.mark.parametrize("env_id", ["Item-v0", "StartsAtOne-v0"])
@each_script
def test_actions_are_what_the_space_of_the_environment_samples(name, env_id, play):
    assert play(name, f"toy_envs:{env_id}")


@pytest.mark.parametrize("env_id", ["OneInfo-v0", "WithStatistics-v0"])
@each_script
def test_an_info_may_hold_anything(name, env_id, play, tmp_path):
    infos = [info for _, infos in play(name, f"toy_envs:{env_id}") for info in infos]
    ended = [info for info in infos if "terminal_observation" in info]
    assert ended and not any(info["TimeLimit.truncated"] for info in ended)
    assert {(info["episode"]["r"], info["episode"]["l"]) for info in ended} == {(6, 6)}
    assert not any("episode" in info for info in infos if "terminal_observation" not in info)
    assert {value for _, metric, value in rows_of(tmp_path / "run0") if "return" in metric} == {6}


def test_a_cartpole_with_two_numbers_is_an_environment_like_any_other(play):
    returned = play("dqn_lstm_cartpole", "toy_envs:Positions-v0")
    assert returned[0][0].shape == (2, 4)  # both numbers, and the last action
    assert np.abs(returned[0][0]).max() <= 0.05  # in its own units, not in those of the script's CartPole


# --- Random numbers ---


@pytest.mark.parametrize("name, vec_env, env_id", [
    *((name, "dummy", env_id) for name in NAMES for env_id in ("GlobalRandom-v0", "Samples-v0")),
    ("dqn_cartpole", "subproc", "GlobalRandom-v0"),
])  # fmt: skip
def test_two_runs_of_one_seed_are_equal_whatever_is_drawn_from(name, vec_env, env_id, play):
    first, second, other = (
        [obs.tolist() for obs, _ in play(name, f"toy_envs:{env_id}", vec_env=vec_env, seed=seed)] for seed in (3, 3, 4)
    )
    assert first == second != other
    assert all(a != b for a, b in zip(*np.array(first[0])[:, :2], strict=True))  # two environments draw differently
    if env_id == "GlobalRandom-v0":  # and no environment of one seed draws what another one of the next seed does
        drawn = [{value for obs in run for row in obs for value in row[:2]} for run in (first, other)]
        assert not drawn[0] & drawn[1]


@each_script
def test_every_seed_fits_into_a_c_int_and_no_episode_is_seen_twice(name, tmp_path, monkeypatch):
    changes = {"total_timesteps": 24, "eval_every": 20, "eval_episodes": 3, "final_eval_episodes": 3}
    changes |= {"num_steps": 10} if name == "ppo_cartpole" else {"learning_starts": 20}
    for seed in range(1, 5):
        monkeypatch.setattr(toy_envs.IntSeed, "seeds", [])
        train(name, tmp_path / str(seed), env_id="toy_envs:IntSeed-v0", seed=seed, **changes)
        seeds = toy_envs.IntSeed.seeds  # two for training, two in an evaluation, twice two at the end
        assert len(set(seeds)) >= 6 and all(0 <= value < 2**31 - 1_000 for value in seeds)
        final = seeds[-2:]
        assert seeds[-4:-2] == final and not set(seeds[:-4]) & set(final)
        begun, seeds[:] = set(seeds), []
        changes["total_timesteps"] = 48
        train(name, "", env_id="toy_envs:IntSeed-v0", resume=str(tmp_path / str(seed)), seed=seed, **changes)
        changes["total_timesteps"] = 24
        assert not set(seeds[:2]) & begun  # a resumed run sees new episodes


@each_script
def test_a_training_takes_one_thread(name, tmp_path):
    torch.set_num_threads(2)
    try:
        train(name, tmp_path / "run", total_timesteps=200)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


# --- How many there are, and what a checkpoint holds of them ---


@each_script
def test_at_most_num_envs_exist_beside_those_of_the_training_and_none_of_those_at_the_end(name, tmp_path, monkeypatch):
    module, around = load(ROOT / f"{name}.py"), []
    evaluate, counted = module.evaluate, toy_envs.Counted
    monkeypatch.setattr(counted, "alive", 0)

    def counting(*args, **options):
        before, counted.most = counted.alive, counted.alive
        returns = evaluate(*args, **options)
        around.append((before, counted.most - before, counted.alive))
        return returns

    monkeypatch.setattr(module, "evaluate", counting)
    changes = {"num_envs": 3, "num_steps": 40} if name == "ppo_cartpole" else {"num_envs": 3}
    train(name, tmp_path / "run", env_id="toy_envs:Counted-v0", **changes, eval_episodes=10, final_eval_episodes=10)
    assert len(around) >= 4
    assert {(3, 3, 3)} == set(around[:-2])
    assert {(0, 3, 0)} == set(around[-2:])  # the final network and the best one
    around.clear()
    changes |= {"eval_episodes": 10, "final_eval_episodes": 10, "eval_every": 10**9}
    train(name, tmp_path / "none on the way", env_id="toy_envs:Counted-v0", **changes)
    assert around == [(0, 3, 0)] * 3


@each_script
def test_an_environment_is_no_part_of_a_checkpoint(name, tmp_path):
    """Names that share an object stay together, new episodes begin with a resume, and large data are not saved."""
    run = tmp_path / "run"
    for env_id in ("Aliases-v0", "Table-v0"):
        train(name, run / env_id, env_id=f"toy_envs:{env_id}")
        assert (run / env_id / "last.pt").stat().st_size < 2_000_000
        train(name, "", env_id=f"toy_envs:{env_id}", resume=str(run / env_id), total_timesteps=800)
    lengths = [value for _, metric, value in rows_of(run / "Aliases-v0") if metric == "train/episode_length"]
    assert set(lengths) == {6} and len(lengths) > 120


def test_a_resumed_rollout_begins_new_episodes(tmp_path):
    """Episodes of 60 steps, stopped after 200 in each of two environments: 20 steps into the fourth."""
    flags = {"env_id": "toy_envs:Constant-v0", "time_limit": 60}
    train("ppo_cartpole", tmp_path / "run", **flags)
    train("ppo_cartpole", "", **flags, resume=str(tmp_path / "run"), total_timesteps=800)
    steps = [step for step, metric, _ in rows_of(tmp_path / "run") if metric == "train/episode_length"]
    assert steps == [step for step in (120, 240, 360, 520, 640, 760) for _ in range(2)]
