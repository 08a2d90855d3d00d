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
import table

README = (ROOT / "README.md").read_text()
RESULTS = sorted(path.name for path in (ROOT / "benchmarks" / "results").iterdir())


def test_the_table_of_seeds_is_that_of_the_raw_data():
    assert table.table("dqn_cartpole") in README


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
