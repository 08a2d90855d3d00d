"""The classic mistakes of deep RL, each as a small patch of one of our scripts: what it costs, and which test sees it.

    python benchmarks/bugs.py                      # the list; - is the mistake, + the script
    python benchmarks/bugs.py --seeds 1 2 3        # train the scripts as they are, and with each mistake
    python benchmarks/bugs.py --tests              # put every mistake before its test, which must fail
    python benchmarks/bugs.py --table              # the table of docs/mistakes.md
    python benchmarks/bugs.py --pictures           # its curves: docs/mistake_NAME.png

A mistake is a text of a script, which must occur there exactly once, and what stands in its place; it is applied in
memory. Hardly one of these raises an error, and some still learn: that is why they live long.

Writes benchmarks/results/bugs/: bugs.csv, a row per mistake and seed (no name: the script as it is); curves.csv, the
curves of these runs; command.json. What has its row is not run again.
"""

import contextlib
import csv
import io
import shlex
import sys
import tempfile
import time
import types
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import matplotlib
import pytest
import record
import torch
import tyro
from plot import curve

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "bugs"


@dataclass
class Bug:
    name: str
    script: str
    test: str  # that fails because of it: file under tests/ and what follows in a node id
    what: str  # the mistake, as the table puts it
    old: str
    new: str
    run: str | None = ""  # flags of the run that shows it, and of the same run without it; None: none is short enough
    shows: str = "return"  # what is looked at after that run: the greedy return, or the value of a first state


DQN, VECENV, ATARI, RECURRENT, PPO = (
    f"{name}.py" for name in ("dqn_cartpole", "dqn_vecenv", "dqn_atari", "dqn_lstm_cartpole", "ppo_cartpole")
)
# Reward 1 for ever, in episodes of 5 steps that only the clock ends: the value of its only state is 1 / (1 - 0.9) = 10.
CONSTANT = "--env-id toy_envs:Constant-v0 --gamma 0.9 --total-timesteps 30000"
# A reward of -1 for each of the steps to the end of a corridor, in episodes of 5 steps.
CORRIDOR = "--env-id corridor:Corridor-v0 --time-limit 5 --total-timesteps 30000"

