"""What the five scripts share is the same to the letter, and what differs is the algorithm."""

import ast
import difflib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GORL, SCRIPTS, name_of

import dppo
import fpo
import gorl_diff_ppo
import gorl_fm_ppo
import ppo_gaussian

ROOT = Path(ppo_gaussian.__file__).parent
BLOCKS = {
    "argument checks, environment, statistics, networks",
    "rollout, advantages, update, evaluation",
    "run directory, main",
}
# Definitions that may differ between two scripts that both have them: the policy, its loss, their arguments.
POLICY = {"Args", "init_agent", "act", "loss_fn"}
DECODERS = {"Args", "check", "init_agent", "decode", "decoder_loss"}
STAGES = {"CPU_PRESET", "TABLES", "Agent", "TrainState", "begin", "iteration", "train", "check", "parse_args"}


def text(script):
    return Path(script.__file__).read_text()


def blocks(script):
    found = re.findall(r"# --- shared: (.+?) ---\n(.*?)# --- end shared ---", text(script), re.DOTALL)
    assert len(found) == text(script).count("# --- shared: ") == text(script).count("# --- end shared")
    return dict(found)


def definitions(script):
    """Source of every top-level definition by name, and the imports as one."""
    source, found = text(script), {}
    for node in ast.parse(source).body[1:]:
        names = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        name = getattr(node, "name", None) or (names[0] if names else "other")
        decorators = "".join(ast.unparse(d) for d in getattr(node, "decorator_list", []))
        found[name] = found.get(name, "") + decorators + ast.get_source_segment(source, node)
    return found


@pytest.mark.parametrize("script", SCRIPTS[1:], ids=name_of)
def test_shared_blocks(script):
    """Otherwise a fix reaches some of the methods, and their comparison is no longer fair."""
    want = blocks(gorl_fm_ppo)
    assert set(want) == BLOCKS == set(blocks(script))
    for name, block in blocks(script).items():
        difference = difflib.unified_diff(want[name].splitlines(), block.splitlines(), lineterm="")
        assert block == want[name], f"{name}: " + "\n".join(difference)


@pytest.mark.parametrize(
    ("a", "b", "may_differ"),
    [
        (ppo_gaussian, fpo, POLICY | {"check"}),
        (ppo_gaussian, dppo, POLICY | {"check"}),
        (fpo, dppo, POLICY | {"check"}),
        (gorl_fm_ppo, gorl_diff_ppo, DECODERS),
        (ppo_gaussian, gorl_fm_ppo, POLICY | STAGES),
    ],
    ids=lambda x: x.__name__ if hasattr(x, "__name__") else "",
)
def test_a_diff_shows_the_algorithm(a, b, may_differ):
    """Otherwise scripts differ in more than their methods, and `diff` hides what matters."""
    a, b = definitions(a), definitions(b)
    both = (set(a) & set(b)) - {"other"}
    assert {name for name in both if a[name] != b[name]} == may_differ


def test_differences_are_small():
    """Otherwise the paper's contribution is no longer read off `diff ppo_gaussian.py gorl_fm_ppo.py`."""

    def lines(a, b):
        difference = difflib.unified_diff(text(a).splitlines(), text(b).splitlines(), n=0, lineterm="")
        return sum(line[0] in "+-" for line in difference) - 2

    assert lines(gorl_fm_ppo, gorl_diff_ppo) < 60
    assert lines(ppo_gaussian, fpo) < 150 and lines(ppo_gaussian, dppo) < 150
    assert lines(ppo_gaussian, gorl_fm_ppo) < 350


def test_readers_can_rely_on_the_size(script):
    """Otherwise a script is no longer read in one go."""
    lines = text(script).splitlines()
    assert len(lines) <= 700 and max(map(len, lines)) <= 110


def test_scripts_stand_alone(script):
    """Otherwise a reader of one file does not see the whole truth, or a stranger's checkpoint runs code."""
    own = {s.__name__ for s in SCRIPTS} | {"tests", "benchmark", "plotting"}
    imported = set()
    for node in ast.walk(ast.parse(text(script))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert not imported & (own | {"pickle", "cloudpickle", "dill"})
    assert "allow_pickle=True" not in text(script)


def test_common_arguments(script):
    """Otherwise a command line for one method does not fit another, or defaults drift apart."""
    fields, want = script.Args.__dataclass_fields__, ppo_gaussian.Args.__dataclass_fields__
    assert set(want) <= set(fields)
    differs = {name for name in want if fields[name].default != want[name].default}
    gorl = {"exp_name", "clip_eps", "max_grad_norm"}
    generative = {"exp_name", "clip_eps", "learning_rate", "ent_coef"}
    assert differs == (set() if script is ppo_gaussian else gorl if script in GORL else generative)


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_lint(command):
    """Otherwise the code drifts from the style that its readers expect."""
    ruff = [sys.executable, "-m", "ruff", *command.split(), str(ROOT)]
    done = subprocess.run(ruff, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_lists_of_scripts_are_complete():
    """Otherwise a sixth script escapes every test in this file."""
    assert {s.__file__ for s in SCRIPTS} == {str(path) for path in ROOT.glob("*.py")}
    assert gorl_diff_ppo in GORL
