"""What the README shows is what the raw data say."""

import csv
import dataclasses
import inspect
import itertools
import json
import re
import sys
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
import tyro
from conftest import ROOT, SCRIPTS, load

sys.path.insert(0, str(ROOT / "benchmarks"))
import denormals
import drawings
import pictures
import plot
import run_seeds
import sb3_cartpole
import speed
import table
import vec_env_cost

README = (ROOT / "README.md").read_text()
PERFORMANCE_PAGES = [(ROOT / "docs" / f"performance{language}.md").read_text() for language in ("", ".zh-CN")]
RESULTS_PAGES = [(ROOT / "docs" / f"results{language}.md").read_text() for language in ("", ".zh-CN")]
READMES = [README, (ROOT / "README.zh-CN.md").read_text()]
PICTURE = r"(?:!\[[^\]]*\]\(|<img src=\")([^)\"]+)"
RESULTS = sorted(path.parent.name for path in (ROOT / "benchmarks" / "results").glob("*/summary.csv"))
PAGES = [*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")]
OTHERS = [
    *("dqn_cartpole", "ppo_cartpole", "dqn_lstm_cartpole", "dqn_lstm_cartpole_eps_1e-5", "dqn_lstm_cartpole_earlier"),
    *("dqn_lstm_cartpole_burn_in_0", "dqn_lstm_cartpole_memory_none"),
]


def finals_of(name: str) -> str:
    """Return the cells of a table of three tasks: each seed's final return, and the mean."""
    rows = csv.DictReader((ROOT / "benchmarks" / "results" / name / "summary.csv").open())
    finals = [float(row["final_return_mean"]) for row in sorted(rows, key=lambda row: int(row["seed"]))]
    return f"| {', '.join(f'{final:.1f}' for final in finals)} | {np.mean(finals):.1f} |"


TABLES = {
    **{name: (RESULTS_PAGES, partial(table.row_of, name)) for name in OTHERS},
    **{name: (RESULTS_PAGES, partial(finals_of, name)) for name in ("ppo_reacher", "ppo_pusher", "ppo_pendulum")},
    "popgym": (RESULTS_PAGES, lambda: table.settings("dqn_lstm_popgym", 2)),
    "costs": (PERFORMANCE_PAGES, vec_env_cost.table),
    "ratios": (PERFORMANCE_PAGES, speed.table),
}


@pytest.mark.parametrize("pages, make_table", TABLES.values(), ids=TABLES)
def test_a_table_is_that_of_the_raw_data(pages, make_table):
    assert all(make_table() in page for page in pages)


@pytest.mark.parametrize("name", ["README", "docs/results", "docs/tour", "docs/own_environment", "docs/performance"])
def test_both_languages_show_the_same_commands_and_pictures(name):
    pages = [(ROOT / f"{name}{language}.md").read_text() for language in ("", ".zh-CN")]
    blocks, pictures = (
        [re.findall(pattern, page) for page in pages] for pattern in (r"(?ms)^```\w+\n.*?^```$", PICTURE)
    )
    assert blocks[0] and blocks[0] == blocks[1] and pictures[0] == pictures[1]
    assert [bool(re.search(r"zh-CN", page.splitlines()[0])) for page in pages] == [True, False]


def test_the_readmes_stay_short():
    assert max(len(readme.splitlines()) for readme in READMES) <= 220


@pytest.mark.parametrize("readme", READMES, ids=["en", "zh"])
def test_the_readmes_say_how_long_the_scripts_are(readme):
    for path in SCRIPTS:
        lines = path.read_text().splitlines()
        assert re.search(rf"(?m)^\| \[`{path.name}`\].* \| {len(lines)} \|$", readme), path.name
        plumbing = len(lines) - lines.index("# " + "#" * 118) - 1
        assert len(re.findall(rf"\b{plumbing}\b", readme)) == 2  # in the text, and in the table of other projects
    first = len((ROOT / "dqn_cartpole.py").read_text().splitlines())
    assert len(re.findall(rf"\| {first}\b", readme)) == 2


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = re.sub(r"(?ms)^```.*?^```$", "", path.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if not file.startswith("http"):
            found = path.parent / file if file else path
            assert found.exists(), target
            if anchor:
                headings = re.findall(r"(?m)^#+ (.*)$", found.read_text())
                anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert anchor in anchors, target


def test_a_table_of_nothing_is_refused():
    with pytest.raises(SystemExit, match=r"table: no .*no_such_runs"):
        table.settings("no_such_runs")


def test_a_rate_is_a_rate(monkeypatch):
    clock = itertools.count(0.0, 0.01)  # a look at it after each step of both environments
    monkeypatch.setattr(vec_env_cost, "time", SimpleNamespace(perf_counter=clock.__next__))
    rate = vec_env_cost.transitions_per_second("slow_envs:Wait0_1ms-v0", "dummy", 2, seconds=1.0)
    assert rate == pytest.approx(2 / 0.01, rel=0.05)


def test_the_watch_times_what_lies_between_two_steps(capsys, monkeypatch):
    class Ended(Exception):
        pass

    def end(status):
        raise Ended

    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=itertools.count(5.0, 0.5).__next__))
    watch = speed.Watch(10, 20)
    for step in (4, 12, 16):
        watch.at(step)
    with pytest.raises(Ended):
        watch.at(24)
    result = json.loads(capsys.readouterr().out.removeprefix("RESULT "))
    assert result == {"steps": 12, "seconds": 0.5, "inside": {}}