BUGS = [
    # --- DQN ---
    Bug("broadcast", DQN, "test_dqn.py::test_squared_td_errors_by_hand[dqn_cartpole]",
        "Q(s, a) of shape (B, 1), targets of shape (B,): each Q-value is compared with every target",
        "assert q_taken.shape == td_target.shape", "q_taken = q_taken.unsqueeze(1)"),
    Bug("no-terminal-mask", DQN, "test_dqn.py::test_td_target_of_one_transition[dqn_cartpole-terminated]",
        "bootstrap where the episode terminated: falling costs nothing",
        "gamma * (1.0 - batch.terminated) * next_q_max", "gamma * next_q_max"),
    Bug("truncation-is-death", DQN, "test_dqn.py::test_memory_holds_exactly_what_happened[3-Mixed-v0]",
        "no bootstrap where time ran out, as in loops written for Gym's single `done`",
        "terminated = dones & ~truncated", "terminated = dones"),
    Bug("truncation-is-death-value", DQN, "test_dqn.py::test_truncation_does_not_end_the_value",
        "the same, where only a time limit ends episodes",
        "terminated = dones & ~truncated", "terminated = dones", CONSTANT, "value"),
    Bug("reset-obs-as-next", DQN, "test_dqn.py::test_memory_holds_exactly_what_happened[3-Truncated-v0]",
        "the first observation of the next episode is stored as `next_obs`; here in a corridor with a time limit",
        'next_obs[i] = infos[i]["terminal_observation"]', "pass", CORRIDOR, "value"),
    Bug("target-never-synced", DQN, "test_dqn.py::test_counts_do_not_depend_on_the_number_of_environments[4-10-3]",
        "the target network stays as it was initialised",
        "update_target(target_parameters, parameters, args.tau)", "pass"),
    Bug("target-is-an-alias", DQN, "test_dqn.py::test_targets_come_from_a_network_that_stays_behind",
        "the target network is a second name for the network, not a copy",
        "target_network = copy.deepcopy(q_network)", "target_network = q_network"),
    Bug("gradient-into-target", DQN, "test_dqn.py::test_targets_come_from_a_network_that_stays_behind",
        "no target network and no `no_grad`: the gradient moves the target as well",
        "with torch.no_grad():\n                next_q_values = target_network(",
        "if True:\n                next_q_values = q_network("),
    Bug("gradients-add-up", DQN, "test_dqn.py::test_a_gradient_step_follows_the_gradient_of_its_own_batch",
        "no `zero_grad`: each step follows the sum of all gradients so far",
        "optimizer.zero_grad()", "pass"),
    Bug("samples-the-unfilled", DQN, "test_dqn.py::test_memory_holds_the_last_transitions_like_a_deque[3]",
        "minibatches from the whole memory before it is full: transitions made of zeros",
        "torch.randint(min(self.added, self.capacity), ", "torch.randint(self.capacity, "),
    Bug("epsilon-stays", DQN, "test_dqn.py::test_epsilon_follows_its_schedule_in_transitions",
        "epsilon never falls: all actions of the training are random",
        "args.exploration_steps, global_step)", "args.exploration_steps, 0)"),
    # --- Several environments ---
    Bug("modulo-cadence", DQN, "test_dqn.py::test_counts_do_not_depend_on_the_number_of_environments[4-10-3]",
        "`global_step % 5 == 0` with 16 environments: a gradient step per 80 transitions, not per 5",
        "while gradient_steps < (global_step - learning_starts) // args.train_frequency:",
        "if global_step > args.learning_starts and global_step % args.train_frequency == 0:",
        "--num-envs 16 --train-frequency 5"),
    Bug("step-per-iteration", VECENV, "test_vecenv.py::test_gradient_steps_are_counted_in_transitions[8]",
        "a gradient step per pass of the loop with 64 environments: one per 64 transitions, not per 4",
        "while gradient_steps < (global_step - learning_starts) // args.train_frequency:",
        "if global_step > args.learning_starts:", "--num-envs 64"),
    Bug("one-epsilon-draw", VECENV, "test_vecenv.py::test_exploration_is_drawn_for_each_environment",
        "one draw of epsilon for all environments: all act at random, or all greedily",
        "torch.rand(args.num_envs) < epsilon", "torch.rand(1) < epsilon"),
    Bug("acts-on-the-dead", VECENV, "test_vecenv.py::test_memory_holds_exactly_what_happened[dummy-Mixed-v0]",
        "the last observation of an ended episode overwrites the one that the next action is chosen from",
        "next_obs = obs.copy()", "next_obs = obs"),
    Bug("late-reset", VECENV, "test_vecenv.py::test_memory_holds_exactly_what_happened[envpool-Mixed-v0]",
        "EnvPool and Gymnasium 1 reset in the step after the end: the memory stores a step that never happened",
        'first_obs, info = self.pool.reset(ended.astype(np.int32))  # it reads 32 bits, and does not convert\n'
        '            obs[info["env_id"]] = first_obs', "pass", None),
    # --- Atari ---
    Bug("scaled-twice", ATARI, "test_atari_memory.py::test_types_and_shapes",
        "pixels divided by 255 twice: in the memory, and again in the network",
        "transpose(0, 3, 1, 2)  # a view", "transpose(0, 3, 1, 2) / np.float32(255)", None),
    Bug("stack-not-cleared", ATARI, "test_atari_memory.py::test_equals_a_memory_of_whole_stacks[0.6-1-7]",
        "a new episode begins with the old one's frames in the stack that the agent sees",
        "stacks[ended] = 0", "pass", None),
    Bug("stack-crosses-episodes", ATARI, "test_atari_memory.py::test_equals_a_memory_of_whole_stacks[0.6-1-7]",
        "the memory stores single frames, and builds stacks across the start of an episode",
        "frames[2::-1][before] = 0", "pass", None),
    Bug("next-slot-is-next-obs", ATARI,
        "test_atari_memory.py::test_next_obs_of_an_ended_episode_is_its_last_observation",
        "`next_obs` is read from the next slot of the memory: after an end, the first frame of the next episode",
        "self._write(np.arange(self.num_envs), next_frames, starts=False)",
        "self._write(np.arange(self.num_envs), frames, starts=False)", None),
    Bug("reset-frame-as-next", ATARI, "test_atari_memory.py::test_training_stores_the_last_frame_of_an_episode_too",
        "the same, because the loop does not read the info",
        'next_frames[i] = infos[i]["terminal_observation"]', "pass", None),
    Bug("nobody-presses-fire", ATARI, "test_atari_env.py::test_each_life_of_an_evaluation_begins_with_fire",
        "FIRE, which launches the ball, is pressed for the agent in training, but not after a lost life in evaluation",
        "while not self.training and 0 < self.lives < lives:", "while False:", None),
    Bug("life-resets-the-game", ATARI,
        "test_atari_env.py::test_a_lost_life_does_not_reset_the_game_but_a_seed_does",
        "a lost life restarts the game: its later stages are never seen; so does Gymnasium's AtariPreprocessing "
        "([issue 166](https://github.com/Farama-Foundation/Gymnasium/issues/166))",
        "if self.training and not self.game_over:", "if False:", None),
    Bug("clipped-scores", ATARI, "test_atari_env.py::test_evaluation_plays_whole_games_for_the_raw_score",
        "evaluation in the training environment: a life counts as a game, the sign of a reward as its score",
        "AtariGame(env, not evaluation, clip)", "AtariGame(env, True, args.clip_rewards)", None),
    Bug("stale-last-frame", ATARI, "test_atari_env.py::test_equals_sb3_when_time_runs_out[Breakout-True]",
        "a game ends within four frames, and the maximum takes in an old screen; so do Stable-Baselines3's wrappers",
        "if frame < 3:", "if False:", None),
    Bug("flicker", ATARI, "test_atari_env.py::test_equals_sb3_over_whole_games[MsPacman]",
        "only the last of four frames is used: sprites drawn on alternate frames are missing",
        "np.maximum(self.screens[0], self.screens[1], out=self.screens[0])",
        "self.screens[0] = self.screens[1]", None),
    # --- LSTM ---
    Bug("state-not-reset", RECURRENT,
        "test_dqn_lstm.py::test_each_environment_has_its_own_state_that_begins_with_the_episode",
        "the hidden state is carried into the next episode",
        "        state[dones] = 0.0  # a new", "        pass  # a new"),
    Bug("state-one-step-late", RECURRENT,
        "test_dqn_lstm.py::test_both_networks_know_the_episode_up_to_the_step_that_they_judge[2]",
        "the hidden state after an observation is stored as the one before it",
        "steps, state.cpu())", "steps, next_state.cpu())"),
    Bug("target-of-next-obs", RECURRENT,
        "test_dqn_lstm.py::test_both_networks_know_the_episode_up_to_the_step_that_they_judge[2]",
        "the target network reads `next_obs` alone, from a zero state: it does not know what led there",
        "next_q_values = unroll(target_network, batch, args.burn_in)[1:]",
        "next_q_values = target_network(batch.obs[args.burn_in + 1 :], 0 * batch.state)[0]"),
    Bug("sequences-cross-resets", RECURRENT,
        "test_dqn_lstm.py::test_a_sequence_is_a_stretch_of_one_episode[0.15-60-150-4-0]",
        "sequences run across the ends of episodes",
        "loss_mask = (steps == steps[0] + t) & (", "loss_mask = ("),
    Bug("gradient-in-burn-in", RECURRENT, "test_dqn_lstm.py::test_no_gradient_from_burn_in_and_padding",
        "gradients flow through the burn-in",
        "with torch.no_grad():\n            _, after =", "if True:\n            _, after ="),
    # --- PPO ---
    Bug("gae-crosses-episodes", PPO, "test_ppo.py::test_gae_equals_the_sums_of_its_definition[0.9-0.8-0.2]",
        "GAE (the advantages) without the mask: an episode earns what the next one does",
        "goes_on = 1.0 - ended", "goes_on = np.ones_like(rewards)"),
    Bug("timeout-is-death", PPO, "test_ppo.py::test_a_timeout_adds_the_value_of_the_observation_that_it_cut_off",
        "no value is added where time ran out; so does CleanRL "
        "([issue 198](https://github.com/vwxyzjn/cleanrl/issues/198))",
        'np.flatnonzero([info["TimeLimit.truncated"] for info in infos])', "[]"),
    Bug("timeout-is-death-value", PPO, "test_ppo.py::test_truncation_does_not_end_the_value",
        "the same, where only a time limit ends episodes",
        'np.flatnonzero([info["TimeLimit.truncated"] for info in infos])', "[]", CONSTANT, "value"),
    Bug("entropy-sign", PPO, "test_ppo.py::test_the_entropy_bonus_raises_entropy",
        "the entropy bonus with the wrong sign: certainty is rewarded (`--entropy-coef 0.01`)",
        "- args.entropy_coef * entropy.mean()", "+ args.entropy_coef * entropy.mean()", "--entropy-coef 0.01"),
    Bug("ratio-always-1", PPO, "test_ppo.py::test_the_ratio_is_one_in_the_first_minibatch_of_a_rollout",
        "old log-probabilities recomputed in every minibatch: the ratio is 1, and nothing is clipped",
        "ppo_loss(log_probs, mb_old_log_probs, ", "ppo_loss(log_probs, log_probs.detach(), "),
    Bug("ratio-attached", PPO, "test_ppo.py::test_the_ratio_is_one_in_the_first_minibatch_of_a_rollout",
        "the same without `detach`: the policy's gradient is 0",
        "ppo_loss(log_probs, mb_old_log_probs, ", "ppo_loss(log_probs, log_probs, "),
    Bug("columns-shuffled-apart", PPO, "test_ppo.py::test_all_columns_of_a_minibatch_are_of_the_same_transitions",
        "each column of the batch is shuffled in its own order: advantages meet other actions",
        "(column[indices] for column", "(column[torch.randperm(len(column))[: len(indices)]] for column"),
    Bug("axes-swapped", PPO, "test_ppo.py::test_all_columns_of_a_minibatch_are_of_the_same_transitions",
        "observations flattened as (N, T), everything else as (T, N): all shapes fit",
        "columns = rollout.obs[:-1], ", "columns = rollout.obs[:-1].swapaxes(0, 1).copy(), "),
    Bug("not-shuffled", PPO, "test_ppo.py::test_every_sample_is_seen_once_per_epoch_and_its_columns_stay_together",
        "minibatches in the order of time, not shuffled",
        "torch.randperm(len(obs))", "torch.arange(len(obs))"),
    Bug("learning-rate-rises", PPO, "test_ppo.py::test_learning_rate_and_clip_fall_in_a_straight_line[True]",
        "the learning rate rises from 0 to its full size, and does not fall",
        "learning_rate = args.learning_rate * remaining", "learning_rate = args.learning_rate * (1.0 - remaining)"),
]  # fmt: skip

