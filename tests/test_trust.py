"""Interrupted, fed nonsense or attacked: what every script must survive, and what it says."""

import csv
import dataclasses
import importlib.util
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, SCRIPTS, environment, load

sys.path.insert(0, str(ROOT / "benchmarks"))
import kill

NAMES = [path.stem for path in SCRIPTS]
VECTOR_SCRIPTS = [name for name in NAMES if name != "dqn_atari"]
each_script = pytest.mark.parametrize("name", NAMES)

# A run of some seconds on any script.
SMALL = {"eval_every": 500, "eval_episodes": 1, "final_eval_episodes": 1, "checkpoint_every": 400, "num_envs": 2}
SMALL_DQN = SMALL | {"learning_starts": 200, "buffer_size": 2_000, "batch_size": 16}
OPTIONS = {
    "dqn_atari": SMALL_DQN | {"time_limit": 30, "vec_env": "dummy"},
    "dqn_vecenv": SMALL_DQN | {"vec_env": "dummy"},
    "ppo_cartpole": SMALL | {"num_steps": 40},
}


def options(name, **changes):
    return OPTIONS.get(name, SMALL_DQN) | {"total_timesteps": 1_200} | changes


def words(flags):
    return [str(word) for flag, value in flags.items() for word in (f"--{flag.replace('_', '-')}", value)]


def train(name, run_dir, **changes):
    module = load(ROOT / f"{name}.py")
    return module.train(module.Args(**options(name, run_dir=str(run_dir), **changes)))


def checkpoint_of(run_dir, name="last.pt"):
    return torch.load(run_dir / name, weights_only=True)


def flat(text):
    return " ".join(text.replace("│", " ").split())


# --- Killed ---


@each_script
def test_killed_at_random_moments_nothing_is_lost(name):
    counted = kill.torment(f"{name}.py", kills=3, rng=random.Random(name))
    assert counted["kills"] > counted["began_again"]
    assert (counted["damaged"], counted["steps_back"], counted["evaluations_wrong"]) == (0, 0, 0)


def test_the_kill_test_sees_a_checkpoint_written_in_place(tmp_path, monkeypatch):
    # The power of the test above: without the renaming, kills in the middle of writing leave half a file.
    text = (ROOT / "dqn_cartpole.py").read_text()
    atomic = (
        '        with open(path.with_suffix(".tmp"), "wb") as file:\n            torch.save(contents, file)\n'
        "            file.flush()\n            os.fsync(file.fileno())\n"
        '        os.replace(path.with_suffix(".tmp"), path)\n'
    )
    slow = (
        '        torch.save(contents, path.with_suffix(".tmp"))\n'
        '        data = path.with_suffix(".tmp").read_bytes()\n        with open(path, "wb", 0) as file:\n'
        "            for i in range(0, len(data), 5_000):\n                file.write(data[i : i + 5_000])\n"
        "                time.sleep(0.002)\n"
    )
    assert atomic in text
    (tmp_path / "dqn_cartpole.py").write_text(text.replace(atomic, slow))
    monkeypatch.setattr(kill, "ROOT", tmp_path)
    try:
        assert kill.torment("dqn_cartpole.py", kills=8, rng=random.Random(3))["damaged"] > 0
    except RuntimeError as error:  # the damaged file could not be resumed
        assert "is no checkpoint" in str(error)


# --- Resumed ---


class Interrupted(BaseException):
    pass


DIE_EARLY = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import dqn_cartpole