@pytest.mark.parametrize("task", speed.TASKS.values(), ids=speed.TASKS)
def test_the_peers_do_the_same_work(task):
    algorithm = getattr(stable_baselines3, task.sb3["algorithm"])
    defaults = {name: parameter.default for name, parameter in inspect.signature(algorithm).parameters.items()}
    peer = SimpleNamespace(**{"n_envs": 1, **defaults, **task.sb3})
    for command in task.ours.values():
        script, *flags = command.split()
        ours = tyro.cli(load(ROOT / script).Args, args=flags)
        assert (ours.learning_rate, ours.gamma) == (peer.learning_rate, peer.gamma)
        if script == "ppo_cartpole.py":
            assert (ours.num_envs, ours.num_steps, ours.update_epochs) == (peer.n_envs, peer.n_steps, peer.n_epochs)
            assert ours.num_envs * ours.num_steps == ours.num_minibatches * peer.batch_size
            assert (ours.gae_lambda, ours.clip_coef) == (peer.gae_lambda, peer.clip_range)
            weights = ours.entropy_coef, ours.value_coef, ours.max_grad_norm
            assert weights == (peer.ent_coef, peer.vf_coef, peer.max_grad_norm)
        else:
            assert getattr(ours, "tau", 1.0) == peer.tau  # dqn_atari.py copies
            for name in ("batch_size", "buffer_size", "learning_starts"):
                assert getattr(ours, name) == getattr(peer, name), name
            assert ours.epsilon_start == ours.epsilon_end == peer.exploration_initial_eps == peer.exploration_final_eps
            assert ours.train_frequency * peer.gradient_steps == peer.train_freq * peer.n_envs
            assert ours.target_frequency == peer.target_update_interval
            assert not hasattr(ours, "max_grad_norm")  # time_sb3 sets the peer's so high that it never clips


@pytest.mark.parametrize("name", RESULTS)
def test_the_summary_agrees_with_the_curves(name):
    folder = ROOT / "benchmarks" / "results" / name
    assert json.loads((folder / "command.json").read_text())["command"].startswith("python ")
    rows = list(csv.DictReader((folder / "summary.csv").open()))
    assert {f"seed_{row['seed']}.csv" for row in rows} == {path.name for path in folder.glob("seed_*.csv")}
    for row in rows:
        steps, means = plot.curve(folder / f"seed_{row['seed']}.csv", "eval/return_mean")
        assert means[steps > 0.8 * steps[-1]].min() == pytest.approx(float(row["worst_late_evaluation"]))
        assert steps[-1] <= int(row["global_step"])


