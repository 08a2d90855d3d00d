"""The gallery of mistakes in benchmarks/bugs.py: every patch fits the scripts as they are, and its test catches it."""

import ast
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT, environment

sys.path.insert(0, str(ROOT / "benchmarks"))
import bugs

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
    """A process of its own, since it swaps the modules of scripts."""
    command = [sys.executable, ROOT / "benchmarks" / "bugs.py", "--tests"]
    env = {**environment(), "CI": "true"}  # as on a build server, where whole differences would be worked out
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert "without a mistake: passed" in done.stdout, done.stdout + done.stderr
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())
    assert done.stdout.endswith("[True, False, False]\n"), done.stdout + done.stderr
