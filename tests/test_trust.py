"""Interrupted, fed nonsense or attacked: what every script must survive, and what it says."""

import dataclasses
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    Interrupted,
    checkpoint_of,
    count_updates,
    environment,
    load,
    rows_of,
    same,
    small,
    train,
    words,
)
from stable_baselines3.common.vec_env import DummyVecEnv

sys.path.insert(0, str(ROOT / "benchmarks"))
import kill

NAMES = [path.stem for path in SCRIPTS if path.stem != "dqn_vecenv"]  # see test_design.py
each_script = pytest.mark.parametrize("name", NAMES)
VECTOR_NAMES = [name for name in NAMES if name != "dqn_atari"]
each_vector_script = pytest.mark.parametrize("name", VECTOR_NAMES)
SCRIPT = ROOT / "dqn_cartpole.py"  # where one script stands for all: the plumbing is the same
SAFETY_NET = 300  # seconds, which no loaded machine takes


def flat(text):
    return " ".join(text.replace("│", " ").split())


def finite(state):
    if isinstance(state, torch.Tensor):
        return bool(torch.isfinite(state).all())
    return all(map(finite, state.values() if isinstance(state, dict) else state if isinstance(state, list) else []))


def assert_no_gap_and_no_double(run_dir, evaluations):
    """Assert that progress.csv holds what the last checkpoint remembers, in order and once."""
    assert kill.wrong_rows(rows_of(run_dir), checkpoint_of(run_dir)) == 0
    assert [step for step, metric, _ in rows_of(run_dir) if metric == "eval/return_mean"] == evaluations


@pytest.fixture
def at_step(monkeypatch):
    """Let something happen at the n-th step of the two environments of the training, or of that of an evaluation."""

    def install(n, happen, num_envs=2):
        count, step_wait = itertools.count(1), DummyVecEnv.step_wait

        def stepping(envs):
            if envs.num_envs == num_envs and next(count) == n:
                happen()
            return step_wait(envs)

        monkeypatch.setattr(DummyVecEnv, "step_wait", stepping)

    return install


@pytest.fixture
def start(tmp_path):
    """Start a script in a process group of its own and wait for its end; return it with its stdout and stderr."""

    def heed():  # what ran pytest may ignore it, as nohup does
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def run(*flags, signals="", before=heed, script=SCRIPT):
        process = subprocess.Popen(
            [sys.executable, *map(str, [script, *flags])],
            cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True, preexec_fn=before,
            env={**environment(), "PYTHONPATH": str(ROOT / "tests"), "TOY_SIGNALS": signals},
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=SAFETY_NET)
            left = [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(tmp_path)]
            assert psutil.wait_procs(left, timeout=SAFETY_NET)[1] == []
        finally:
            for left in [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(tmp_path)]:
                left.kill()
        return process.returncode, out, err

    return run


# --- Killed ---


def test_killed_at_random_moments_nothing_is_lost():
    counted = kill.torment(SCRIPT.name, kills=2, rng=random.Random(1))  # after the second one a step back would show
    del counted["while_writing"]
    assert counted == {"script": SCRIPT.name, "kills": 2, "damaged": 0, "steps_back": 0, "rows_wrong": 0}


IN_PLACE = """
def in_place(source, target):
    data = Path(source).read_bytes()
    with open(target, "wb", 0) as file:
        for i in range(0, len(data), 5_000):
            file.write(data[i : i + 5_000])
            time.sleep(0.002)


os.replace = in_place


def save_checkpoint("""


def test_the_kill_test_sees_a_checkpoint_written_in_place(tmp_path, monkeypatch):
    # The power of the test above: without the renaming, kills in the middle of writing leave half a file.
    before, definition, after = SCRIPT.read_text().partition("\ndef save_checkpoint(")
    assert definition and "os.replace(" in after
    (tmp_path / SCRIPT.name).write_text(before + IN_PLACE + after)
    monkeypatch.setattr(kill, "ROOT", tmp_path)
    assert kill.torment(SCRIPT.name, kills=8, rng=random.Random(3))["damaged"] > 0


# --- Stopped and resumed ---