def test_the_weak_seeds_named_are_those_of_the_raw_data():
    rows = list(csv.DictReader((ROOT / "benchmarks" / "results" / "dqn_cartpole" / "summary.csv").open()))
    (weak,) = [row for row in rows if float(row["final_return_mean"]) < 499.95]
    assert (weak["seed"], float(weak["final_return_mean"]), float(weak["final_return_min"])) == ("3", 490.82, 429)
    late = {int(row["seed"]): float(row["worst_late_evaluation"]) for row in rows}
    assert {seed: worst for seed, worst in late.items() if worst < 475} == {3: 413.25, 12: 451.1875, 18: 463.3125}
    for page in RESULTS_PAGES:
        assert all(text in page for text in ("490.8", "429", "413.2", "451.2", "463.3"))


def test_worker_processes_change_no_result():
    alone, workers = (ROOT / "benchmarks" / "results" / name for name in ("dqn_cartpole", "dqn_vecenv"))
    curves = sorted(path.name for path in workers.glob("seed_*.csv"))
    assert len(curves) == 3 and all((alone / name).read_text() == (workers / name).read_text() for name in curves)


def test_pictures_in_the_readme_exist():
    pictures = re.findall(PICTURE, README)
    assert pictures and all((ROOT / picture).stat().st_size > 1_000 for picture in pictures)


def test_worst_late_evaluation_is_of_the_last_fifth():
    curve = [[step, value] for step, value in zip(range(10, 110, 10), [1, 2, 3, 4, 5, 6, 7, 8, 30, 20], strict=True)]
    assert run_seeds.worst_late(curve) == 20


def test_a_finished_run_is_collected(tmp_path):
    result = dict.fromkeys(run_seeds.FROM_RESULT, 1.0) | {"evaluations": [[100, 7.0, 1.0], [200, 9.0, 2.0]]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "args.json").write_text('{"seed": 4}')
    (tmp_path / "progress.csv").write_text(
        "step,metric,value\n5,train/epsilon,0.5\n100,eval/return_mean,7.0\n200,eval/return_mean,9.0\n"
    )
    row = run_seeds.collect(tmp_path, tmp_path)
    assert (row["seed"], row["worst_late_evaluation"]) == (4, 9.0)
    np.testing.assert_array_equal(plot.curve(tmp_path / "seed_4.csv", "eval/return_mean"), [[100, 200], [7, 9]])


def test_the_command_of_a_finished_run_names_the_flags_that_are_no_defaults():
    args = load(ROOT / "dqn_atari.py").Args(
        seed=4, checkpoint_memory=True, clip_rewards=False, gamma=0.9, run_dir="somewhere"
    )
    command = "python dqn_atari.py --seed N --gamma 0.9 --no-clip-rewards --checkpoint-memory"
    assert run_seeds.command_of("dqn_atari.py", dataclasses.asdict(args)) == command


def test_long_curves_are_thinned_but_evaluations_are_kept(tmp_path):
    result = dict.fromkeys(run_seeds.FROM_RESULT, 1.0) | {"evaluations": [[1, 7.0, 1.0]]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "args.json").write_text('{"seed": 1}')
    rows = [f"{step},{name},{step}" for step in range(1_000) for name in ("eval/return_mean", "train/loss")]
    (tmp_path / "progress.csv").write_text("\n".join(["step,metric,value", *rows, "1,train/episode_return,9"]) + "\n")
    run_seeds.collect(tmp_path, tmp_path)
    assert len(plot.curve(tmp_path / "seed_1.csv", "eval/return_mean")[0]) == 1_000
    np.testing.assert_array_equal(plot.curve(tmp_path / "seed_1.csv", "train/loss")[0], [*range(0, 1_000, 5), 999])
    assert "episode" not in (tmp_path / "seed_1.csv").read_text()


def test_results_with_other_columns_are_not_added_to(tmp_path, monkeypatch):
    out = tmp_path / "benchmarks" / "results" / "ppo_cartpole"
    out.mkdir(parents=True)
    (out / "summary.csv").write_text("seed,final_return_mean,solved_step\n3,500.0,\n")
    (out / "command.json").write_text("what they were run with")
    monkeypatch.setattr(run_seeds, "ROOT", tmp_path)
    monkeypatch.setattr(run_seeds, "train", lambda *args: pytest.fail("trained in vain"))
    monkeypatch.setattr(sys, "argv", ["run_seeds.py", "ppo_cartpole.py", "--seeds", "3", "4"])
    with pytest.raises(SystemExit, match=r"has other columns than seed, final_return_mean, .*; give another --name"):
        run_seeds.main()
    assert (out / "command.json").read_text() == "what they were run with"


