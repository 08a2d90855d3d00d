"""The Atari environment against SB3's wrappers, frame by frame, on the same seeds and actions."""

from functools import partial
from types import SimpleNamespace

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
import toy_envs
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack

import dqn_atari
from dqn_atari import AtariGame, make_env, make_worker_env, push_frames


def arguments(env_id="BreakoutNoFrameskip-v4", time_limit=None, clip_rewards=True):
    return SimpleNamespace(env_id=env_id, time_limit=time_limit, clip_rewards=clip_rewards, seed=1)


class Tape(gym.Wrapper):
    """Under SB3's wrappers: remembers the emulator frames, and the score of a game that ended, for StepMark to take."""

    def __init__(self, env):
        super().__init__(env)
        self.frames, self.finished = [], None

    def reset(self, **kwargs):
        self.score = self.length = 0
        return self.env.reset(**kwargs)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.frames.append(obs)
        self.score, self.length, self.over = self.score + reward, self.length + 1, terminated or truncated
        if self.over:
            self.finished = {"r": self.score, "l": self.length}
        return obs, reward, terminated, truncated, info


class StepMark(gym.Wrapper):
    """Over SB3's wrappers: adds to info what the tape saw during this step, and a game that ended since the last."""

    def __init__(self, env, tape):
        super().__init__(env)
        self.tape = tape

    def step(self, action):
        self.tape.frames.clear()
        obs, reward, terminated, truncated, info = self.env.step(action)
        frames, finished = self.tape.frames, self.tape.finished
        self.tape.finished = None
        info = {"game_over": self.tape.over, "num_frames": len(frames), "last_frame": frames[-1], "finished": finished}
        return obs, reward, terminated, truncated, info


def sb3_env(env_id, training, **kwargs):
    tape = Tape(gym.make(env_id, frameskip=1, **kwargs))
    return StepMark(AtariWrapper(tape, clip_reward=training), tape)


def warp(frame):
    return cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (84, 84), interpolation=cv2.INTER_AREA)


def compare(env_id, num_steps, training=True, time_limit=None, seed=7):
    """Step ours and SB3's side by side; returns counts of what happened on the way.

    SB3's ends an episode at each lost life. Evaluations of ours go on there: their newest frame is compared, since
    SB3's stack begins anew.
    """
    seen = slice(None) if training else slice(-1, None)
    kwargs = {} if time_limit is None else {"max_num_frames_per_episode": 4 * time_limit}
    theirs = VecFrameStack(DummyVecEnv([lambda: sb3_env(env_id, training, **kwargs)]), 4)
    ours = DummyVecEnv([partial(make_env, arguments(env_id, time_limit), evaluation=not training)])
    theirs.seed(seed)
    ours.seed(seed)
    their_obs = theirs.reset()
    stacks = np.zeros((1, 4, 84, 84), np.uint8)
    push_frames(stacks, ours.reset(), np.ones(1, bool))
    rng = np.random.default_rng(seed)
    counts = {"life_losses": 0, "games": 0, "truncations": 0, "early_ends": 0, "rewards": 0}
    for step in range(num_steps):
        assert np.array_equal(stacks[0][seen], np.moveaxis(their_obs[0], -1, 0)[seen]), f"observation {step}"
        action = [rng.integers(ours.action_space.n)]
        their_obs, their_rewards, their_dones, (their_info,) = theirs.step(action)
        frames, rewards, dones, (info,) = ours.step(action)
        life_lost = their_dones[0] and not their_info["game_over"]
        assert rewards[0] == their_rewards[0] or (life_lost and not training), f"step {step}"
        assert dones[0] == (their_dones[0] if training else their_info["game_over"]), f"step {step}"
        assert info["TimeLimit.truncated"] == their_info["TimeLimit.truncated"]
        # SB3 loses the score of a game that ends inside a reset; the tape saw it, and ours reports it one step later.
        assert info.get("episode") == their_info["finished"]
        if dones[0]:
            expected = np.moveaxis(their_info["terminal_observation"], -1, 0).copy()
            if their_info["game_over"] and their_info["num_frames"] < 4:  # SB3's two-frame buffer is stale
                expected[-1] = warp(their_info["last_frame"])
                counts["early_ends"] += 1
            push_frames(stacks, info["terminal_observation"], np.zeros(1, bool))
            assert np.array_equal(stacks[0][seen], expected[seen]), f"last observation of an episode, step {step}"
        push_frames(stacks, frames, dones)
        counts["games"] += "episode" in info
        counts["life_losses"] += life_lost
        counts["truncations"] += info["TimeLimit.truncated"]
        counts["rewards"] += rewards[0] != 0
    return counts