@pytest.mark.parametrize("name, number", [
    *((name, signal.SIGTERM) for name in NAMES), (SCRIPT.stem, signal.SIGINT), (SCRIPT.stem, signal.SIGHUP),
])  # fmt: skip
def test_a_signal_ends_the_run_with_a_checkpoint_from_which_it_goes_on(name, number, cli, at_step, tmp_path):
    run = tmp_path / "run"
    before = signal.signal(number, lambda *_: pytest.fail("the script does not listen"))
    at_step(3, lambda: os.kill(os.getpid(), number), num_envs=1)  # in the first evaluation
    try:
        status, out, err = cli(*words(small(name, run_dir=run)), script=f"{name}.py")
    finally:
        signal.signal(number, before)
    assert status == 128 + number
    assert f"--resume {run}" in out + err and "Traceback" not in out + err
    assert checkpoint_of(run)["counts"]["global_step"] == 200 and not (run / "result.json").exists()
    assert_no_gap_and_no_double(run, [200])
    before = (run / "progress.csv").read_text()

    assert cli("--resume", run, script=f"{name}.py")[0] == 0
    assert json.loads((run / "result.json").read_text())["global_step"] == 400
    assert (run / "progress.csv").read_text().startswith(before)
    assert_no_gap_and_no_double(run, [200, 400])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_to_all_processes_of_a_terminal_ends_them_all(number, start, tmp_path):
    run = tmp_path / "run"
    flags = small("dqn_cartpole", env_id="toy_envs:Signals-v0", run_dir=str(run), vec_env="subproc")
    status, out, err = start(*words(flags), signals=str(int(number)))
    assert status == 128 + number, err
    assert f"--resume {run}" in out + err and "Traceback" not in out + err
    assert 300 <= checkpoint_of(run)["counts"]["global_step"] < 400
    assert_no_gap_and_no_double(run, [200])
    train("dqn_cartpole", "", env_id="toy_envs:Signals-v0", resume=str(run))
    assert_no_gap_and_no_double(run, [200, 400])


@pytest.mark.parametrize("vec_env", ["dummy", "subproc"])
def test_a_signal_closes_the_environments(vec_env, start):
    flags = small("dqn_cartpole", env_id="toy_envs:Simulator-v0", run_dir="run", vec_env=vec_env)
    status, _, err = start(*words(flags), signals=str(int(signal.SIGINT)))  # which looks for processes that are left
    assert status == 128 + signal.SIGINT, err


def ignore(number):
    return lambda: signal.signal(number, signal.SIG_IGN)


def test_a_run_under_nohup_goes_on_without_its_terminal(start, tmp_path):
    flags = small("dqn_cartpole", env_id="toy_envs:Signals-v0", run_dir="run")
    status, out, err = start(*words(flags), signals=str(int(signal.SIGHUP)), before=ignore(signal.SIGHUP))
    assert status == 0 and (tmp_path / "run" / "result.json").exists(), out + err


def test_a_second_signal_stops_at_once_even_what_a_shell_started_with_an_ampersand(start, tmp_path):
    # Such a shell has its children ignore SIGINT.
    flags = small("dqn_cartpole", env_id="toy_envs:Signals-v0", run_dir="run", checkpoint_every=250)
    twice = f"{int(signal.SIGINT)} {int(signal.SIGINT)}"
    status, _, err = start(*words(flags), signals=twice, before=ignore(signal.SIGINT))
    assert status == -signal.SIGINT and "once more stops at once" in err, err
    assert checkpoint_of(tmp_path / "run")["counts"]["global_step"] == 250


CLOSED = """
import os, signal, sys
import dqn_cartpole
reader, writer = os.pipe()
os.close(reader)
for stream in (1, 2):
    os.dup2(writer, stream)
dqn_cartpole.on_signal(signal.SIGHUP, None)
print("the run goes on to its end", flush=True)
"""


def test_a_closed_terminal_takes_no_more_words_and_is_no_error(python):
    assert python("-c", CLOSED, PYTHONPATH=str(ROOT)).returncode == 0


def test_what_the_output_is_piped_into_may_end_by_the_same_ctrl_c(cli, at_step, tmp_path, monkeypatch):
    class Broken(io.StringIO):  # as in: python dqn_cartpole.py | tee log
        def write(self, text):
            raise BrokenPipeError

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(sys, "stdout", Broken())

    before = signal.getsignal(signal.SIGINT)
    at_step(3, interrupt, num_envs=1)  # in the first evaluation
    try:
        status, _, err = cli(*words(small("dqn_cartpole", run_dir=tmp_path / "run")))
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130 and "to go on: python" in err and "Traceback" not in err
    assert checkpoint_of(tmp_path / "run")["counts"]["global_step"] == 200


@pytest.mark.parametrize("name", ["dqn_cartpole", "ppo_cartpole"])
def test_a_run_that_reached_its_target_is_saved_before_its_last_evaluation(name, tmp_path, monkeypatch):
    def fail(*_):
        raise Interrupted

    monkeypatch.setattr(load(ROOT / f"{name}.py").Run, "evaluate", fail)
    flags = {"time_limit": 1, "target_return": -1e8, "eval_every": 10_000, "checkpoint_every": 10_000}
    with pytest.raises(Interrupted):
        train(name, tmp_path / "run", total_timesteps=2_000, **flags)
    assert 100 <= checkpoint_of(tmp_path / "run")["counts"]["global_step"] < 2_000