def test_recorded_seeds_are_not_run_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "benchmarks" / "results" / "ppo_cartpole"
    out.mkdir(parents=True)
    (out / "summary.csv").write_text("seed,final_return_mean\n3,500.0\n4,500.0\n")
    (out / "command.json").write_text("what they were run with")
    assert run_seeds.seeds_to_run([3, 5], out) == [5]
    monkeypatch.setattr(run_seeds, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_seeds.py", "ppo_cartpole.py", "--seeds", "3", "4"])
    run_seeds.main()
    assert capsys.readouterr().out.endswith(f"{out / 'summary.csv'}: 3 4; to run them, give another --name\n")
    assert (out / "command.json").read_text() == "what they were run with"


def test_seeds_of_other_flags_are_not_added(tmp_path, monkeypatch):
    monkeypatch.setattr(run_seeds, "ROOT", tmp_path)
    row = dict.fromkeys(run_seeds.COLUMNS, 1.0)
    monkeypatch.setattr(run_seeds, "train", lambda args, out, seed: row | {"seed": seed})
    for seed in "34":
        monkeypatch.setattr(sys, "argv", ["run_seeds.py", "ppo_cartpole.py", "--seeds", seed, "--flags=--gamma 0.9"])
        run_seeds.main()
    monkeypatch.setattr(sys, "argv", ["run_seeds.py", "ppo_cartpole.py", "--seeds", "5"])
    with pytest.raises(SystemExit, match=r"has command 'python .* --gamma 0.9', this run .*--name"):
        run_seeds.main()
    lines = (tmp_path / "benchmarks" / "results" / "ppo_cartpole" / "summary.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["seed", "3", "4"]


def test_a_seed_that_fails_takes_no_other_one_along(tmp_path, monkeypatch):
    def train(args, out, seed):
        if seed == 3:
            raise ZeroDivisionError
        return dict.fromkeys(run_seeds.COLUMNS, 1.0) | {"seed": seed}

    monkeypatch.setattr(run_seeds, "ROOT", tmp_path)
    monkeypatch.setattr(run_seeds, "train", train)
    monkeypatch.setattr(sys, "argv", ["run_seeds.py", "ppo_cartpole.py", "--seeds", "3", "4", "5"])
    with pytest.raises(ZeroDivisionError):
        run_seeds.main()
    lines = (tmp_path / "benchmarks" / "results" / "ppo_cartpole" / "summary.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["seed", "4", "5"]


@pytest.mark.parametrize("seeds, legend", [(1, "some"), (3, "some: 3 seeds"), (5, "some: mean of 5 seeds")])
def test_a_picture_has_a_curve_per_seed_a_mean_as_far_as_all_go_and_levels(seeds, legend, tmp_path, monkeypatch):
    (tmp_path / "some").mkdir()
    for seed in range(seeds):  # seed s has return s, and ends at step 100 + s
        rows = "".join(f"{step},eval/return_mean,{seed}\n" for step in (50, 100 + seed))
        (tmp_path / "some" / f"seed_{seed}.csv").write_text(f"step,metric,value\n{rows}")
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    out = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", ["plot.py", "some", "--out", str(out), "--levels", "random", "-3.5"])
    plot.main()
    axes = plot.plt.gcf().axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [legend, "random"]
    *curves, level = [line.get_xydata().tolist() for line in axes.lines]
    assert curves[:seeds] == [[[50, seed], [100 + seed, seed]] for seed in range(seeds)]
    assert curves[seeds:] == ([[[50, 2], [100, 2]]] if seeds == 5 else [])
    assert [y for _, y in level] == [-3.5, -3.5] and axes.get_ylim()[0] < -3.5
    assert out.stat().st_size > 1_000


@pytest.mark.parametrize("flags", [["typo"], ["some", "typo"], ["some", "--metric", "train/typo"]])
def test_a_picture_of_no_curve_is_refused(flags, tmp_path, monkeypatch):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "seed_1.csv").write_text("step,metric,value\n1,eval/return_mean,2\n")
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot.py", *flags, "--out", str(tmp_path / "picture.png")])
    with pytest.raises(SystemExit, match="has no curve of"):
        plot.main()
    assert not (tmp_path / "picture.png").exists()


# --- Seeds over a cluster ---


def test_ray_is_asked_for_by_name_where_it_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(run_seeds, "ROOT", tmp_path)
    monkeypatch.setattr(run_seeds, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["run_seeds.py", "ppo_cartpole.py", "--ray", "local"])
    with pytest.raises(SystemExit) as stop:
        run_seeds.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "run_seeds: --ray needs a package that is not installed: pip install ray\n"
    assert list(tmp_path.iterdir()) == []


def test_ray_returns_what_a_process_pool_writes(monkeypatch, tmp_path):
    asked = []

    def remote(num_cpus):
        return lambda function: SimpleNamespace(remote=lambda *args: asked.append((num_cpus, args)) or function(*args))

    ray = SimpleNamespace(init=lambda *args, **options: asked.append((args, options)), remote=remote, get=lambda x: x)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(run_seeds, "find_spec", lambda name: True)
    monkeypatch.setattr(run_seeds, "version", lambda name: "1.2.3")
    monkeypatch.setattr(run_seeds, "ROOT", tmp_path)
    monkeypatch.chdir(ROOT)  # as Ray does with working_dir
    flags = "--total-timesteps 1024 --eval-every 500 --eval-episodes 2 --final-eval-episodes 2"
    for name, more in ("pool", ["--jobs", "2"]), ("ray", ["--ray", "auto"]):
        command = ["run_seeds.py", "ppo_cartpole.py", "--seeds", "3", f"--flags={flags}", "--name", name]
        monkeypatch.setattr(sys, "argv", command + more)
        run_seeds.main()
    assert asked[0] == (
        ("auto",),
        {"runtime_env": {"working_dir": str(tmp_path), "excludes": ["docs", "benchmarks/results"]}},
    )
    assert [(cpus, seed) for cpus, (_, seed) in asked[1:]] == [(1, 3)]

    results = tmp_path / "benchmarks" / "results"
    timed = {"seconds"}
    assert (results / "ray" / "seed_3.csv").read_text() == (results / "pool" / "seed_3.csv").read_text()
    (one,), (other,) = (list(csv.DictReader((results / name / "summary.csv").open())) for name in ("ray", "pool"))
    assert one["seed"] == "3"
    assert one.keys() == other.keys() and {key for key in one if one[key] != other[key]} <= timed
    assert json.loads((results / "ray" / "command.json").read_text())["jobs"] == "ray 1.2.3"


# --- Pictures of what a network sees and expects ---


def untrained(script, path, **flags):
    """Write a checkpoint of a network that learned nothing; return its script's module."""
    module = load(ROOT / f"{script}.py")
    args = module.Args(**flags)
    env = module.make_env(args)
    torch.manual_seed(0)
    network = module.QNetwork(env.observation_space, env.action_space, args)
    saved = {**dataclasses.asdict(args), "a_flag_of_older_scripts": 1}
    torch.save({"script": script, "args": saved, "network": network.state_dict()}, path)
    return module


def test_a_discounted_return_ends_with_its_life():
    rewards, terminated = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 1.0, 0.0, 0.0])
    np.testing.assert_array_equal(pictures.discounted_returns(rewards, terminated, 0.5), [2.0, 2.0, 5.0, 4.0])