# The curves that docs/mistakes.md shows: of which mistake, and which metrics.
PICTURES = {
    "broadcast": [("broadcast", "return_mean_100"), ("broadcast", "q_taken")],
    "no_terminal_mask": [("no-terminal-mask", "return_mean_100"), ("no-terminal-mask", "q_taken")],
    "truncation": [("truncation-is-death", "return_mean_100"), ("truncation-is-death-value", "q_taken")],
    "reset_obs": [("reset-obs-as-next", "q_taken"), ("reset-obs-as-next", "loss")],
    "modulo": [("modulo-cadence", "return_mean_100"), ("modulo-cadence", "q_taken")],
    "ratio": [("ratio-always-1", "return_mean_100"), ("ratio-always-1", "clip_fraction")],
}
TITLES = {
    "return_mean_100": "return of the last 100 training episodes",
    "q_taken": "mean Q of a minibatch",
    "loss": "loss",
    "clip_fraction": "clip_fraction",
}


def patched(bug: Bug) -> str:
    """Return the script's text with the mistake; raise ValueError where the script has changed."""
    text = (ROOT / bug.script).read_text()
    if text.count(bug.old) != 1:
        raise ValueError(f"{bug.name} no longer fits: {bug.script} has {text.count(bug.old)} times\n{bug.old}")
    return text.replace(bug.old, bug.new)


