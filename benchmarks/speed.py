"""Time our scripts and their peers at the same work: the same hyperparameters and epsilon, as many gradient steps.

    python benchmarks/speed.py --cleanrl DIR --cleanrl-python EXE     # nothing else should run
    python benchmarks/speed.py --tasks ppo_cartpole --rounds 1

Each round runs every contestant of a task once, in turn, in a process of its own, and times it between two step counts:
start-up and the steps before the first gradient step are left out. Peers: Stable-Baselines3's algorithms, and
CleanRL's scripts from a checkout (--cleanrl) with an interpreter that can run them (--cleanrl-python: gymnasium 0.29.1,
numpy 1, ale-py 0.8.1, and shimmy 1.3, without which it knows no Atari ids). Then one run of ours tells where its time
goes, and two more the floor: the environments alone (random actions), and all but the environments (their answers come
at once).

Writes benchmarks/results/speed/: speed.csv, every run; command.json. Prints the table of docs/performance.md.
"""

import csv
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import record
import tyro

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "speed"
OURS = "--epsilon-start 0.05 --epsilon-end 0.05"  # for all: the peers have no forward pass for a random action
SB3 = {"algorithm": "DQN", "exploration_initial_eps": 0.05, "exploration_final_eps": 0.05}
CLEANRL = "--start-e 0.05 --end-e 0.05"
ATARI = (
    f"--env-id BreakoutNoFrameskip-v4 {OURS} --buffer-size 20000 --learning-starts 2000 --n-step 1 --train-frequency 4 "
    "--target-frequency 1000 --learning-rate 1e-4 --learning-rate-end 1e-4"
)
CLEANRL_PPO = (
    "--num-envs 4 --num-steps 128 --update-epochs 4 --num-minibatches 4 --gamma 0.99 --gae-lambda 0.95 "
    "--learning-rate 2.5e-4 --entropy-coef 0.01 --value-coef 0.5 --no-anneal-clip"
)
VECENV = (
    f"dqn_vecenv.py {OURS} --num-envs 4 --train-frequency 16 --target-frequency 10000 --tau 1 --batch-size 32 "
    "--buffer-size 1000000 --learning-starts 100 --learning-rate 1e-4 --loss huber --hidden-size 64"  # as SB3's policy
)
EXAMPLE = ATARI.replace("20000", "10000").replace("frequency 4 ", "frequency 16 ") + " --num-envs 4"


@dataclass
class Task:
    """The same work for every contestant, timed from transition `first` to transition `last`."""

    what: str
    first: int
    last: int
    ours: dict  # column of the table: the script and its flags
    sb3: dict | None = None  # arguments of time_sb3
    cleanrl: str = ""  # CleanRL's script and its flags