def test_an_episode_is_played_with_the_network_of_the_checkpoint(tmp_path):
    untrained("dqn_cartpole", tmp_path / "best.pt")
    script, args, network = pictures.load(tmp_path / "best.pt")
    saved = torch.load(tmp_path / "best.pt", weights_only=True)["network"]
    assert all(torch.equal(saved[name], value) for name, value in network.state_dict().items())
    steps = list(pictures.play(script, args, network, 500, seed=7))
    obs = torch.from_numpy(np.stack([step.obs for step in steps]))
    with torch.no_grad():
        q_values = network(obs)
    np.testing.assert_allclose([step.q_max for step in steps], q_values.max(dim=1).values, rtol=1e-5)

    env = script.make_env(args)
    np.testing.assert_array_equal(obs[0], env.reset(seed=7)[0])
    for action, step, after in zip(q_values.argmax(dim=1).tolist(), steps, [*obs[1:], None], strict=True):
        expected, reward, terminated, _, _ = env.step(action)
        assert (reward, terminated) == (step.reward, step.terminated) == (1.0, after is None)
        assert after is None or np.array_equal(after, expected)


def test_a_game_is_played_as_the_network_sees_it(tmp_path):
    untrained("dqn_atari", tmp_path / "best.pt", eval_epsilon=1.0)
    steps = list(pictures.play(*pictures.load(tmp_path / "best.pt"), 1_500, seed=1, screens=True))
    lives = np.flatnonzero([step.terminated for step in steps])
    assert len(lives) == 5 and lives[-1] == len(steps) - 1  # a whole game of Breakout
    assert {step.reward for step in steps} == {0.0, 1.0}
    assert steps[0].screen.shape == (210, 160, 3)
    for t in range(1, len(steps)):
        before = np.zeros((3, 84, 84), np.uint8) if t - 1 in lives else steps[t - 1].obs[1:]
        np.testing.assert_array_equal(steps[t].obs[:3], before)
        assert steps[t].obs[3].any()