@pytest.mark.parametrize("game", ["Breakout", "Pong", "MsPacman", "BankHeist"])
def test_equals_sb3_while_training(game):
    counts = compare(f"{game}NoFrameskip-v4", 2200)
    assert counts["games"] and counts["rewards"]
    assert (counts["life_losses"] > 0) == (game != "Pong")


@pytest.mark.parametrize("game", ["Breakout", "MsPacman"])
def test_equals_sb3_over_whole_games(game):
    counts = compare(f"{game}NoFrameskip-v4", 1500, training=False)
    assert counts["games"] > 1 and counts["life_losses"] > 1


def test_equals_sb3_with_sticky_actions():
    assert compare("ALE/Breakout-v5", 800)["games"]


@pytest.mark.parametrize(("game", "training"), [("Breakout", True), ("Pong", False)])
def test_equals_sb3_when_time_runs_out(game, training):
    counts = compare(f"{game}NoFrameskip-v4", 1500, training, time_limit=101)
    assert counts["truncations"] and counts["early_ends"]


def play_until(env, end):
    """Play random actions until end(terminated, truncated, info); the seed makes it repeatable."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        _, _, terminated, truncated, info = env.step(rng.integers(env.action_space.n))
        if end(terminated, truncated, info):
            return info
        if terminated or truncated:
            env.reset()
    raise AssertionError("the awaited end did not come within 2000 steps")


def test_evaluation_plays_whole_games_for_the_raw_score():
    env = make_env(arguments("SeaquestNoFrameskip-v4"), evaluation=True)
    env.reset(seed=0)
    rng, score, ended, info = np.random.default_rng(0), 0, False, {}
    while not ended:
        assert "episode" not in info
        _, reward, terminated, truncated, info = env.step(rng.integers(env.action_space.n))
        score, ended = score + reward, terminated or truncated
    assert env.unwrapped.ale.game_over() and score > 20  # a diver or fish is 20 points: rewards are not their sign
    assert info["episode"]["r"] == score


def test_each_life_of_an_evaluation_begins_with_fire():
    env = make_env(arguments("BreakoutNoFrameskip-v4"), evaluation=True)
    env.reset(seed=0)
    while not any(env.step(0)[2:4]):  # without FIRE the second ball would never come, and the game never end
        assert env.unwrapped.ale.getEpisodeFrameNumber() < 4000
    assert env.unwrapped.ale.game_over() and env.unwrapped.ale.lives() == 0


def test_games_begin_with_no_ops_also_where_the_first_action_is_fire():
    env = make_env(arguments("ALE/Backgammon-v5"))
    assert env.unwrapped.get_action_meanings()[0] == "FIRE"
    ale, held = env.ale, []

    class Recorder:
        def act(self, action):
            held.append(action)
            return ale.act(action)

        def __getattr__(self, name):
            return getattr(ale, name)

    env.ale = Recorder()
    env.reset(seed=0)
    assert held and set(held) == {ale_py.Action.NOOP}


def test_an_evaluation_presses_fire_again_where_a_life_is_lost_as_it_begins(monkeypatch):
    env = make_env(arguments(), evaluation=True)
    env.reset(seed=0)
    pressed, lives = [], iter([4, 4, 3, 3, 3, 3, 3])  # one life lost by the action, the next while FIRE is held

    def repeat(action):
        pressed.append(action)
        env.lives = next(lives)
        return 1, False, False

    monkeypatch.setattr(env, "_repeat", repeat)
    assert env.step(3)[1] == 7  # each reward counts
    noop, fire, right = ale_py.Action.NOOP, ale_py.Action.FIRE, ale_py.Action.RIGHT
    assert pressed == [ale_py.Action.LEFT, *[noop, fire, right] * 2]


def test_a_game_whose_time_runs_out_while_a_life_begins_ends_in_that_step():
    env = make_env(arguments(), evaluation=True)
    env.reset(seed=3)
    while env.lives == 5:
        env.step(0)
    lost = env.unwrapped.ale.getEpisodeFrameNumber() - 12  # without the no-op, FIRE and a direction
    for held in (1, 2, 3):
        env, score = make_env(arguments(time_limit=lost // 4 + held), evaluation=True), 0
        env.reset(seed=3)
        while env.lives == 5:
            _, reward, terminated, truncated, info = env.step(0)
            score += reward
        assert (terminated, truncated) == (False, True)
        assert info == {"episode": {"r": score, "l": 4 * (lost // 4 + held)}}


@pytest.mark.parametrize("held", [1, 2], ids=["no-op", "FIRE"])
def test_a_game_that_ends_inside_reset_is_reported_once(held):
    env = make_env(arguments())
    env.reset(seed=3)
    play_until(env, lambda terminated, truncated, info: terminated)
    frame = env.unwrapped.ale.getEpisodeFrameNumber()
    env = make_env(arguments(time_limit=frame // 4 + held))  # runs out within what follows the lost life
    env.reset(seed=3)
    info = play_until(env, lambda terminated, truncated, info: terminated)
    assert "episode" not in info and not env.unwrapped.ale.game_over()
    env.reset()
    assert env.unwrapped.ale.getEpisodeFrameNumber() < 40  # a new game
    infos = [env.step(0)[-1] for _ in range(5)]
    assert ["episode" in info for info in infos] == [True, False, False, False, False]
    assert infos[0]["episode"]["l"] == 4 * (frame // 4 + held)


def test_a_lost_life_does_not_reset_the_game_but_a_seed_does():
    env = make_env(arguments())
    first = env.reset(seed=5)[0]
    play_until(env, lambda terminated, truncated, info: terminated)
    before = env.unwrapped.ale.getEpisodeFrameNumber()
    env.reset()
    assert env.unwrapped.ale.getEpisodeFrameNumber() == before + 4 + 8  # no-op, FIRE and a direction
    assert np.array_equal(env.reset(seed=5)[0], first)
    assert env.unwrapped.ale.lives() == 5


def test_bonus_lives_of_a_game_cut_short_are_forgotten():
    env = make_env(arguments("MsPacmanNoFrameskip-v4"))
    env.reset(seed=0)
    env.lives = 9
    env.reset(seed=0)
    assert not env.step(0)[2]


def test_rewards_of_a_game_are_raw_or_signs():
    for clip, largest in ((False, 10), (True, 1)):  # a pellet
        env = make_env(arguments("MsPacmanNoFrameskip-v4", clip_rewards=clip))
        env.reset(seed=0)
        assert max(env.step(action)[1] for action in np.random.default_rng(0).integers(9, size=100)) == largest


def test_a_game_takes_one_thread():
    cv2.setNumThreads(2)
    make_env(arguments())
    assert cv2.getNumThreads() == 1


def test_time_limit():
    limits = {
        n: make_env(arguments(time_limit=n)).unwrapped.ale.getInt("max_num_frames_per_episode") for n in [None, 50, -1]
    }
    assert limits == {None: 108_000, 50: 200, -1: 0}


def test_observations_do_not_share_memory():
    env = make_env(arguments())
    first = env.reset(seed=0)[0]
    kept = first.copy()
    observations = [env.step(1)[0] for _ in range(3)]
    assert np.array_equal(first, kept) and not any(np.shares_memory(first, other) for other in observations)
    assert env.observation_space.contains(first)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "gymnasium.envs:CartPole-v1", "toy_envs:FloatSquares-v0"])
def test_other_observations_than_frames_are_refused(env_id):
    with pytest.raises(ValueError, match=r"\(84, 84\) uint8 frames .*ResizeObservation"):
        make_env(arguments(env_id))


def test_frames_of_another_environment_are_its_own_and_its_rewards_are_raw_or_signs():
    plain, unclipped = (arguments("toy_envs:Squares-v0", clip_rewards=clip) for clip in (True, False))
    envs = [make_env(plain), make_env(unclipped), make_env(plain, evaluation=True)]
    first = [env.reset(seed=0)[0] for env in envs]
    kept, score = first[0].copy(), 0
    for step in range(1, 9):
        signs, raw, evaluated = (env.step(0) for env in envs)
        score += raw[1]
        assert raw[1] in (-1, 7) and signs[1] == np.sign(raw[1]) and evaluated[1] == raw[1]
        infos = [{"episode": {"r": score, "l": 8}}] * 3 if step == 8 else [{}] * 3
        assert [signs[4], raw[4], evaluated[4]] == infos
        assert signs[2] == (step == 8)
    assert np.array_equal(first[0], kept) and len(np.unique(kept)) == 2  # the environment has drawn over its array


def test_more_actions_than_a_byte_holds_are_refused():
    env = toy_envs.Squares()
    env.action_space = gym.spaces.Discrete(257)
    env.spec = gym.spec("Squares-v0")
    with pytest.raises(ValueError, match="discrete actions"):
        dqn_atari.PixelEnv(env, clip=True)


def test_frames_of_another_environment_take_a_time_limit_and_a_seed_for_their_spaces():
    env, drawn = make_env(arguments("toy_envs:EndlessSquares-v0", time_limit=3)), []
    for _ in range(2):
        env.reset(seed=5)
        actions, frames = env.unwrapped.action_space, env.unwrapped.observation_space
        drawn.append([(actions.sample(), frames.sample()[0, 0]) for _ in range(20)])
    assert drawn[0] == drawn[1] and len({action for action, _ in drawn[0]}) == 2
    ends = [env.step(0)[3:] for _ in range(3)]
    assert [truncated for truncated, _ in ends] == [False, False, True] and ends[2][1]["episode"]["l"] == 3


def test_an_evaluation_of_an_environment_without_a_limit_ends():
    env, info = make_env(arguments("toy_envs:EndlessSquares-v0"), evaluation=True), {}
    env.reset(seed=0)
    for _ in range(10_000):
        assert not info
        *_, truncated, info = env.step(0)
    assert truncated and info["episode"]["l"] == 10_000


def test_module_ids():
    assert isinstance(make_env(arguments("ale_py:ALE/Pong-v5")), AtariGame)


def test_spawned_worker_processes():  # as on Windows and macOS
    subproc = SubprocVecEnv([partial(make_worker_env, arguments(), index) for index in range(2)], start_method="spawn")
    try:
        local = DummyVecEnv([partial(make_env, arguments()) for _ in range(2)])
        subproc.seed(1)
        local.seed(1)
        assert np.array_equal(subproc.reset(), local.reset())
        rng = np.random.default_rng(0)
        for _ in range(100):
            actions = rng.integers(4, size=2)
            for theirs, ours in zip(subproc.step(actions)[:3], local.step(actions)[:3], strict=True):
                assert np.array_equal(theirs, ours)
    finally:
        subproc.close()


def test_an_evaluation_has_an_end_where_training_has_none():
    envs = [make_env(arguments(time_limit=-1), evaluation=evaluation) for evaluation in (False, True)]
    assert [env.ale.getInt("max_num_frames_per_episode") for env in envs] == [0, 108_000]


@pytest.mark.filterwarnings("ignore:.*Overwriting existing videos")
def test_film_of_the_first_episode(tmp_path):
    env = make_env(arguments(time_limit=40), evaluation=True, render_mode="rgb_array", video_dir=tmp_path)
    env.reset(seed=0)
    num_steps = 1
    while not env.step(0)[3] and num_steps < 1000:
        num_steps += 1
    env.close()
    (path,) = tmp_path.glob("*.mp4")
    film = cv2.VideoCapture(str(path))
    assert film.get(cv2.CAP_PROP_FPS) == 15
    assert abs(film.get(cv2.CAP_PROP_FRAME_COUNT) - num_steps - 1) <= 1  # and the one that the reset drew


def test_a_film_is_1500_steps_at_most(tmp_path, monkeypatch):
    frames, captured = [], gym.wrappers.RecordVideo._capture_frame
    monkeypatch.setattr(gym.wrappers.RecordVideo, "_capture_frame", lambda env: frames.append(1) or captured(env))
    monkeypatch.setattr(gym.wrappers.RecordVideo, "stop_recording", lambda env: setattr(env, "recording", False))
    env = make_env(arguments(time_limit=-1), evaluation=True, render_mode="rgb_array", video_dir=tmp_path)
    env.reset(seed=0)
    for _ in range(1_600):
        env.step(0)
    assert len(frames) == 1_500  # with the one that the reset drew


def test_rendering_shows_sprites_drawn_on_alternate_frames():
    env = make_env(arguments("SpaceInvadersNoFrameskip-v4"), render_mode="rgb_array")
    env.reset(seed=0)
    for _ in range(50):
        obs = env.step(1)[0]
        assert np.array_equal(warp(env.render()), obs)