TASKS = {
    "dqn_cartpole": Task(
        "DQN CartPole, batch 128, one update per 10 transitions",
        20_000,
        60_000,
        # Two layers of 100 have as many weights as CleanRL's of 120 and 84.
        {"float32": f"dqn_cartpole.py {OURS} --train-frequency 10 --target-frequency 500 --tau 1 --batch-size 128 "
         "--buffer-size 10000 --learning-starts 10000 --hidden-size 100 --learning-rate 2.5e-4"},
        {**SB3, "env_id": "CartPole-v1", "train_freq": 10, "batch_size": 128, "buffer_size": 10_000,
         "learning_starts": 10_000, "target_update_interval": 500, "learning_rate": 2.5e-4,
         "policy_kwargs": {"net_arch": [100, 100]}},
        f"cleanrl/dqn.py {CLEANRL} --total-timesteps 100000",
    ),
    "dqn_vecenv": Task(
        "DQN CartPole, 4 environments in SubprocVecEnv, batch 32, one update per 16 transitions",
        10_000,
        50_000,
        {"float32": VECENV, "float32, --vec-env dummy": f"{VECENV} --vec-env dummy"},
        {**SB3, "env_id": "CartPole-v1", "n_envs": 4, "vec_env": "subproc"},
    ),
    "ppo_cartpole": Task(
        "PPO CartPole, 4 environments x 128 steps, 4 epochs x 4 minibatches",
        10_240,
        51_200,
        {"float32": f"ppo_cartpole.py {CLEANRL_PPO}"},
        {"algorithm": "PPO", "env_id": "CartPole-v1", "n_envs": 4, "n_steps": 128, "batch_size": 128, "n_epochs": 4,
         "learning_rate": 2.5e-4, "ent_coef": 0.01, "vf_coef": 0.5},
        "cleanrl/ppo.py --total-timesteps 500000 --no-clip-vloss",
    ),
    "dqn_atari_4": Task(
        "DQN Breakout, batch 32, one update per 4 transitions",
        10_000,  # after 2,000 gradient steps
        14_000,
        {p: f"dqn_atari.py {ATARI} --precision {p}" for p in ("float32", "bfloat16")},
        {**SB3, "env_id": "BreakoutNoFrameskip-v4", "train_freq": 4, "batch_size": 32,
         "buffer_size": 20_000, "learning_starts": 2_000, "target_update_interval": 1_000, "learning_rate": 1e-4},
        f"cleanrl/dqn_atari.py {CLEANRL} --total-timesteps 100000 --buffer-size 20000 --learning-starts 2000 "
        "--env-id BreakoutNoFrameskip-v4",
    ),
    "dqn_atari_16": Task(
        "DQN Breakout, 4 environments, batch 32, one update per 16 transitions",
        2_400,
        10_400,
        {p: f"dqn_atari.py {EXAMPLE} --precision {p}" for p in ("float32", "bfloat16")},
        {**SB3, "env_id": "BreakoutNoFrameskip-v4", "n_envs": 4, "vec_env": "subproc", "train_freq": 4,
         "batch_size": 32, "buffer_size": 10_000, "learning_starts": 2_000, "target_update_interval": 1_000,
         "learning_rate": 1e-4},
    ),
}  # fmt: skip


@dataclass
class Args:
    tasks: list[str] = field(default_factory=lambda: list(TASKS))  # what to time
    rounds: int = 5  # runs of every contestant
    cleanrl: str = ""  # a checkout of CleanRL
    cleanrl_python: str = ""  # an interpreter that can run it
    job: str = ""  # used by this script for the processes that it starts


# --- In a process of its own: one contestant ---


class Watch:
    """Seconds between two step counts, and seconds inside the functions that `around` wraps meanwhile."""

    def __init__(self, first: int, last: int):
        self.first, self.last, self.begin, self.inside = first, last, None, {}

    def around(self, owner, name: str, label: str):
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            before = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside[label] = self.inside.get(label, 0.0) + time.perf_counter() - before

        setattr(owner, name, timed)

    def at(self, step: int):
        """Note that this many transitions are done; at the last one print the result and end the process."""
        if self.begin is None and step >= self.first:
            self.begin = (step, time.perf_counter())
            self.inside.clear()
        elif step >= self.last:
            result = {"seconds": time.perf_counter() - self.begin[1], "steps": step - self.begin[0]}
            print("RESULT", json.dumps({**result, "inside": self.inside}), flush=True)
            for child in __import__("multiprocessing").active_children():
                child.terminate()
            os._exit(0)


