"""Show what each script adds to dqn_cartpole.py.

    python benchmarks/differences.py

Prints and writes docs/differences.md: by section the difference of the algorithm, which is what stands above the
divider without metadata, docstring and imports.
"""

import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST = "dqn_cartpole"
OTHERS = ("dqn_vecenv", "dqn_lstm_cartpole", "dqn_atari", "ppo_cartpole")
CONTEXT = 2  # lines that are the same, shown around each difference


def sections(name: str) -> dict[str, list[str]]:
    """Return {section: its lines} of a script's algorithm, without the banners and the empty lines around."""
    algorithm, _, _ = (ROOT / f"{name}.py").read_text().partition("\n# " + "#" * 118 + "\n")
    _, *parts = re.split(r"(?m)^# === (.+?) =+$", algorithm)
    return {title: text.strip("\n").splitlines() for title, text in zip(parts[::2], parts[1::2], strict=True)}


def pairs(name: str) -> list[tuple]:
    """Return (section, the lines of FIRST, the lines of this script) in their order; a rollout is a replay memory."""
    ours, theirs = sections(FIRST), sections(name)
    titles = [own if own == other else f"{own} and {other}" for own, other in zip(ours, theirs, strict=True)]
    return list(zip(titles, ours.values(), theirs.values(), strict=True))


class Matcher(difflib.SequenceMatcher):
    """Lines without a word, between two changes, do not count as the same: two unlike functions stay apart."""

    def __init__(self, old: list[str], new: list[str]):
        super().__init__(None, old, new, autojunk=False)  # which would take frequent lines for noise

    def get_opcodes(self) -> list[tuple]:
        merged = []
        for tag, i1, i2, j1, j2 in super().get_opcodes():
            wordless = not re.search(r"\w", "".join(self.a[i1:i2])) and i1 > 0 and i2 < len(self.a)
            change = tag != "equal" or wordless
            if change and merged and merged[-1][0] == "replace":
                _, i1, _, j1, _ = merged.pop()
            merged.append(("replace" if change else "equal", i1, i2, j1, j2))
        return merged


def sizes(name: str) -> dict[str, int]:
    """Count the lines of a script's algorithm, and those it shares with FIRST, adds to it and removes from it."""
    counts = {"lines": 0, "shared": 0, "added": 0, "removed": 0}
    for _, old, new in pairs(name):
        shared = sum(i2 - i1 for tag, i1, i2, *_ in Matcher(old, new).get_opcodes() if tag == "equal")
        part = {"lines": len(new), "shared": shared, "added": len(new) - shared, "removed": len(old) - shared}
        counts = {key: count + part[key] for key, count in counts.items()}
    return counts


def enclosing(lines: list[str], index: int) -> str:
    """Name the function or class that a line belongs to; "" where it stands in none."""
    indents = [len(line) - len(line.lstrip()) for line in lines[: index + 1] if line.strip()]
    indent, found = indents[-1] + 1 if indents else 0, []
    for line in reversed(lines[: index + 1]):
        definition = re.match(r"( *)(?:class|def) (\w+)", line)
        if definition and len(definition[1]) < indent:
            found.insert(0, definition[2])
            indent = len(definition[1])
    return ".".join(found)


def diff(old: list[str], new: list[str]) -> str:
    """Return a unified diff whose hunks are named after the function or class that they stand in."""
    lines = []
    for group in Matcher(old, new).get_grouped_opcodes(CONTEXT):
        changes = [change for tag, *change in group if tag != "equal"]
        places = [(new, j) for _, _, j1, j2 in changes for j in range(j1, j2) if new[j]]
        places += [(old, i) for i1, i2, _, _ in changes for i in range(i1, i2) if old[i]]
        lines.append(f"@@ {enclosing(*places[0]) if places else ''} @@")
        for tag, i1, i2, j1, j2 in group:
            if tag == "equal":
                lines += [" " + line for line in old[i1:i2]]
            else:
                lines += ["-" + line for line in old[i1:i2]] + ["+" + line for line in new[j1:j2]]
    return "\n".join(line.rstrip() for line in lines)


def table() -> str:
    """Return a Markdown table: how much of each script's algorithm is that of dqn_cartpole.py."""
    lines = ["| algorithm of | lines | shared with `dqn_cartpole.py` | added | removed |", "|---|---:|---:|---:|---:|"]
    lines.append(f"| [`{FIRST}.py`]({FIRST}.py) | {sizes(FIRST)['lines']} | | | |")
    for name in OTHERS:
        lines.append(f"| [`{name}.py`]({name}.py) | " + " | ".join(map(str, sizes(name).values())) + " |")
    return "\n".join(lines)


def page() -> str:
    """Return docs/differences.md."""
    parts = [
        "# What each script adds to dqn_cartpole.py",
        "Written by `python benchmarks/differences.py`; do not edit. Compared is the algorithm: what stands above the "
        "divider, without metadata, docstring and imports. Below the divider all scripts are the same.",
        table().replace("](", "](../"),
    ]
    for name in OTHERS:
        parts.append(f"## {name}.py")
        for title, old, new in pairs(name):
            parts.append(f"### {title}")
            parts.append("The same." if old == new else f"```diff\n{diff(old, new)}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
    (ROOT / "docs" / "differences.md").write_text(page())