def test_a_console_that_cannot_be_reconfigured_is_used_as_it_is(monkeypatch, capsys):
    class Console(io.StringIO):  # as in IDLE
        reconfigure = property()

    monkeypatch.setattr(sys, "stdout", console := Console())
    monkeypatch.setattr(sys, "argv", ["dqn_cartpole.py", "--gamma", "2"])
    module = load(SCRIPT)
    with pytest.raises(SystemExit) as stop:
        module.main(module.QNetwork)
    assert stop.value.code == 2 and "AttributeError" not in console.getvalue()


@pytest.fixture
def interrupt(monkeypatch):
    """Train until this step, then end at once, as a kill does, with all in progress.csv that was written so far."""

    def run(name, run_dir, step, **flags):
        module = load(ROOT / f"{name}.py")
        tick = module.Run.tick

        def interrupted(run, **counts):
            tick(run, **counts)
            if counts["global_step"] >= step:
                run.envs.close()
                run.csv.close()
                raise Interrupted

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(module.Run, "tick", interrupted)
            train(name, run_dir, **flags)

    return run


@each_script
def test_what_was_written_after_the_checkpoint_comes_again_once(name, interrupt, tmp_path):
    run, flags = tmp_path / "run", {"time_limit": 20, "checkpoint_every": 200, "eval_every": 100}
    interrupt(name, run, 300, **flags)
    assert checkpoint_of(run)["counts"]["global_step"] == 200
    assert {metric for step, metric, _ in rows_of(run) if step > 200} >= {"eval/return_mean", "train/episode_return"}
    train(name, "", resume=str(run), **flags)
    assert_no_gap_and_no_double(run, [100, 200, 300, 400])


def test_a_later_evaluation_replaces_a_best_one_that_was_undone(interrupt, tmp_path, monkeypatch):
    scripted = iter([1, 2, 9, 3, 4, 0, 0])  # at 100, 200 and 300; again at 300, at 400; the final and the best network
    monkeypatch.setattr(load(SCRIPT), "evaluate", lambda args, network, n, seed: np.full(n, next(scripted)))
    flags = {"checkpoint_every": 200, "eval_every": 100}
    interrupt("dqn_cartpole", tmp_path / "run", 300, **flags)
    train("dqn_cartpole", "", resume=str(tmp_path / "run"), **flags)
    best, last = (checkpoint_of(tmp_path / "run", file)["network"] for file in ("best.pt", "last.pt"))
    assert same(best, last)


def test_a_run_that_is_made_longer_remembers_its_evaluation_at_the_end(tmp_path, monkeypatch):
    run, scripted = tmp_path / "run", iter([1, 2, 9, 0, 0, 3, 4, 0, 0])  # two zeros: the final and the best network
    monkeypatch.setattr(load(SCRIPT), "evaluate", lambda args, network, n, seed: np.full(n, next(scripted)))
    train("dqn_cartpole", run, eval_every=150)
    best = checkpoint_of(run, "best.pt")["network"]
    assert same(best, checkpoint_of(run)["network"])
    result = train("dqn_cartpole", "", eval_every=150, resume=str(run), total_timesteps=500)
    assert [mean for _, mean, _ in result["evaluations"]] == [1, 2, 9, 3, 4]
    assert_no_gap_and_no_double(run, [150, 300, 400, 450, 500])
    assert same(best, checkpoint_of(run, "best.pt")["network"])


def test_the_console_shows_the_mean_return_also_where_the_first_episode_ends_late(tmp_path, capsys):
    flags = {"env_id": "toy_envs:LongFilm-v0", "time_limit": 125, "train_frequency": 1, "eval_every": 400}
    train("dqn_cartpole", tmp_path / "run", **flags)
    first = next(step for step, metric, _ in rows_of(tmp_path / "run") if metric == "train/loss")
    ended = next(step for step, metric, _ in rows_of(tmp_path / "run") if metric == "train/episode_return")
    assert first < ended
    shown = r"400 steps .* eval +125.0  return_mean_100 125  loss \S+  q_taken \S+  epsilon \S+\n"
    assert re.search(shown, capsys.readouterr().out)


def test_environments_that_fail_to_close_lose_nothing(tmp_path, monkeypatch):
    def close(envs):
        if envs.num_envs == 2:  # those of the training
            raise OSError("they do not close")

    monkeypatch.setattr(DummyVecEnv, "close", close)
    with pytest.raises(OSError, match="they do not close"):
        train("dqn_cartpole", tmp_path / "run", eval_every=10**9)
    assert checkpoint_of(tmp_path / "run")["counts"]["global_step"] == 400


