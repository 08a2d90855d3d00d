"""The mistakes of benchmarks/bugs.py: patches fit, tests catch them, and docs/mistakes.md shows what they are."""

import ast
import doctest
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT, environment

sys.path.insert(0, str(ROOT / "benchmarks"))
import bugs

ENGLISH, CHINESE = ((ROOT / "docs" / f"mistakes{language}.md").read_text() for language in ("", ".zh-CN"))
BLOCK = r"(?ms)^```(\w+)\n(.*?)^```$"

each_bug = pytest.mark.parametrize("bug", bugs.BUGS, ids=lambda bug: bug.name)


@each_bug
def test_a_mistake_fits_its_script_and_compiles(bug):
    compile(bugs.patched(bug), bug.script, "exec")


@each_bug
def test_the_named_test_exists(bug):
    file, _, name = bug.test.partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert name.partition("[")[0] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_names_differ():
    assert len({bug.name for bug in bugs.BUGS}) == len(bugs.BUGS)


@pytest.mark.parametrize("old", ["no such text", "import"])
def test_a_mistake_that_no_longer_fits_is_named(old):
    with pytest.raises(ValueError, match="broadcast no longer fits"):
        bugs.patched(replace(bugs.BUGS[0], old=old))


def test_beside_each_result_stands_the_one_without_the_mistake():
    trained = [bug for bug in bugs.BUGS if bug.run is not None and bugs.results(bug, broken=True)]
    assert trained
    for bug in trained:
        assert bugs.results(bug, broken=True).keys() <= bugs.results(bug, broken=False).keys()


def test_every_mistake_is_caught_by_its_test():
    """A process of its own, since it swaps the modules of scripts. Without a mistake, these tests are in this suite."""
    command = [sys.executable, ROOT / "benchmarks" / "bugs.py", "--tests", "--no-control"]
    env = {**environment(), "CI": "true"}  # as on a build server, where whole differences would be worked out
    del env["PYTHONDONTWRITEBYTECODE"]  # or pytest would compile the tests again for each mistake
    done = subprocess.run(command, capture_output=True, text=True, timeout=3_600, env=env)
    caught = set(re.findall(r"(?m)^(\S+) .*\n +caught: ", done.stdout))
    assert caught == {bug.name for bug in bugs.BUGS}, done.stdout + done.stderr
    assert done.returncode == 0


NO_MISTAKES = """
import sys
from dataclasses import replace
sys.path[:0] = sys.argv[1:]
import bugs
bug = bugs.BUGS[0]
harmless, broken = replace(bug, new=bug.old), replace(bug, new="raise NameError")
print([bugs.check([one]) for one in (bug, harmless, broken)])
"""


def test_what_is_harmless_or_cannot_run_is_not_taken_for_caught():
    folders = [ROOT, ROOT / "tests", ROOT / "benchmarks"]
    command = [sys.executable, "-c", NO_MISTAKES, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment())
    assert done.stdout.endswith("[True, False, False]\n"), done.stdout + done.stderr


def test_a_mistake_and_its_script_are_trained_once_per_seed_and_their_curves_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(bugs, "OUT", tmp_path)
    ratio = next(bug for bug in bugs.BUGS if bug.name == "ratio-always-1")
    ratio = replace(ratio, run="--total-timesteps 3000 --num-envs 8 --final-eval-episodes 2")
    monkeypatch.setattr(bugs, "BUGS", [ratio])
    monkeypatch.setitem(sys.modules, "ppo_cartpole", None)  # for monkeypatch to undo what bugs.load does
    bugs.run_seeds([ratio], [1])
    before = (tmp_path / "curves.csv").read_text()
    bugs.run_seeds([ratio], [1])
    assert (tmp_path / "curves.csv").read_text() == before
    assert [row["bug"] for row in bugs.known_rows()] == ["", "ratio-always-1"]
    clipped = {name: [] for name in ("", "ratio-always-1")}
    for row in bugs.known_rows("curves.csv"):
        if row["metric"] == "clip_fraction":
            clipped[row["bug"]].append(float(row["value"]))
    assert max(clipped[""]) > 0 and set(clipped["ratio-always-1"]) == {0.0}
    bugs.draw("ratio", tmp_path)
    assert (tmp_path / "mistake_ratio.png").stat().st_size > 10_000


# --- docs/mistakes.md ---

each_page = pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["en", "zh"])


def rows(page):
    """Return the cells of each line of its table, header aside."""
    return [line[2:-2].split(" | ") for line in re.findall(r"(?m)^\|.*\|$", page)[2:]]