dqn_cartpole.SummaryWriter = lambda *args, **options: os._exit(9)  # as SIGKILL does: nothing is flushed
dqn_cartpole.train(dqn_cartpole.Args(**json.loads(sys.argv[2])))
"""


def test_a_kill_while_a_resumed_run_begins_loses_no_curve(python, tmp_path):
    train("dqn_cartpole", tmp_path / "run")
    before = (tmp_path / "run" / "progress.csv").read_text()
    assert before.count("eval/return_mean") == 2
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    args |= {"resume": str(tmp_path / "run"), "run_dir": "", "total_timesteps": 5_000}
    assert python("-c", DIE_EARLY, ROOT, json.dumps(args)).returncode == 9
    assert (tmp_path / "run" / "progress.csv").read_text() == before
    assert json.loads((tmp_path / "run" / "args.json").read_text())["total_timesteps"] == 5_000


SIGNALLED_EARLY = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import dqn_cartpole

write, sent = dqn_cartpole.write_atomically, []

def written(*arguments):
    write(*arguments)
    if not sent:
        sent.append(os.kill(os.getpid(), int(sys.argv[3])))

dqn_cartpole.write_atomically = written
dqn_cartpole.train(dqn_cartpole.Args(**json.loads(sys.argv[2])))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_run_directory_is_made_leaves_one_that_can_be_resumed(number, tmp_path, python):
    flags = json.dumps(options("dqn_cartpole", run_dir=str(tmp_path / "run")))
    done = python("-c", SIGNALLED_EARLY, ROOT, flags, int(number))
    assert done.returncode == 128 + number and "to go on" in done.stderr, done.stderr
    done = python(ROOT / "dqn_cartpole.py", "--resume", tmp_path / "run")
    assert done.returncode == 0 and (tmp_path / "run" / "result.json").exists(), done.stderr


@pytest.mark.parametrize("vec_env", ["dummy", "subproc"])
@pytest.mark.parametrize("name", VECTOR_SCRIPTS)
def test_an_interrupted_run_ends_with_the_same_parameters_to_the_bit(name, vec_env, tmp_path, monkeypatch):
    """At a checkpoint in the middle of episodes, the interrupted process is gone; another one goes on."""
    module = load(ROOT / f"{name}.py")
    changes = {"vec_env": vec_env, "total_timesteps": 2_000}
    train(name, tmp_path / "whole", **changes)

    tick = module.Run.tick

    def interrupted(run, **counts):
        tick(run, **counts)
        if counts["global_step"] >= 900:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(module.Run, "tick", interrupted)
        with pytest.raises(Interrupted):
            train(name, tmp_path / "parts", **changes)
    assert 400 <= checkpoint_of(tmp_path / "parts")["counts"]["global_step"] < 1_000
    args = json.loads((tmp_path / "parts" / "args.json").read_text()) | {
        "resume": str(tmp_path / "parts"),
        "run_dir": "",
    }
    module.train(module.Args(**args))

    whole, parts = (checkpoint_of(tmp_path / run) for run in ("whole", "parts"))
    assert whole["counts"] == parts["counts"]
    assert all(torch.equal(whole["network"][key], parts["network"][key]) for key in whole["network"])
    assert torch.equal(whole["torch_rng"], parts["torch_rng"])

    def rows(run):
        with open(tmp_path / run / "progress.csv") as file:
            return [row for row in csv.reader(file) if not row[1].startswith("time/")]

    assert rows("whole") == rows("parts")


def test_an_environment_that_is_more_than_data_begins_again_and_says_so(tmp_path, capsys):
    run = tmp_path / "run"
    train("dqn_cartpole", run, env_id="toy_envs:Engine-v0", total_timesteps=600)
    assert checkpoint_of(run)["env_states"] is None
    module = load(ROOT / "dqn_cartpole.py")
    args = json.loads((run / "args.json").read_text()) | {"resume": str(run), "run_dir": "", "total_timesteps": 800}
    assert module.train(module.Args(**args))["global_step"] == 800
    assert "begin new episodes" in capsys.readouterr().out


def test_the_state_of_an_environment_is_saved_and_loaded():
    module = load(ROOT / "dqn_cartpole.py")
    for env_id in ("CartPole-v1", "Acrobot-v1", "MountainCar-v0"):
        args = module.Args(env_id=env_id)
        first, second = module.make_env(args), module.make_env(args)
        first.reset(seed=1)
        second.reset(seed=2)
        for _ in range(7):
            last = first.step(1)[0]
        torch.save(first.get_state(), buffer := io.BytesIO())
        buffer.seek(0)
        obs = second.set_state(torch.load(buffer, weights_only=True))
        assert obs.dtype == last.dtype and (obs == last).all()
        for step in range(300):
            a, b = first.step(step % 2), second.step(step % 2)
            assert (a[0] == b[0]).all() and a[1:4] == b[1:4]
            if a[2] or a[3]:
                assert [a[4]["episode"][key] for key in "rl"] == [b[4]["episode"][key] for key in "rl"]
                assert (first.reset()[0] == second.reset()[0]).all()


@pytest.mark.parametrize("kind", ["PCG64", "MT19937", "Philox", "SFC64"])
def test_every_random_generator_can_be_saved_and_loaded(kind):
    module = load(ROOT / "dqn_cartpole.py")
    first, second = (np.random.Generator(getattr(np.random, kind)(seed)) for seed in (1, 2))
    torch.save(module.pack(first), buffer := io.BytesIO())
    buffer.seek(0)
    loaded = module.unpack(torch.load(buffer, weights_only=True), second)
    assert loaded is second and (second.random(5) == first.random(5)).all()


@pytest.mark.parametrize("held", [gym.make("CartPole-v1"), np.longdouble(1)], ids=["a simulator", "128 bits"])
def test_what_a_checkpoint_cannot_hold_makes_an_environment_more_than_data(held):
    module = load(ROOT / "dqn_cartpole.py")
    env = module.make_env(module.Args())
    env.reset(seed=1)
    assert env.get_state() is not None
    env.unwrapped.env = held  # an attribute of that name which is no layer
    assert env.get_state() is None


@each_script
def test_result_json_of_before_the_resume_is_gone(name, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(name, run)
    assert (run / "result.json").exists()
    module = load(ROOT / f"{name}.py")
    args = json.loads((run / "args.json").read_text()) | {"resume": str(run), "run_dir": "", "total_timesteps": 9_000}

    def interrupted(run, **counts):
        raise Interrupted

    monkeypatch.setattr(module.Run, "tick", interrupted)
    with pytest.raises(Interrupted):
        module.train(module.Args(**args))
    assert not (run / "result.json").exists()


@pytest.mark.parametrize("name", VECTOR_SCRIPTS)
def test_a_run_killed_while_it_finishes_is_finished_by_a_resume(name, tmp_path, cli):
    run = tmp_path / "run"
    train(name, run, total_timesteps=1_201)  # it ends at 1,202, or with a whole rollout
    before = checkpoint_of(run)
    assert before["counts"]["global_step"] > 1_201
    (run / "result.json").unlink()
    assert cli("--resume", run, script=f"{name}.py")[0] == 0
    after = checkpoint_of(run)
    assert (
        after["counts"]
        == before["counts"]
        == {name: json.loads((run / "result.json").read_text())[name] for name in before["counts"]}
    )
    assert all(torch.equal(before["network"][key], after["network"][key]) for key in before["network"])
    status, _, err = cli("--resume", run, "--total-timesteps", 1_200, script=f"{name}.py")
    assert status == 2 and "--total-timesteps 1200 is less than the run has behind it" in err


@pytest.mark.parametrize("rubbish", ["\x00\xff garbage\n12,half", "", None])
def test_a_garbled_progress_csv_does_not_stop_a_resume(rubbish, tmp_path, cli):
    run = tmp_path / "run"
    train("dqn_cartpole", run)
    if rubbish is None:
        (run / "progress.csv").unlink()
    else:
        (run / "progress.csv").write_text(rubbish)
    assert cli("--resume", run, "--total-timesteps", 1_400)[0] == 0
    with open(run / "progress.csv") as file:
        assert {len(row) for row in csv.reader(file)} == {3}


# --- Disks and directories ---


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))


def test_a_full_disk_is_reported_and_the_checkpoints_stay(tmp_path):
    # Files may not grow beyond 150 kB: the first checkpoints fit, and then the memory in them has grown.
    run = tmp_path / "run"
    flags = words(options("dqn_cartpole", total_timesteps=20_000, buffer_size=20_000, run_dir=run))
    done = subprocess.run(
        [sys.executable, ROOT / "dqn_cartpole.py", *flags],
        preexec_fn=limit_file_size, capture_output=True, text=True, env=environment(), timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "dqn_cartpole: [Errno 27] File too large" in done.stderr and "last.pt" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(run.glob("*.tmp"))
    step = checkpoint_of(run)["counts"]["global_step"]
    assert 400 <= step < 5_000
    assert checkpoint_of(run, "best.pt")["return_mean"] > 0
    done = subprocess.run(
        [sys.executable, ROOT / "dqn_cartpole.py", "--resume", run, "--total-timesteps", str(step + 100)],
        capture_output=True, text=True, env=environment(), timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@each_script
def test_a_run_directory_that_cannot_be_made_is_refused(name, tmp_path, cli):
    (tmp_path / "file").touch()
    status, out, err = cli(*words(options(name)), "--run-dir", tmp_path / "file" / "run", script=f"{name}.py")
    assert status == 2
    assert "cannot write the run directory" in err and "Traceback" not in out + err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_directory_of_another_script_is_not_touched(tmp_path, cli):
    run = tmp_path / "run"
    train("ppo_cartpole", run)
    before = {path: path.read_bytes() for path in run.iterdir()}
    status, _, err = cli("--resume", run)
    assert status == 2 and "cannot go on" in err
    assert {path: path.read_bytes() for path in run.iterdir()} == before


# --- Checkpoints from strangers ---


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def damage(path, how):
    if how == "code":
        torch.save({**torch.load(path, weights_only=True), "network": Payload()}, path)
    elif how == "another script":
        torch.save({**torch.load(path, weights_only=True), "script": "somebody_elses"}, path)
    elif how == "cut off":
        path.write_bytes(path.read_bytes()[:1_000])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "garbled":
        path.write_bytes(os.urandom(2_000))
    elif how == "no tensors":
        torch.save({**torch.load(path, weights_only=True), "network": {}}, path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short finished run per script; every test gets a copy."""
    runs = {}

    def copy_of(name, to):
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp("finished") / name
            train(name, runs[name])
        return Path(shutil.copytree(runs[name], to))

    return copy_of