def test_a_run_whose_best_network_was_taken_away_ends_with_a_result(tmp_path):
    train("dqn_cartpole", tmp_path / "run")
    (tmp_path / "run" / "best.pt").unlink()
    (tmp_path / "run" / "result.json").unlink()
    result = train("dqn_cartpole", "", resume=str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["global_step"] == result["global_step"] == 400


@each_vector_script
def test_a_run_in_two_parts_ends_with_the_same_parameters_to_the_bit(name, interrupt, tmp_path):
    """Where nothing but the state of an episode could be lost, and episodes end with the checkpoint."""
    flags = {"env_id": "toy_envs:Constant-v0", "checkpoint_every": 200}
    train(name, tmp_path / "whole", **flags)
    interrupt(name, tmp_path / "parts", 300, **flags)
    assert checkpoint_of(tmp_path / "parts")["counts"]["global_step"] == 200
    train(name, "", **flags, resume=str(tmp_path / "parts"))
    whole, parts = (checkpoint_of(tmp_path / run) for run in ("whole", "parts"))
    for part in ("network", "optimizer", "counts", "torch_rng"):
        assert same(whole[part], parts[part]), part
    whole, parts = ([row for row in rows_of(tmp_path / run) if "time" not in row[1]] for run in ("whole", "parts"))
    assert whole == parts


@each_script
def test_a_resume_restores_everything_and_finishes_a_run_killed_at_its_end(name, finished, cli, tmp_path):
    run = finished(name, tmp_path / "run")
    before = checkpoint_of(run)
    (run / "result.json").unlink()
    status, out, _ = cli("--resume", run, script=f"{name}.py")
    assert status == 0 and "in place of" not in out
    after = checkpoint_of(run)
    parts = {"network", "optimizer", *({"target_network", "memory"} if name.startswith("dqn") else {})}
    assert before.keys() == after.keys() >= parts | {"counts", "torch_rng"}
    assert before["optimizer"]["state"] and before["counts"]["gradient_steps"] > 0
    if name == "dqn_atari":  # its memory stores the first frames of new episodes as soon as they begin
        assert after["memory"].pop("newest").tolist() == (before["memory"].pop("newest") + 2).tolist()
        after["memory"] = {key: array[: len(before["memory"][key])] for key, array in after["memory"].items()}
    assert [part for part in before if part not in ("args", "record") and not same(before[part], after[part])] == []
    assert json.loads((run / "result.json").read_text()).items() >= after["counts"].items()
    assert_no_gap_and_no_double(run, [200, 400])


@each_script
def test_flags_given_with_a_resume_replace_the_saved_ones_and_are_said(name, finished, cli, tmp_path):
    run = finished(name, tmp_path / "run")
    status, out, _ = cli("--resume", run, "--total-timesteps", 600, "--gamma", 0.5, script=f"{name}.py")
    assert status == 0
    gamma = load(ROOT / f"{name}.py").Args.gamma
    said = [line.split() for line in out.splitlines() if "in place of" in line]
    assert sorted((line[0], line[1], line[-1]) for line in said) == [
        ("--gamma", "0.5", str(gamma)),
        ("--total-timesteps", "600", "400"),
    ]
    assert checkpoint_of(run)["counts"]["global_step"] == 600
    assert json.loads((run / "args.json").read_text()).items() >= {"gamma": 0.5, "seed": 3}.items()
    play = ("--play", run / "last.pt", "--final-eval-episodes", 1)  # its --resume is among the saved flags
    assert cli(*play, script=f"{name}.py")[0] == 0


# --- Checkpoints from strangers ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short finished run per script; every test gets a copy."""
    runs = {}

    def copy_of(name, to):
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp("finished") / name
            train(name, runs[name], **({"checkpoint_memory": True} if name == "dqn_atari" else {}))
        return Path(shutil.copytree(runs[name], to))

    return copy_of


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_says_what_it_lacks(finished, cli, tmp_path):
    run = finished("dqn_cartpole", tmp_path / "run")
    whole = checkpoint_of(run)
    torch.save({name: part for name, part in whole.items() if name not in ("memory", "optimizer")}, run / "last.pt")
    status, _, err = cli("--resume", run)
    assert status == 2 and f"{run / 'last.pt'} cannot be used: it holds no memory and no optimizer\n" in err


@pytest.mark.parametrize("flag, value", [("--run-dir", ""), ("--run-dir", "other"), ("--play", "best.pt")])
def test_a_resumed_run_has_one_place_and_is_not_played(flag, value, finished, cli, tmp_path):
    run = finished("dqn_cartpole", tmp_path / "run")
    status, _, err = cli("--resume", run, flag, run / value)
    assert status == 2 and "give it without --play and --run-dir" in " ".join(err.split()) and "Traceback" not in err


DAMAGE = {
    "code": lambda good: {**good, "network": Payload()},
    "another script": lambda good: {**good, "script": "somebody_elses"},
    "no tensors": lambda good: {**good, "network": {}},
    "no more than a name": lambda good: {"script": good["script"]},
    "no dict": lambda good: [1, 2, 3],
    "cut off": lambda good: 1_000,
    "empty": lambda good: 0,
}


@pytest.mark.parametrize("name, how", [(SCRIPT.stem, how) for how in DAMAGE])
@pytest.mark.parametrize("flag", ["--play", "--resume"])
def test_a_strangers_checkpoint_gets_one_clear_line(name, flag, how, finished, cli, tmp_path):
    run = finished(name, tmp_path / "run")
    file = run / ("best.pt" if flag == "--play" else "last.pt")
    damaged = DAMAGE[how](checkpoint_of(run, file.name))
    if isinstance(damaged, int):
        file.write_bytes(file.read_bytes()[:damaged])
    else:
        torch.save(damaged, file)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    status, out, err = cli(flag, file if flag == "--play" else run, script=f"{name}.py")
    assert status == 2
    assert err.startswith(f"{name}: {file} cannot be used: ") and err.count("\n") == 1
    assert "Traceback" not in out + err and not (tmp_path / "executed").exists()
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


# --- NaN ---


@pytest.mark.parametrize("env_id, last_step", [("NanFirst", None), ("NanLater", 290), ("NotANumber", 800)])
@each_vector_script
def test_nan_in_an_observation_stops_the_run_before_a_checkpoint_holds_it(name, env_id, last_step, tmp_path, cli):
    flags = {"env_id": f"toy_envs:{env_id}-v0", "total_timesteps": 1_000, "checkpoint_every": 10}
    status, out, err = cli(*words(small(name, run_dir=tmp_path / "run", **flags)), script=f"{name}.py")
    assert status == 1 and "Traceback" not in out + err
    assert re.search(rf"{name}: the \w+ is not finite at step", err)
    if last_step is None:
        assert not (tmp_path / "run" / "last.pt").exists()
    else:
        kept = checkpoint_of(tmp_path / "run")
        assert last_step - 100 <= kept["counts"]["global_step"] <= last_step
        assert finite(kept["network"]) and finite(kept.get("memory", {}))


@each_script
def test_a_loss_that_explodes_stops_the_run_at_its_step(name, tmp_path, cli):
    how = {"env_id": "toy_envs:Huge-v0"} if name == "ppo_cartpole" else {"learning_rate": 1e9}  # which PPO survives
    flags = small(name, run_dir=tmp_path / "run", checkpoint_every=2, **how)
    status, out, err = cli(*words(flags), script=f"{name}.py")
    assert status == 1 and "Traceback" not in out + err
    assert re.search(rf"{name}: the \w+ is not finite at step", err)
    kept = list((tmp_path / "run").glob("*.pt"))
    assert kept or name == "ppo_cartpole"  # whose first update explodes
    assert all(finite(checkpoint_of(tmp_path / "run", file.name)["network"]) for file in kept)


# --- Errors of others ---


@pytest.mark.parametrize("kind", [RuntimeError, FloatingPointError, ValueError])
def test_an_error_of_an_environment_keeps_its_traceback(kind, tmp_path, cli):
    with pytest.raises(kind) as error:
        cli(*words(small("dqn_cartpole", env_id=f"toy_envs:{kind.__name__}-v0", run_dir=tmp_path / "run")))
    assert any(frame.filename.endswith("toy_envs.py") for frame in traceback.extract_tb(error.tb))


def test_an_error_deep_in_an_init_keeps_its_traceback(tmp_path, cli):
    with pytest.raises(TypeError) as error:
        cli(*words(small("dqn_cartpole", env_id="toy_envs:BrokenInit-v0", run_dir=tmp_path / "run")))
    assert 'return table["limits"]' in "".join(traceback.format_exception(error.value))
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_a_worker_is_shown_and_ends_the_run_and_all_its_processes(start, tmp_path):
    flags = small("dqn_cartpole", env_id="toy_envs:Raising-v0", vec_env="subproc", run_dir="run", checkpoint_every=50)
    status, _, err = start(*words(flags))
    assert status == 1 and "ZeroDivisionError: the toy broke" in err and "its own error stands above" in err
    assert checkpoint_of(tmp_path / "run")["counts"]["global_step"] == 50


def test_more_workers_than_files_may_be_open_get_one_line(start, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))  # noqa: E731
    status, _, err = start("--vec-env", "subproc", "--num-envs", 100, before=limit)
    assert status == 2, err  # the fork server may show its own traceback, but the script does not
    assert err.count("dqn_cartpole: --num-envs 100: ") == 1 and "dqn_cartpole.py" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (0, 2)])