def sections(page):
    """Return (diff blocks, prose without code and targets of links) of each section."""
    texts = re.sub(r"(?m)^\|.*\n", "", page).split("\n## ")
    prose = [re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", re.sub(BLOCK, "", text)) for text in texts]
    blocks = [[body for kind, body in re.findall(BLOCK, text) if kind == "diff"] for text in texts]
    return list(zip(blocks, prose, strict=True))


def numbers(text):
    return re.findall(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?", text)


def bare(text):
    """Return a script without indentation and comments at the ends of lines."""
    return "\n".join(line.partition("  # ")[0].strip() for line in text.splitlines())


def bugs_of(block):
    """Return the mistakes whose patch is this diff block: `-` is wrong, `+` is in the script."""
    right, wrong = (
        bare("\n".join(line[1:] for line in block.splitlines() if line[0] in signs)) for signs in (" +", " -")
    )
    scripts = {bug.script: bare((ROOT / bug.script).read_text()) for bug in bugs.BUGS}
    return [
        bug
        for bug in bugs.BUGS
        if scripts[bug.script].count(right) == 1
        and scripts[bug.script].replace(right, wrong) == bare(bugs.patched(bug))
    ]


def test_the_page_shows_the_table_of_the_raw_data():
    assert bugs.table() in ENGLISH


def test_the_chinese_table_differs_in_the_words_for_the_mistakes_alone():
    english, chinese = rows(ENGLISH), rows(CHINESE)
    assert [[script, *rest] for script, _, *rest in english] == [[script, *rest] for script, _, *rest in chinese]
    for (_, ours, *_), (_, theirs, *_) in zip(english, chinese, strict=True):
        for pattern in (r"https?://[^)]+", r"`[^`]+`"):
            assert re.findall(pattern, ours) == re.findall(pattern, theirs)


@each_page
def test_the_page_counts_the_mistakes(page):
    patches = {(bug.script, bug.old, bug.new) for bug in bugs.BUGS}  # two are shown with other flags as well
    assert f" {len(patches)} " in page.replace("\n", " ").partition("## 1.")[0] and len(rows(page)) == len(bugs.BUGS)


@each_page
def test_what_a_section_shows_is_a_patch_and_its_figures_are_those_of_the_raw_data(page):
    known = {number for bug in bugs.BUGS for cell in bugs.cells(bug) for number in numbers(cell)}
    shown = []
    for blocks, prose in sections(page):
        assert {number for number in numbers(prose) if "." in number} <= known
        for block in blocks:
            found = bugs_of(block)
            assert found, block
            assert all(cell in prose.replace("\n", " ") for bug in found for cell in bugs.cells(bug)), found
            shown += [bug.name for bug in found]
    assert len(shown) == len(set(shown)) >= 6


def test_both_languages_show_the_same_code_numbers_and_links():
    assert re.findall(BLOCK, ENGLISH) == re.findall(BLOCK, CHINESE)
    english, chinese = sections(ENGLISH), sections(CHINESE)
    for (_, ours), (_, theirs) in zip(english, chinese, strict=True):
        assert sorted(numbers(ours)) == sorted(numbers(theirs))
    links = [re.findall(r"\]\((\.\.[^)]+|tour)", page) for page in (ENGLISH, CHINESE)]
    assert links[0] == links[1]


@each_page
def test_the_pictures_of_the_page_have_a_curve_per_seed_with_the_mistake_and_without(page):
    assert re.findall(r"\]\(mistake_(\w+)\.png\)", page) == list(bugs.PICTURES)
    by_name, rows = {bug.name: bug for bug in bugs.BUGS}, bugs.known_rows("curves.csv")
    for name, metric in (panel for panels in bugs.PICTURES.values() for panel in panels):
        for broken in (False, True):
            key = bugs.key_of(by_name[name], broken) | {"metric": metric}
            seeds = {row["seed"] for row in rows if key.items() <= row.items()}
            assert seeds == bugs.results(by_name[name], broken).keys() and len(seeds) == 3


@each_page
def test_links_of_the_page_lead_to_files_and_tests(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target
    for name, file in re.findall(r"\[`(test_\w+)`\]\(\.\./(tests/\w+\.py)\)", page):
        assert f"\ndef {name}(" in (ROOT / file).read_text(), name


def test_what_python_says_is_what_the_page_says():
    blocks = [body for kind, body in re.findall(BLOCK, ENGLISH) if kind == "python"]
    assert len(blocks) == 3
    for block in blocks:
        test = doctest.DocTestParser().get_doctest(block, {}, "mistakes.md", None, None)
        assert test.examples and doctest.DocTestRunner().run(test).failed == 0