@pytest.mark.parametrize("script, what", [(name, what) for what, names in pictures.SCRIPTS.items() for name in names])
def test_a_picture_of_a_network_is_drawn(script, what, tmp_path, monkeypatch):
    untrained(script, tmp_path / "best.pt")
    out = tmp_path / "new" / "picture.png"
    command = [what, str(tmp_path / "best.pt"), str(out), "--steps", "30", "--step", "20"]
    monkeypatch.setattr(sys, "argv", ["pictures.py", *command])
    pictures.main()
    assert out.stat().st_size > 10_000


def test_a_network_without_q_values_is_refused(tmp_path, monkeypatch, capsys):
    torch.save({"script": "ppo_cartpole"}, tmp_path / "best.pt")
    monkeypatch.setattr(sys, "argv", ["pictures.py", "q-values", str(tmp_path / "best.pt"), str(tmp_path / "x.png")])
    with pytest.raises(SystemExit) as stop:
        pictures.main()
    assert stop.value.code == 2 and "not of ppo_cartpole" in capsys.readouterr().err


# --- Stable-Baselines3 at the same work ---


def test_the_peers_episodes_are_those_of_each_seed():
    seen = []

    def predict(obs, deterministic):
        seen.append(deterministic)
        return np.int64(obs[:, 2] > 0), None

    returns = sb3_cartpole.evaluate(SimpleNamespace(predict=predict), 4, seed=10)
    for i, total in enumerate(returns):
        env = gym.make("CartPole-v1")
        (obs, _), rewards, ended = env.reset(seed=10 + i), 0.0, False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(int(obs[2] > 0))
            rewards, ended = rewards + reward, terminated or truncated
        assert rewards == total
    assert all(seen) and len(set(returns)) > 1


