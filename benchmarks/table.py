"""Print the README's table of results in benchmarks/results/NAME/summary.csv.

python benchmarks/table.py dqn_cartpole
"""

import csv
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = {
    "seed": ("seed", "{:.0f}"),
    "final_return_mean": ("final network, mean of 100 episodes", "{:.1f}"),
    "final_return_min": ("worst of them", "{:.0f}"),
    "worst_late_evaluation": ("worst evaluation in the last fifth", "{:.1f}"),
    "solved_step": ("first evaluation of 475 or more", "{:,.0f}"),
    "seconds": ("training, s", "{:.1f}"),
}


def table(name: str) -> str:
    """Return a Markdown table with a row per seed."""
    with open(RESULTS / name / "summary.csv") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: int(row["seed"]))
    lines = ["| " + " | ".join(title for title, _ in COLUMNS.values()) + " |", "|" + "---:|" * len(COLUMNS)]
    for row in rows:
        cells = [form.format(float(row[column])) if row[column] else "" for column, (_, form) in COLUMNS.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1]))
