"""What the README shows is what the raw data say."""

import csv
import json
import re
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import plot
import run_seeds
import speed
import table
import vec_env_cost

README = (ROOT / "README.md").read_text()
RESULTS = sorted(path.parent.name for path in (ROOT / "benchmarks" / "results").glob("*/summary.csv"))


@pytest.mark.parametrize("name", ["dqn_cartpole", "dqn_vecenv", "ppo_cartpole", "dqn_lstm_cartpole"])
def test_the_table_of_seeds_is_that_of_the_raw_data(name):
    assert table.row_of(name) in README


def test_the_table_of_ten_seeds_is_that_of_the_raw_data():
    assert table.table("dqn_cartpole") in README


def test_the_table_of_costs_is_that_of_the_raw_data():
    assert vec_env_cost.table() in README


def test_the_table_of_ratios_is_that_of_the_raw_data():
    assert speed.table() in README


def test_a_rate_is_a_rate():
    rate = vec_env_cost.transitions_per_second("slow_envs:Wait1ms-v0", "dummy", 2, seconds=0.3)
    assert 300 < rate < 1_000  # a step of one environment waits for 1 ms and a bit


def test_the_watch_times_what_lies_between_two_steps(capsys, monkeypatch):
    class Ended(Exception):
        pass

    def end(status):
        raise Ended

    monkeypatch.setattr("os._exit", end)
    watch = speed.Watch(10, 20)
    for step in (4, 12, 16):
        watch.at(step)
    with pytest.raises(Ended):
        watch.at(24)
    result = json.loads(capsys.readouterr().out.removeprefix("RESULT "))
    assert result["steps"] == 12 and 0 < result["seconds"] < 1


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


def test_pictures_in_the_readme_exist():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / picture).stat().st_size > 1_000 for picture in pictures)


def test_worst_late_evaluation_is_of_the_last_fifth():
    curve = [[step, value] for step, value in zip(range(10, 110, 10), [1, 2, 3, 4, 5, 6, 7, 8, 30, 20], strict=True)]
    assert run_seeds.worst_late(curve) == 20


def test_a_finished_run_is_collected(tmp_path):
    result = dict.fromkeys(run_seeds.FROM_RESULT, 1.0) | {"evaluation_curve": [[100, 7.0], [200, 9.0]]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "args.json").write_text('{"seed": 4}')
    (tmp_path / "progress.csv").write_text(
        "step,metric,value\n5,train/epsilon,0.5\n100,eval/return_mean,7.0\n200,eval/return_mean,9.0\n"
    )
    row = run_seeds.collect(tmp_path, tmp_path)
    assert (row["seed"], row["worst_late_evaluation"]) == (4, 9.0)
    np.testing.assert_array_equal(plot.curve(tmp_path / "seed_4.csv", "eval/return_mean"), [[100, 200], [7, 9]])


def test_a_picture_is_drawn(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "benchmarks" / "results" / "dqn_cartpole", tmp_path / "some")
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot.py", "some", "--out", str(tmp_path / "picture.png")])
    plot.main()
    assert (tmp_path / "picture.png").stat().st_size > 10_000