def time_ours(script: str, flags: list[str], first: int, last: int, mode: str):
    """Time one of our scripts. mode: plain, inside (where the time goes), envs or updates (the floor)."""
    sys.path.insert(0, str(ROOT))
    module, watch = importlib.import_module(Path(script).stem), Watch(first, last)
    with tempfile.TemporaryDirectory() as folder:
        never = ["--eval-every", "1000000000", "--checkpoint-every", "1000000000"]
        quiet = ["--run-dir", f"{folder}/run", *never, "--total-timesteps", str(last + 100_000)]
        args = tyro.cli(module.Args, args=[*flags, *quiet])
        if mode == "envs":
            step, envs = 0, module.make_envs(args)
            envs.seed(0)
            envs.reset()
            while True:
                envs.step_async([int(envs.action_space.sample()) for _ in range(args.num_envs)])
                envs.step_wait()
                step += args.num_envs
                watch.at(step)
        if mode == "updates":
            make_envs = module.make_envs

            def instant_envs(args):
                """The environments, which answer every step at once with what they answered first."""
                envs = make_envs(args)
                envs.seed(0)
                obs, zeros = envs.reset(), [0.0] * args.num_envs
                numpy = module.np
                answer = (obs, numpy.array(zeros, numpy.float32), numpy.zeros(args.num_envs, bool))
                infos = [{"TimeLimit.truncated": False} for _ in range(args.num_envs)]
                envs.reset = lambda: obs
                envs.step_async = lambda actions: None
                envs.step_wait = lambda: (*answer, infos)
                envs.step = lambda actions: (*answer, infos)
                return envs

            module.make_envs = instant_envs
        if mode == "inside":
            for vec_env in (module.DummyVecEnv, module.SubprocVecEnv):
                watch.around(vec_env, "step_async", "send")
                watch.around(vec_env, "step_wait", "wait for the environments")
            if hasattr(module, "ReplayMemory"):
                watch.around(module.ReplayMemory, "sample", "sample")
                watch.around(module.ReplayMemory, "add", "store")
            watch.around(module.torch.Tensor, "backward", "backward")
            watch.around(module.torch.optim.Adam, "step", "optimiser")
        tick = module.Run.tick

        def ticked(run, **counts):
            tick(run, **counts)
            watch.at(counts["global_step"])

        module.Run.tick = ticked
        module.train(args)


def time_sb3(first: int, last: int, algorithm: str, env_id: str, n_envs=1, vec_env="dummy", **hyperparameters):
    """Time one of SB3's algorithms; on Atari with its own wrappers and frame stack, as its documentation has it."""
    import stable_baselines3 as sb3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack

    watch = Watch(first, last)

    class Counting(BaseCallback):
        def _on_step(self) -> bool:
            watch.at(self.num_timesteps)
            return True

    vec_env_class = SubprocVecEnv if vec_env == "subproc" else DummyVecEnv
    if "NoFrameskip" in env_id:
        policy, envs = (
            "CnnPolicy",
            VecFrameStack(make_atari_env(f"ale_py:{env_id}", n_envs, 0, vec_env_cls=vec_env_class), 4),
        )
    else:
        policy, envs = "MlpPolicy", make_vec_env(env_id, n_envs, 0, vec_env_cls=vec_env_class)
    if algorithm == "DQN":
        hyperparameters["max_grad_norm"] = 1e9  # ours does not clip; SB3 computes the norm in any case
    getattr(sb3, algorithm)(policy, envs, seed=0, device="cpu", **hyperparameters).learn(last + 100_000, Counting())


# --- Here: all of them in turn ---


def run(job: dict) -> dict:
    """Run a contestant in a process of its own; return its seconds, steps and seconds inside."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{job} failed:\n{done.stdout[-500:]}{done.stderr[-2000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def run_cleanrl(args: Args, task: Task) -> dict:
    """Run CleanRL's script in its own interpreter."""
    script, *flags = task.cleanrl.split()
    driver = str(ROOT / "benchmarks" / "time_cleanrl.py")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [args.cleanrl_python, driver, str(task.first), str(task.last), str(Path(args.cleanrl, script)), *flags],
            cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": args.cleanrl},
        )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("SECONDS ")]
    if not lines:
        raise SystemExit(f"{task.cleanrl} failed:\n{done.stderr[-2000:]}")
    _, seconds, _, steps = lines[0].split()
    return {"seconds": float(seconds), "steps": int(steps)}


def contestants(args: Args, task: Task):
    """Yield (name, function that runs it) for a task."""
    for column, command in task.ours.items():
        script, *flags = command.split()
        job = {"who": "ours", "script": script, "flags": flags, "first": task.first, "last": task.last}
        yield f"ours, {column}", lambda job=job: run({**job, "mode": "plain"})
    if task.sb3:
        job = {"who": "sb3", "first": task.first, "last": task.last, **task.sb3}
        yield "SB3", lambda: run(job)
    if task.cleanrl and args.cleanrl:
        yield "CleanRL", lambda: run_cleanrl(args, task)