def load(script: str, text: str) -> types.ModuleType:
    """Make this text the module of that name, in place of the file."""
    module = types.ModuleType(Path(script).stem)
    module.__file__ = str(ROOT / script)
    sys.modules[module.__name__] = module
    exec(compile(text, module.__file__, "exec"), vars(module))
    return module


# --- What a mistake costs ---


def flags_of(bug: Bug) -> str:
    return " ".join(["--vec-env dummy"] * (bug.script == VECENV) + [bug.run]).strip()


def train(bug: Bug, text: str, seed: int) -> tuple[float, dict]:
    """Train this text of bug.script; return what bug.shows, and the curves: {metric: (steps, values)}.

    That is the greedy return of the last network, or its value of a first state.
    """
    module = load(bug.script, text)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        flags = f"--seed {seed} --run-dir {folder}/run --eval-every 1000000000 --final-eval-episodes 50 {flags_of(bug)}"
        args = tyro.cli(module.Args, args=shlex.split(flags))
        try:
            result = module.train(args)
        except SystemExit:
            return float("nan"), {}
        progress = Path(folder, "run", "progress.csv")
        curves = {m: points for m in TITLES if (points := curve(progress, f"train/{m}")).size}
        if bug.shows == "return":
            return result["final_return_mean"], curves
        env = module.make_env(args)
        network = module.ActorCritic if bug.script == PPO else module.QNetwork
        network = network(env.observation_space, env.action_space, args)
        network.load_state_dict(module.load_checkpoint(Path(folder, "run", "last.pt"))["network"])
        obs = torch.from_numpy(env.reset(seed=11)[0]).unsqueeze(0)  # of the corridor: 8 steps from its end
        return (network.value(obs) if bug.script == PPO else network(obs)).max().item(), curves