def test_workers_that_end_while_they_start_are_no_error_after_ctrl_c(number, status, cli, tmp_path, monkeypatch):
    def start(env_fns):
        if number:
            os.kill(os.getpid(), number)
        raise EOFError

    monkeypatch.setattr("stable_baselines3.common.vec_env.SubprocVecEnv", start)
    assert cli("--vec-env", "subproc")[0] == status
    assert list(tmp_path.iterdir()) == []


# --- The same again ---


@each_script
def test_a_seed_gives_its_parameters_to_the_bit_however_often_it_is_evaluated_and_saved(name, tmp_path):
    often = {"eval_every": 50, "eval_episodes": 3, "checkpoint_every": 70}
    for run, flags in {"first": {}, "again": often, "other": {"seed": 4}}.items():
        train(name, tmp_path / run, **flags)
    first, again, other = (checkpoint_of(tmp_path / run)["network"] for run in ("first", "again", "other"))
    assert same(first, again) and not same(first, other)


# --- Where a script runs ---


@each_script
def test_it_trains_in_a_thread(name, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(name, tmp_path / "run")))
    thread.start()
    thread.join()
    assert results[0]["global_step"] == 400


@each_script
def test_a_script_pasted_into_a_notebook_waits_to_be_called(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell = {"__name__": "__main__"}
    exec((ROOT / f"{name}.py").read_text(), cell)
    assert list(tmp_path.iterdir()) == []
    flags = small(name, vec_env="subproc" if name == "dqn_cartpole" else "dummy")
    assert cell["train"](cell["Args"](**flags))["global_step"] == 400


def test_two_runs_in_the_same_second_have_two_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    dirs = {train("dqn_cartpole", "")["run_dir"] for _ in range(2)}
    assert len(dirs) == 2 == len(list((tmp_path / "runs").iterdir()))


@pytest.mark.parametrize("flags, status, said", [(["--run-dir", "läuft"], 0, b"l?uft"), (["--env-id", "Mü"], 2, b"M")])
def test_what_a_console_cannot_show_ends_no_run(flags, status, said, cli, tmp_path, monkeypatch):
    streams = []
    for name, errors in (("stdout", "strict"), ("stderr", "backslashreplace")):  # as Python opens them
        streams.append(io.TextIOWrapper(io.BytesIO(), "ascii", errors, write_through=True))
        monkeypatch.setattr(sys, name, streams[-1])
    assert cli(*words(small("dqn_cartpole")), *flags)[0] == status
    assert said in b"".join(stream.buffer.getvalue() for stream in streams)
    assert streams[0].line_buffering  # whoever follows a log file sees each line at once
    assert (tmp_path / "läuft" / "result.json").exists() == (status == 0)


@pytest.mark.parametrize("tracker, extra", [("wandb", {"sync_tensorboard": True}), ("swanlab", {})])
def test_a_tracker_is_started_before_anything_is_logged(tracker, extra, tmp_path, monkeypatch):
    module, calls = ModuleType(tracker), []
    module.__spec__ = ModuleSpec(tracker, None)
    module.sync_tensorboard_torch = lambda: calls.append("sync")
    module.init = lambda **options: calls.append(options)
    monkeypatch.setitem(sys.modules, tracker, module)
    writer = load(SCRIPT).SummaryWriter
    monkeypatch.setattr(load(SCRIPT), "SummaryWriter", lambda *a, **k: calls.append("writer") or writer(*a, **k))
    train("dqn_cartpole", tmp_path / "run", track=tracker)
    *before, started, after = calls  # both copy only what a SummaryWriter writes that is made after them
    assert before == (["sync"] if tracker == "swanlab" else []) and after == "writer"
    config = started.pop("config")
    assert config["seed"] == 3 and started == {"project": "dqn_cartpole", "name": "run", **extra}


# --- Drawing ---


@each_vector_script
def test_a_film_of_a_long_episode_ends_after_1500_frames(name, tmp_path, monkeypatch):
    films = []

    def stop_recording(video):  # without encoding it
        films.append(len(video.recorded_frames))
        video.recording, video.recorded_frames = False, []

    monkeypatch.setattr(gym.wrappers.RecordVideo, "stop_recording", stop_recording)
    flags = {"env_id": "toy_envs:LongFilm-v0", "video": True, "eval_every": 10_000, "final_eval_episodes": 1}
    train(name, tmp_path / "run", **flags)
    assert len(films) == 1 and 1_400 < films[0] <= 1_500


def test_a_film_that_fails_leaves_the_result(tmp_path, monkeypatch):
    def stop_recording(video):
        video.recording, video.recorded_frames = False, []
        raise OSError("no encoder")

    monkeypatch.setattr(gym.wrappers.RecordVideo, "stop_recording", stop_recording)
    with pytest.raises(OSError, match="no encoder"):
        train("dqn_cartpole", tmp_path / "run", env_id="toy_envs:LongFilm-v0", video=True)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["global_step"] == 400


def test_a_window_needs_a_screen(finished, cli, tmp_path, monkeypatch):
    file = finished("dqn_cartpole", tmp_path / "run") / "best.pt"
    for name in ("SDL_VIDEODRIVER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    status, out, err = cli("--play", file, "--render")
    assert status == 2 and "--render True: " in flat(err) and "Traceback" not in out + err


def test_a_window_shows_an_environment_that_only_gives_pictures(cli, tmp_path):
    train("dqn_cartpole", tmp_path / "run", env_id="toy_envs:Pictures-v0")
    status, out, _ = cli("--play", tmp_path / "run" / "best.pt", "--render", "--time-limit", 5)
    assert status == 0 and out.count("return 5.0\n") == 3


# --- Nonsense on the command line: one case per kind of check ---

FILM = ["--video", "--total-timesteps", 1_100]  # it would take a while to notice after the default training
ANY = {
    "unknown environment": (["--env-id", "NoSuchEnvironment-v1"], "--env-id NoSuchEnvironment-v1"),
    "near match": (["--env-id", "CartPol-v1"], "Did you mean: `CartPole`"),
    "module that is not there": (["--env-id", "no_such_module:Env-v0"], "no_such_module"),
    "continuous actions": (["--env-id", "Pendulum-v1"], "--env-id Pendulum-v1"),
    "too few": (["--total-timesteps", 0], "--total-timesteps 0: give a number from 1 to"),
    "too many": (["--total-timesteps", "1" + "0" * 400], "--total-timesteps 1000"),
    "no number": (["--total-timesteps", "many"], "many"),
    "not a number": (["--learning-rate", "nan"], "--learning-rate nan"),
    "above its range": (["--gamma", 1.5], "--gamma 1.5"),
    "no time": (["--time-limit", 0], "--time-limit 0"),
    "no such choice": (["--vec-env", "threads"], "--vec-env"),
    "no such device": (["--device", "cuda:99"], "--device cuda:99"),
    "missing package": (["--track", "wandb"], "--track wandb: pip install it first"),
    "existing run directory": (["--run-dir", "."], "cannot write the run directory ."),
    "name that no disk takes": (["--run-dir", "x" * 300], "File name too long"),
    "unknown flag": (["--learning-rat", 0.1], "--learning-rate"),
    "word without a flag": (["something"], "something"),
    "no such run": (["--resume", "nowhere"], "nowhere/last.pt cannot be used"),
    "no such checkpoint": (["--play", "nowhere.pt"], "nowhere.pt cannot be used"),
    "window in a training": (["--render"], "--render True: needs --play"),
    "film of what has no pictures": (["--env-id", "toy_envs:Constant-v0", *FILM], "--video True: this"),
    "film of what draws nothing": (["--env-id", "toy_envs:Blank-v0", *FILM], "--video True: this"),
    "film of what forgets its mode": (["--env-id", "toy_envs:ForgetsMode-v0", *FILM], "--video True: this"),
    "film of what takes no mode": (["--env-id", "toy_envs:FixedMode-v0", *FILM], "--video True: this"),
    "film without moviepy": (FILM, "--video True: pip install moviepy first"),
    "learning never starts": (["--learning-starts", 900, "--total-timesteps", 500], "--learning-starts 900"),
}
OWN = {
    "dqn_atari": {
        "not an Atari game": (["--env-id", "CartPole-v1"], "--env-id CartPole-v1"),
        "learning before there is a transition": (["--learning-starts", 4], "--learning-starts 4"),
    },
    "dqn_lstm_cartpole": {"no loss": (["--burn-in", 9, "--sequence-length", 8], "--burn-in 9")},
    "ppo_cartpole": {"minibatches that do not divide": (["--num-minibatches", 7], "--num-minibatches 7")},
}
NONSENSE = [
    pytest.param(name, *case, id=f"{name}: {what}")
    for name, cases in ({"dqn_cartpole": ANY} | OWN).items()
    for what, case in cases.items()
]


@pytest.mark.parametrize("name, arguments, message", NONSENSE)
def test_nonsense_is_refused_before_anything_is_written(name, arguments, message, cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    if "moviepy" in message:
        monkeypatch.setitem(sys.modules, "moviepy", None)
    status, out, err = cli(*arguments, script=f"{name}.py")
    assert status == 2
    assert message in flat(err)
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


@each_script
def test_a_number_that_float32_cannot_hold_ends_the_run(name):
    check = load(ROOT / f"{name}.py").Run.check_finite
    check(None, 8, reward=np.array([1e38, -1.0]))
    for value in (1e39, -math.inf, math.nan):
        with pytest.raises(SystemExit, match="the reward is not finite at step 8"):
            check(None, 8, reward=np.array([0.0, value]))


@each_script
def test_every_number_has_a_range(name):
    module = load(ROOT / f"{name}.py")
    numbers = [field for field in dataclasses.fields(module.Args) if type(field.default) in (int, float)]
    for field in numbers:
        if field.name != "target_return":
            with pytest.raises(ValueError, match=f"--{field.name.replace('_', '-')} -7"):
                module.Args(**{field.name: type(field.default)(-7)})


@each_script
def test_a_choice_that_does_not_exist_is_refused_from_python_too(name):
    module = load(ROOT / f"{name}.py")
    for field in dataclasses.fields(module.Args):
        if str(field.type).startswith("typing.Literal"):
            with pytest.raises(ValueError, match=f"--{field.name.replace('_', '-')} hubber: give one of"):
                module.Args(**{field.name: "hubber"})


def test_a_run_directory_of_its_own_has_a_name_that_every_disk_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (train("dqn_cartpole", "", env_id="toy_envs:Space/Constant-v0")["run_dir"] for _ in range(2))
    assert re.fullmatch(r"runs/toy_envs-Space-Constant-v0__dqn_cartpole__3__\d{8}-\d{6}-\d{9}", first)
    assert first != second and all(Path(run, "result.json").exists() for run in (first, second))


@pytest.mark.parametrize("before", [True, False])  # the evaluation, which may write best.pt
def test_a_network_that_is_no_number_is_not_saved(before, tmp_path, monkeypatch):
    module, evaluate = load(SCRIPT), load(SCRIPT).Run.evaluate

    def spoil(run, *args):  # after the checks of what is learned from, before what is written at the same step
        before or evaluate(run, *args)
        if run.counts["global_step"] > 200:
            next(run.network.parameters()).data.fill_(math.nan)
        before and evaluate(run, *args)

    monkeypatch.setattr(module.Run, "evaluate", spoil)
    with pytest.raises(SystemExit, match="the network is not finite at step 400"):
        train("dqn_cartpole", tmp_path / "run", checkpoint_every=100, eval_every=200)
    assert checkpoint_of(tmp_path / "run")["counts"]["global_step"] == 300
    for name in ("last.pt", "best.pt"):
        assert finite(torch.load(tmp_path / "run" / name, weights_only=True)["network"])


# --- When things are due ---


@each_script
def test_what_is_due_at_a_multiple_comes_when_it_is_crossed(name, tmp_path, monkeypatch):
    module, saved = load(Path(name)), []
    save = module.Run.save
    monkeypatch.setattr(module.Run, "save", lambda run: (saved.append(run.counts["global_step"]), save(run)))
    iteration = 3 * 20 if name == "ppo_cartpole" else 3  # transitions
    flags = {"num_envs": 3, "num_steps": 20, "eval_every": 110, "checkpoint_every": 115, "target_frequency": 90}
    known = {field.name for field in dataclasses.fields(module.Args)}
    updates = count_updates(module, monkeypatch) if name != "ppo_cartpole" else {}
    flags = {flag: value for flag, value in flags.items() if flag in known}
    result = train(name, tmp_path / "run", **flags)
    if name != "ppo_cartpole":  # it has no target network
        assert result["gradient_steps"] * small(name)["train_frequency"] // 90 == 3 in updates.values()
    end = result["global_step"]
    ends = range(iteration, end + 1, iteration)

    def due(every):
        return [step for step in ends if step // every > (step - iteration) // every]

    assert end not in due(110)  # the final network is evaluated too, and once if a finished run is resumed
    again = train(name, "", **flags, resume=str(tmp_path / "run"))
    for evaluations in (result["evaluations"], again["evaluations"]):
        assert [step for step, *_ in evaluations] == [*due(110), end]
    rows = rows_of(tmp_path / "run")
    assert [step for step, metric, _ in rows if metric == "eval/return_mean"] == [*due(110), end]
    assert end not in due(115)  # it is saved before its last evaluation and after it, and at the end of the resume
    assert saved == [*due(115), end, end, end]