@pytest.mark.parametrize("how", ["code", "another script", "cut off", "empty", "garbled", "no tensors"])
@pytest.mark.parametrize("flag", ["--play", "--resume"])
@each_script
def test_a_strangers_checkpoint_gets_one_clear_line(name, flag, how, finished, cli, tmp_path):
    run = finished(name, tmp_path / "run")
    file = run / ("best.pt" if flag == "--play" else "last.pt")
    damage(file, how)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    status, out, err = cli(flag, file if flag == "--play" else run, script=f"{name}.py")
    assert status == 2
    assert file.name in err and "Traceback" not in out + err
    assert err.count("\n") == 1
    assert not (tmp_path / "executed").exists()
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("gamma", "0.99", "--gamma 0.99: must be float"),
        ("num_envs", 4.0, "--num-envs 4.0: must be int"),
        ("seed", None, "--seed None: must be int"),
        ("time_limit", "5", "--time-limit 5: must be int or NoneType"),
        ("loss", "l1", "--loss l1: must be mse or huber"),
        ("hidden_size", 32, "its --hidden-size is 64"),  # the type is right, but last.pt holds another network
        ("gamma", 0.9, "its --gamma is 0.99"),
    ],
)
def test_an_edited_args_json_is_refused(name, value, message, finished, cli, tmp_path):
    run = finished("dqn_cartpole", tmp_path / "run")
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps({**args, name: value}))
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    status, out, err = cli("--resume", run, "--total-timesteps", 2_000)
    assert status == 2
    assert message in err and "Traceback" not in out + err
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@each_script
def test_a_tracker_that_does_not_start_leaves_no_run(name, cli, tmp_path, monkeypatch):
    package = tmp_path / "packages"
    package.mkdir()
    (package / "wandb.py").write_text("def init(**options):\n    raise RuntimeError('no API key: wandb login')\n")
    monkeypatch.syspath_prepend(package)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    status, out, err = cli(
        *words(options(name)), "--track", "wandb", "--run-dir", tmp_path / "run", script=f"{name}.py"
    )
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert status == 2
    assert "--track wandb: no API key: wandb login" in err and "Traceback" not in out + err
    assert not (tmp_path / "run").exists()