def known_rows(name: str = "bugs.csv") -> list[dict]:
    if not (OUT / name).exists():
        return []
    with open(OUT / name) as file:
        return list(csv.DictReader(file))


def append(name: str, rows: list[dict]):
    new = not (OUT / name).exists()
    with open(OUT / name, "a", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def run_seeds(bugs: list[Bug], seeds: list[int]):
    """Train each script with each mistake and without, on each seed; append what is missing to bugs.csv."""
    recorded = 0
    for seed, bug, broken in ((seed, bug, broken) for bug in bugs for seed in seeds for broken in (False, True)):
        row = key_of(bug, broken) | {"seed": str(seed)}
        if any(row.items() <= known.items() for known in known_rows()):
            recorded += 1
            continue
        record.write(OUT, record.made_with("python benchmarks/bugs.py --seeds N"))
        started = time.process_time()
        result, curves = train(bug, patched(bug) if broken else (ROOT / bug.script).read_text(), seed)
        seconds = time.process_time() - started
        for metric, points in curves.items():
            points = points.T[:: max(1, len(points.T) // 50)]
            append("curves.csv", [row | {"metric": metric, "step": f"{x:.0f}", "value": f"{y:.4g}"} for x, y in points])
        row |= {"result": f"{result:.2f}", "cpu_seconds": f"{seconds:.1f}"}
        append("bugs.csv", [row])
        print(", ".join(row.values()), flush=True)
    print(f"{recorded} runs were recorded already; to run them again, move {OUT} away")


def key_of(bug: Bug, broken: bool) -> dict[str, str]:
    """Return what the rows of its runs, or of the same runs without it, have in common."""
    return {"bug": bug.name if broken else "", "script": bug.script, "flags": flags_of(bug), "shows": bug.shows}


def results(bug: Bug, broken: bool) -> dict[str, float]:
    """Return what bugs.csv holds of these runs: {seed: result}."""
    return {row["seed"]: float(row["result"]) for row in known_rows() if key_of(bug, broken).items() <= row.items()}


def cells(bug: Bug) -> list[str]:
    """Return the mean (and lowest) greedy return, or the mean value V, with the mistake and without it."""
    if bug.run is None:
        return ["—", "—"]
    both = [results(bug, broken).values() for broken in (True, False)]
    form = "V = {:.1f}" if bug.shows == "value" else "{:.1f} ({:.1f})"
    return [form.format(mean(values), min(values)) if values else "not run yet" for values in both]


def table() -> str:
    """Return the table of docs/mistakes.md, of the seeds in bugs.csv; a test's name shows where the mouse rests."""
    lines = ["| script | mistake | with it | without | test |", "|---|---|---:|---:|---|"]
    for bug in BUGS:
        file, _, name = bug.test.partition("::")
        link = f'[`{Path(file).stem}`](../tests/{file} "{name.partition("[")[0]}")'
        lines.append("| " + " | ".join([f"`{bug.script}`", bug.what, *cells(bug), link]) + " |")
    return "\n".join(lines)


def draw(name: str, folder: Path):
    """Write mistake_NAME.png: each seed with the mistake, and without it."""
    figure, axes = plt.subplots(1, len(PICTURES[name]), figsize=(7.2, 2.4), dpi=150)
    for axis, (bug_name, metric) in zip(axes, PICTURES[name], strict=True):
        bug = next(bug for bug in BUGS if bug.name == bug_name)
        for broken, colour, label in ((False, "C0", "the script"), (True, "C3", "with the mistake")):
            key = key_of(bug, broken) | {"metric": metric}
            rows = [row for row in known_rows("curves.csv") if key.items() <= row.items()]
            for seed in sorted({row["seed"] for row in rows}):
                points = [(int(row["step"]), float(row["value"])) for row in rows if row["seed"] == seed]
                axis.plot(*zip(*points, strict=True), colour, linewidth=1.2, label=label)
                label = None  # one line of the legend for all seeds
        if axis.get_ylim()[1] > 1e4:  # one curve reaches 3e7, the other 100
            axis.set_yscale("log")
        axis.set_title(TITLES[metric], fontsize=9)
        axis.set_xlabel("transitions", fontsize=8)
        axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / f"mistake_{name}.png")
    plt.close(figure)


# --- Which test catches it ---


class Failures:
    """A pytest plugin that keeps what each failed test said; an error in place of a failure is none."""

    def __init__(self):
        self.said = []

    def pytest_exception_interact(self, call, report):
        if report.when == "call" and isinstance(call.excinfo.value, (AssertionError, pytest.fail.Exception)):
            self.said.append(str(call.excinfo.value).strip().partition("\n")[0])


def run_tests(tests: list[str]) -> tuple[int, list[str]]:
    """Run these tests on the scripts as sys.modules has them; return pytest's status and what the failed ones said."""
    for name in [name for name in sys.modules if name.startswith("test_") or name == "conftest"]:
        del sys.modules[name]  # they hold the scripts of the last call
    failures, nodes = Failures(), [f"{ROOT}/tests/{test}" for test in tests]
    with contextlib.redirect_stdout(io.StringIO()):
        status = pytest.main(["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *nodes], plugins=[failures])
    return int(status), failures.said


def check(bugs: list[Bug], control: bool = True) -> bool:
    """Run the test of each bug, which must pass on the script and fail with the mistake; return whether all did."""
    all_caught = True
    if control:
        status, said = run_tests(list(dict.fromkeys(bug.test for bug in bugs)))
        print(f"without a mistake: {'passed' if status == 0 else f'pytest says {status} {said}'}", flush=True)
        all_caught = status == 0
    for bug in bugs:
        load(bug.script, patched(bug))
        before = time.perf_counter()
        status, said = run_tests([bug.test])
        del sys.modules[Path(bug.script).stem]
        caught = status == 1 and len(said) > 0  # 1: tests failed
        all_caught &= caught
        what = f"caught: {said[0][:100]}" if caught else f"NOT CAUGHT (pytest says {status})"
        print(f"{bug.name:25} {time.perf_counter() - before:4.1f} s  {bug.test}\n{'':33}{what}", flush=True)
    return all_caught


@dataclass
class Args:
    seeds: list[int] = field(default_factory=list)  # train with each mistake, and without, on these seeds
    tests: bool = False  # put every mistake before its test
    control: bool = True  # run these tests without a mistake too
    table: bool = False  # print the table of docs/mistakes.md
    pictures: bool = False  # draw the curves of docs/mistakes.md
    only: list[str] = field(default_factory=list)  # names of mistakes (default: all)


def main():
    args = tyro.cli(Args, description=__doc__)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "docs" / "examples")]
    bugs = [bug for bug in BUGS if bug.name in args.only or not args.only]
    if args.seeds:
        run_seeds([bug for bug in bugs if bug.run is not None], args.seeds)
    if args.table:
        print(table())
    if args.pictures:
        for name in PICTURES:
            draw(name, ROOT / "docs")
    if args.tests and not check(bugs, args.control):
        raise SystemExit(1)
    if not (args.seeds or args.table or args.pictures or args.tests):
        for bug in bugs:
            lines = [f"- {line}" for line in bug.new.splitlines()] + [f"+ {line}" for line in bug.old.splitlines()]
            print(f"{bug.name} ({bug.script}): {bug.what}", *lines, "", sep="\n")


if __name__ == "__main__":
    main()