@pytest.mark.parametrize("algorithm", ["dqn", "ppo"])
def test_the_peers_results_have_the_form_of_ours(algorithm, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path / "sb3"))
    monkeypatch.setattr(run_seeds, "ROOT", tmp_path)
    monkeypatch.setattr(sb3_cartpole, "EVAL_EVERY", 250)
    monkeypatch.setattr(sb3_cartpole, "EVAL_EPISODES", 2)
    monkeypatch.setattr(sb3_cartpole, "FINAL_EVAL_EPISODES", 3)
    clock, evaluate = itertools.count(0.0, 0.001), sb3_cartpole.evaluate

    def slow_evaluate(*args):
        for _ in range(10_000):  # 10 s
            next(clock)
        return evaluate(*args)

    monkeypatch.setattr(sb3_cartpole, "evaluate", slow_evaluate)
    monkeypatch.setattr(sb3_cartpole, "time", SimpleNamespace(process_time=clock.__next__, perf_counter=clock.__next__))
    command = ["sb3_cartpole.py", algorithm, "--seeds", "4", "5", "--total-timesteps", "1200"]
    monkeypatch.setattr(sys, "argv", command)
    sb3_cartpole.main()
    out = tmp_path / "benchmarks" / "results" / f"sb3_{algorithm}_cartpole"
    rows = list(csv.DictReader((out / "summary.csv").open()))
    assert [row["seed"] for row in rows] == ["4", "5"]
    ours = csv.DictReader((ROOT / "benchmarks" / "results" / f"{algorithm}_cartpole" / "summary.csv").open())
    assert list(rows[0]) == ours.fieldnames
    said = json.loads((out / "command.json").read_text())["command"]
    assert said == f"python benchmarks/sb3_cartpole.py {algorithm} --total-timesteps 1200"
    for row in rows:
        assert 1_200 <= int(row["global_step"]) <= 1_200 + 256 and int(row["gradient_steps"]) > 0
        steps, means = plot.curve(out / f"seed_{row['seed']}.csv", "eval/return_mean")
        assert ((steps % 250 < 8) & (steps >= 250)).all() and len(steps) == 1_200 // 250 + (steps[-1] >= 1_250)
        assert float(row["worst_late_evaluation"]) == means[steps > 0.8 * steps[-1]].min()
        assert 0 < float(row["seconds"]) < 1
    capsys.readouterr()
    sb3_cartpole.main()
    assert (
        capsys.readouterr().out
        == f"not run again, they have a row in {out / 'summary.csv'}: 4 5; to run them, give another --name\n"
    )


# --- What a visitor finds ---


@pytest.mark.parametrize("path", sorted((ROOT / "checkpoints").glob("*.pt")), ids=lambda path: path.stem)
def test_a_checkpoint_of_the_repository_plays(path, cli):
    script = torch.load(path, weights_only=True)["script"]
    size, episodes, least = (3_400_000, 2, 50) if script == "dqn_atari" else (100_000, 5, 475)
    assert path.stem == script and path.stat().st_size < size
    status, out, err = cli("--play", path, "--final-eval-episodes", episodes, script=f"{script}.py")
    assert (status, err) == (0, "")
    assert out.startswith(f"--final-eval-episodes {episodes} in place of "), out
    assert float(re.search(rf"\nreturn (\S+) over {episodes} episodes .*\n$", out)[1]) >= least


def test_the_repository_has_checkpoints_of_default_runs():
    paths = {path.stem: path for path in (ROOT / "checkpoints").glob("*.pt")}
    assert paths.keys() == {path.stem for path in SCRIPTS}
    for name, path in paths.items():
        defaults = dataclasses.asdict(load(ROOT / f"{name}.py").Args())
        assert torch.load(path, weights_only=True)["args"].items() <= defaults.items()


def test_a_trained_network_is_used_as_the_readme_shows(monkeypatch):
    (code,) = (block for block in re.findall(r"(?ms)^```python\n(.*?)^```", README) if "load_checkpoint" in block)
    monkeypatch.chdir(ROOT)
    exec(code, names := {})
    assert names["action"] in (0, 1)


def test_the_citation_file_says_what_the_format_asks_for():
    text = (ROOT / "CITATION.cff").read_text()
    fields = dict(re.findall(r"(?m)^([a-z-]+): *\"?(.*?)\"?$", text))
    assert fields.items() >= {"cff-version": "1.2.0", "title": "Deep RL in single files", "version": "1.0.0"}.items()
    assert fields["message"] and (ROOT / "LICENSE").read_text().startswith(f"{fields['license']} License")
    assert f"\n# {fields['title']}\n" in README
    assert "http" not in text and "\t" not in text


# --- The tour ---