# --- NaN ---


def test_nan_in_an_observation_stops_the_run_at_its_step(tmp_path, cli):
    flags = words(options("dqn_cartpole", env_id="toy_envs:NotANumber-v0", run_dir=tmp_path / "run"))
    status, out, err = cli(*flags)
    assert status == 1
    assert "dqn_cartpole: the observation is not finite at step 800" in err and "Traceback" not in out + err
    kept = checkpoint_of(tmp_path / "run")
    assert kept["counts"]["global_step"] == 400
    assert all(torch.isfinite(value).all() for value in kept["network"].values())


@pytest.mark.parametrize("env_id", ["NanFirst-v0", "NanLater-v0"])
@pytest.mark.parametrize("name", VECTOR_SCRIPTS)
def test_nan_where_an_episode_begins_is_never_saved(name, env_id, tmp_path, cli):
    hide = {"hide": "none"} if name == "dqn_lstm_cartpole" else {}
    flags = options(name, env_id=f"toy_envs:{env_id}", run_dir=tmp_path / "run", checkpoint_every=8, **hide)
    status, out, err = cli(*words(flags), script=f"{name}.py")
    assert status == 1 and "Traceback" not in out + err
    assert re.search(rf"{name}: .* is not finite at step", err)
    assert (tmp_path / "run").exists() == (env_id == "NanLater-v0")
    if env_id == "NanLater-v0" and name != "ppo_cartpole":  # which keeps no observations
        columns = checkpoint_of(tmp_path / "run")["memory"]["columns"]
        columns = list(columns.values() if isinstance(columns, dict) else columns)
        assert len(columns[0]) > 8 and all(torch.isfinite(column).all() for column in columns)