def measure(args: Args):
    """Write every run of the tasks to speed.csv; runs of other tasks stay there."""
    path, about = OUT / "speed.csv", OUT / "command.json"
    earlier = json.loads(about.read_text()) if about.exists() else {"work": {}}  # remarks, and other tasks' work, stay
    contents = record.made_with("python benchmarks/speed.py", "ale-py")
    work = {name: {**asdict(TASKS[name]), "commit": contents["commit"]} for name in args.tasks}
    record.write(OUT, {**earlier, **contents, "work": {**earlier["work"], **work}})
    rows = [row for row in read(path) if row["task"] not in args.tasks] if path.exists() else []

    def keep(row: dict):
        """Add a run at once: an interrupted measurement keeps what it has."""
        rows.append(row)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ("task", "round", "who", "transitions_per_second"))
            writer.writeheader()
            writer.writerows(rows)

    for name in args.tasks:
        task = TASKS[name]
        for number in range(args.rounds):
            for who, start in contestants(args, task):
                result = start()
                rate = result["steps"] / result["seconds"]
                keep({"task": name, "round": number, "who": who, "transitions_per_second": f"{rate:.1f}"})
                print(f"{name:14s} round {number}  {who:16s} {rate:10,.0f}/s", flush=True)
        for column, command in task.ours.items():
            script, *flags = command.split()
            job = {"who": "ours", "script": script, "flags": flags, "first": task.first, "last": task.last}
            for mode in ("envs", "updates", "inside"):
                result = run({**job, "mode": mode})
                rate = result["steps"] / result["seconds"]
                names = {"envs": "environments alone", "updates": "all but the environments", "inside": "timed inside"}
                row = {"task": name, "round": 0, "who": f"{names[mode]}, {column}"}
                keep({**row, "transitions_per_second": f"{rate:.1f}"})
                print(f"{name:14s}          {names[mode]}, {column}: {rate:,.0f}/s", flush=True)
                for label, seconds in sorted(result["inside"].items(), key=lambda item: -item[1]):
                    print(f"                             {label}: {100 * seconds / result['seconds']:.0f} %")


def read(path: Path) -> list[dict]:
    with open(path) as file:
        return list(csv.DictReader(file))


def table() -> str:
    """Return a Markdown table of ratios, each the median over the rounds, with the lowest and the highest."""
    rates = {}
    for row in read(OUT / "speed.csv"):
        rates.setdefault((row["task"], row["who"]), []).append(float(row["transitions_per_second"]))
    lines = ["| work | peer | peer, transitions/s | ours, transitions/s | ratio (lowest to highest round) |"]
    lines.append("|---|---|---:|---:|---:|")
    for name, task in TASKS.items():
        for peer in ("SB3", "CleanRL"):
            for column in task.ours:
                ours, theirs = rates.get((name, f"ours, {column}")), rates.get((name, peer))
                if ours and theirs:
                    ratios = [a / b for a, b in zip(ours, theirs, strict=False)]  # of the rounds that both have
                    lines.append(
                        f"| {task.what} | {peer} | {statistics.median(theirs):,.0f} "
                        f"| {statistics.median(ours):,.0f} ({column}) "
                        f"| **{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) |"
                    )
    return "\n".join(lines)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.job:
        job = json.loads(args.job)
        {"ours": time_ours, "sb3": time_sb3}[job.pop("who")](**job)
        raise SystemExit("the run ended before its last step was reached")
    unknown = set(args.tasks) - TASKS.keys()
    if unknown or bool(args.cleanrl) != bool(args.cleanrl_python):
        print(
            f"--tasks: one or more of {', '.join(TASKS)}; --cleanrl and --cleanrl-python go together", file=sys.stderr
        )
        raise SystemExit(2)
    measure(args)
    print(table())