def test_the_tour_speaks_of_what_is_there():
    scripts = "".join(path.read_text() for path in SCRIPTS)
    tour = (ROOT / "docs" / "tour.md").read_text()
    names = set(re.findall(r"`(--[\w-]+|[A-Za-z_]+_[\w.]*)", tour))
    assert len(names) > 30
    for name in names:
        known = name[2:].replace("-", "_") if name.startswith("--") else name.split(".")[-1]
        assert known in scripts or (ROOT / "tests" / "test_dqn.py").read_text().count(f"def {known}("), name
    for line in re.findall(r"(?m)^ *(?:q_values|next_q_values|memory\.add|last_obs|obs|next_obs|while) .*$", tour):
        code = line.strip()
        assert "`" in code or code in scripts, code


def test_the_pictures_of_the_tour_are_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drawings, "breakout", lambda: [14, 6, 28])
    monkeypatch.setattr(sys, "argv", ["drawings.py", "--out", str(tmp_path)])
    drawings.main()
    assert capsys.readouterr().out == "3 bricks, 6 to 28 steps after the paddle's hit, median 14\n"
    for page in ("tour.md", "tour.zh-CN.md"):
        shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "docs" / page).read_text())
        assert {path.name for path in tmp_path.iterdir()} == {name for name in shown if name.startswith("tour_")}
        assert all((ROOT / "docs" / name).exists() for name in shown)


def test_denormal_numbers_among_adams_means_are_counted():
    means = [torch.tensor([0.0, 1e-39, -1e-45]), torch.tensor([[2e-38, -1.0]])]
    assert denormals.share_of_denormals({i: {"exp_avg": mean} for i, mean in enumerate(means)}) == pytest.approx(0.4)


def test_a_run_is_drawn(tmp_path, monkeypatch):
    rows = [f"{step},train/episode_return,{step}" for step in range(1, 300)]
    rows += [
        f"{step},{name},1.0" for step in (100, 200) for name in ("eval/return_mean", "train/loss", "train/q_taken")
    ]
    (tmp_path / "progress.csv").write_text("\n".join(["step,metric,value", *rows]) + "\n")
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path)])
    plot.main()
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    panels = plot.plt.gcf().axes
    assert [panel.get_title() for panel in panels] == ["returns", "loss", "mean Q of a minibatch"]
    training, evaluations = (line.get_ydata() for line in panels[0].lines)
    assert training[-1] == np.mean(range(200, 300)) and list(evaluations) == [1.0, 1.0]
    with pytest.raises(SystemExit, match="is no run directory"):
        monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "none")])
        plot.main()


def test_a_smoothed_curve_is_the_mean_of_the_last_values():
    np.testing.assert_allclose(plot.smoothed(np.array([1.0, 2.0, 6.0, 10.0]), 2), [1.0, 1.5, 4.0, 8.0])


def test_the_band_is_of_the_mean_over_seeds():
    curves = np.random.default_rng(1).normal(5.0, 2.0, size=(100, 3))
    low, high = table.bootstrap(curves)
    assert ((low < curves.mean(axis=0)) & (curves.mean(axis=0) < high)).all()
    assert high - low == pytest.approx(np.full(3, 2 * 1.96 * 0.2), rel=0.3)  # the standard error is 2 / sqrt(100)


def test_rates_stand_with_their_intervals(tmp_path, monkeypatch):
    (tmp_path / "some").mkdir()
    lines = ["seed,final_return_mean,worst_late_evaluation"]
    lines += [f"{seed},{500 if seed else 400},{500 if seed > 3 else 300}" for seed in range(10)]
    (tmp_path / "some" / "summary.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    rate = "9 of 10 (55.5 to 99.7 %)"
    assert table.row_of("some").endswith(f") | {rate} | {rate} | 400.0 | 490.0 | 6 |")


def test_the_interval_of_a_rate():
    assert table.rate_interval(10, 10) == pytest.approx((0.025**0.1, 1.0))  # no rate below makes ten of ten likely
    assert table.rate_interval(0, 10) == pytest.approx((0.0, 1.0 - 0.025**0.1), abs=1e-9)
    assert table.rate_interval(15, 20) == pytest.approx((0.5090, 0.9134), abs=1e-4)