# --- Errors of others ---


def test_an_error_at_the_first_step_leaves_no_run_directory(tmp_path, cli):
    with pytest.raises(ZeroDivisionError, match="the toy was not ready"):
        cli(*words(options("dqn_cartpole", env_id="toy_envs:Unready-v0", run_dir=tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_where_nobody_reads_its_output(tmp_path):
    command = [sys.executable, "dqn_cartpole.py", *words(options("dqn_cartpole", run_dir=tmp_path / "run"))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 0 and "Error" not in err, err
    assert (tmp_path / "run" / "result.json").exists()


@each_script
def test_a_loss_that_explodes_stops_the_run_at_its_step(name, tmp_path, cli, monkeypatch):
    status, out, err = cli(*words(options(name, learning_rate=1e18, run_dir=tmp_path / "run")), script=f"{name}.py")
    assert status == 1
    assert "is not finite at step" in err and "Traceback" not in out + err
    if (tmp_path / "run" / "last.pt").exists():
        kept = checkpoint_of(tmp_path / "run")
        assert all(torch.isfinite(value).all() for value in kept["network"].values())


# --- Nonsense on the command line ---

ANY = [
    ("unknown environment", ["--env-id", "NoSuchEnvironment-v1"], "--env-id NoSuchEnvironment-v1"),
    ("module that is not there", ["--env-id", "no_such_module:Env-v0"], "no_such_module"),
    ("negative steps", ["--total-timesteps", "-5"], "--total-timesteps -5"),
    ("no steps", ["--total-timesteps", "0"], "--total-timesteps 0"),
    ("steps that are no number", ["--total-timesteps", "many"], "many"),
    ("no environment", ["--num-envs", "0"], "--num-envs 0"),
    ("negative learning rate", ["--learning-rate", "-0.1"], "--learning-rate -0.1"),
    ("no learning rate", ["--learning-rate", "0"], "--learning-rate 0"),
    ("learning rate that is not a number", ["--learning-rate", "nan"], "--learning-rate nan"),
    ("infinite learning rate", ["--learning-rate", "inf"], "--learning-rate inf"),
    ("discount above 1", ["--gamma", "1.5"], "--gamma 1.5"),
    ("negative seed", ["--seed", "-1"], "--seed -1"),
    ("negative time limit", ["--time-limit", "-2"], "--time-limit -2"),
    ("no time", ["--time-limit", "0"], "--time-limit 0"),
    ("no evaluation episodes", ["--eval-episodes", "0"], "--eval-episodes 0"),
    ("evaluations without end", ["--eval-every", "0"], "--eval-every 0"),
    ("checkpoints without end", ["--checkpoint-every", "0"], "--checkpoint-every 0"),
    ("return that is not a number", ["--target-return", "nan"], "--target-return nan"),
    ("no such GPU", ["--device", "cuda:9"], "--device cuda:9"),
    ("no such device", ["--device", "gpu"], "--device gpu"),
    ("no such kind of VecEnv", ["--vec-env", "threads"], "--vec-env"),
    ("missing tracker", ["--track", "wandb"], "--track wandb: first: pip install wandb"),
    ("missing tracker too", ["--track", "swanlab"], "--track swanlab: first: pip install swanlab"),
    ("existing run directory", ["--run-dir", "."], "--run-dir ."),
    ("directory name that no disk takes", ["--run-dir", "x" * 300], "File name too long"),
    ("number beyond 64 bits", ["--total-timesteps", "1" + "0" * 400], "below 2^63"),
    ("path in place of a module", ["--env-id", "./corridor:Corridor-v0"], "--env-id ./corridor:Corridor-v0"),
    ("unknown flag", ["--learning-rat", "0.1"], "--learning-rate"),
    ("word without a flag", ["something"], "something"),
    ("no such run", ["--resume", "nowhere"], "nowhere"),
    ("no run", ["--resume", ""], "--resume needs a run directory"),
    ("no checkpoint", ["--play", ""], "--play a checkpoint"),
    ("no such checkpoint", ["--play", "nowhere.pt"], "nowhere.pt"),
]  # fmt: skip
ANY_VECTOR = [
    ("near match", ["--env-id", "CartPol-v1"], "Did you mean: `CartPole`"),
    ("continuous actions", ["--env-id", "Pendulum-v1"], "Discrete"),
    ("image observations", ["--env-id", "toy_envs:Image-v0"], "1-D Box"),
    ("environment without a window", ["--env-id", "toy_envs:Constant-v0", "--render"], "--render"),
    ("environment without pictures", ["--env-id", "toy_envs:Constant-v0", "--video"], "--video"),
    ("network that fits no memory", ["--hidden-size", "10000000"], "memory"),
]  # fmt: skip
ANY_DQN = [
    ("batch above memory", ["--batch-size", "64", "--buffer-size", "32"], "--batch-size 64"),
    ("empty batch", ["--batch-size", "0"], "--batch-size 0"),
    ("learning never starts", ["--learning-starts", "900", "--total-timesteps", "500"], "--learning-starts 900"),
    ("learning from nothing", ["--learning-starts", "1"], "--learning-starts 1"),
    ("no training", ["--train-frequency", "0"], "--train-frequency 0"),
    ("target that stands", ["--tau", "0"], "--tau 0"),
    ("target beyond", ["--tau", "1.5"], "--tau 1.5"),
    ("probability above 1", ["--epsilon-start", "2"], "--epsilon-start 2"),
    ("no exploration", ["--exploration-steps", "0"], "--exploration-steps 0"),
    ("no such loss", ["--loss", "mae"], "--loss"),
    ("negative clipping", ["--max-grad-norm", "-1"], "--max-grad-norm -1"),
    ("memory above memory", ["--buffer-size", "100000000000000"], "100000000000000"),
]  # fmt: skip
ONLY = {
    "dqn_cartpole": [
        ("environment that draws nothing", ["--env-id", "toy_envs:Blank-v0", "--video"], "draws no pictures"),
    ],
    "dqn_atari": [
        ("not an Atari game", ["--env-id", "CartPole-v1"], "--env-id CartPole-v1"),
        ("no such precision", ["--precision", "float16"], "--precision"),
        ("no such optimizer", ["--optimizer", "sgd"], "--optimizer"),
        ("evaluation above 1", ["--eval-epsilon", "2"], "--eval-epsilon 2"),
        ("negative alpha", ["--rmsprop-alpha", "-1"], "--rmsprop-alpha -1"),
        ("mean that grows", ["--rmsprop-alpha", "1.5"], "--rmsprop-alpha 1.5"),
    ],
    "dqn_lstm_cartpole": [
        ("velocities of another environment", ["--env-id", "Acrobot-v1"], "only CartPole has velocities to hide"),
        ("empty sequence", ["--sequence-length", "0"], "--sequence-length 0"),
        ("negative burn-in", ["--burn-in", "-1"], "--burn-in -1"),
        ("burn-in longer than the sequence", ["--burn-in", "9", "--sequence-length", "8"], "--burn-in 9"),
        ("target of no step", ["--n-step", "0"], "--n-step 0"),
        ("no layer", ["--num-layers", "0"], "--num-layers 0"),
        ("negative decay", ["--weight-decay", "-1"], "--weight-decay -1"),
        ("no such memory", ["--memory", "gru"], "--memory"),
        ("nothing that can be hidden", ["--hide", "pole"], "--hide"),
    ],
    "ppo_cartpole": [
        ("minibatches that do not divide", ["--num-minibatches", "7"], "--num-minibatches 7"),
        ("no steps in a rollout", ["--num-steps", "0"], "--num-steps 0"),
        ("no epochs", ["--update-epochs", "0"], "--update-epochs 0"),
        ("lambda above 1", ["--gae-lambda", "1.1"], "--gae-lambda 1.1"),
        ("no clipping", ["--clip-coef", "0"], "--clip-coef 0"),
        ("negative KL", ["--target-kl", "-0.1"], "--target-kl -0.1"),
        ("negative entropy", ["--entropy-coef", "-0.1"], "--entropy-coef -0.1"),
    ],
}
NONSENSE = [
    pytest.param(name, arguments, message, id=f"{name}: {what}")
    for name in NAMES
    for what, arguments, message in [
        *ANY,
        *(ANY_VECTOR if name != "dqn_atari" else []),
        *(ANY_DQN if name.startswith("dqn") else []),
        *ONLY.get(name, []),
    ]
]


@pytest.mark.parametrize("name, arguments, message", NONSENSE)
def test_nonsense_is_refused_before_anything_is_written(name, arguments, message, cli, tmp_path, monkeypatch):
    if "wandb" in arguments or "swanlab" in arguments:  # as if it were not installed
        find_spec = importlib.util.find_spec
        missing = lambda package, *rest: None if package in arguments else find_spec(package, *rest)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", missing)
    if "lstm" in name and "toy_envs:Constant-v0" in arguments:
        arguments = [*arguments, "--hide", "none"]
    if name == "dqn_vecenv" and arguments[0] in ("--hidden-size", "--buffer-size"):  # seen once the workers have begun
        arguments = [*arguments, "--num-envs", "2"]
    status, out, err = cli(*arguments, script=f"{name}.py")
    assert status == 2
    assert message in flat(err)
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


@each_script
def test_a_refusal_takes_seconds_and_leaves_no_process(name, tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / f"{name}.py", "--learning-rate", "-1"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    out, err = process.communicate(timeout=10)
    assert process.returncode == 2
    assert "--learning-rate -1" in err and "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []
    assert [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(tmp_path)] == []


def test_help_may_be_cut_off():
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does, once it has its lines
    command = [sys.executable, ROOT / "dqn_cartpole.py", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment(), timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_numeric_flag_refuses_what_is_below_its_range():
    """Whatever flag is added: -7 must be refused, by name, unless it is a return to reach."""
    for name in NAMES:
        module = load(ROOT / f"{name}.py")
        for field in dataclasses.fields(module.Args):
            if type(field.default) in (int, float) and field.name != "target_return":
                with pytest.raises(ValueError, match=f"--{field.name.replace('_', '-')} -7"):
                    module.Args(**{field.name: type(field.default)(-7)})
