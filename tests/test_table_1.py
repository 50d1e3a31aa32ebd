"""The plan of Table 1 by its command line, on a point mass: cells run, stop, go on, are skipped,
refused.
"""

import csv
import fcntl
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ended

import gorl_fm_ppo

HERE = Path(__file__).parent
SCRIPT = HERE.parent / "benchmark/table_1.py"
TINY = (
    "--preset cpu --num-envs 32 --batch-size 4 --num-minibatches 8 --unroll-length 10 "
    "--update-epochs 16 --eval-every 1280 --eval-envs 4 --episode-length 50 --gamma 0.9 "
    "--total-timesteps 3200"
).split()
TWO = "--tasks FishSwim --methods ppo_gaussian fpo --num-seeds 2".split()


def start(cwd, *arguments, tiny=TINY):
    """table_1.py in a folder, with the point mass in Playground's place."""
    environment = os.environ | {"PYTHONPATH": str(HERE / "fake_playground")}
    # Files, since a pipe that nobody reads fills up.
    files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
    command = [sys.executable, str(SCRIPT), *map(str, arguments), "--", *map(str, tiny)]
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=files[0], stderr=files[1])
    process.files = files
    return process


def run(cwd, *arguments, **how):
    process = start(cwd, *arguments, **how)
    _, process.out, process.err = ended(process, 600)
    return process


def last_steps(cwd):
    """By script: the last evaluation of each seed, of its only run."""
    found = {}
    for folder in (cwd / "runs/table_1/FishSwim").iterdir():
        (file,) = folder.glob("*/eval.csv")
        with file.open() as rows:
            found[folder.name] = {row["seed"]: int(row["step"]) for row in csv.DictReader(rows)}
    return found


def test_the_plan_of_all_cells(tmp_path):
    """Otherwise a cell of the paper's table is never run, or a plan runs something."""
    done = run(tmp_path, "--dry-run", tiny=())
    rows = done.out.splitlines()
    assert done.returncode == 0, done.err
    assert rows[-1] == "30 to start" and not list(tmp_path.iterdir())
    assert [row.split()[:2] for row in rows[:-1]] == [[str(i), "start"] for i in range(30)]
    assert len({row.split("python ")[1] for row in rows[:-1]}) == 30
    assert "python gorl_fm_ppo.py --env-id HopperStand --num-seeds 5 --runs-dir" in rows[0]


def test_cells_are_stopped_gone_on_with_and_skipped(tmp_path):
    """Otherwise a table that is interrupted starts anew, or runs a cell twice or never."""
    process = start(tmp_path, *TWO)
    folder = tmp_path / "runs/table_1/FishSwim/ppo_gaussian"
    while process.poll() is None and not list(folder.glob("*/train.csv")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    *_, err = ended(process)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert not (folder.parent / "fpo").exists()
    done = run(tmp_path, *TWO)
    assert "0  go on" in done.out and "1  start" in done.out
    assert "1 to go on, 1 to start" in done.out
    assert "python ppo_gaussian.py --resume runs/table_1/FishSwim/ppo_gaussian/" in done.out
    assert done.returncode == 0, done.err
    want = {"1": 3200, "2": 3200}
    assert last_steps(tmp_path) == {"ppo_gaussian": want, "fpo": want}
    again = run(tmp_path, *TWO)
    assert again.returncode == 0 and again.out.splitlines()[-1] == "2 finished"


def test_a_run_of_other_arguments(tmp_path, monkeypatch):
    """Otherwise a cell goes on with a run of other sizes, or refuses its own."""
    folder = tmp_path / "runs/table_1/FishSwim/gorl_fm_ppo"
    tiny = [*TINY, "--decoder-batch-size", "16"]
    line = ["--env-id", "FishSwim", "--num-seeds", "2", *tiny, "--runs-dir", str(folder)]
    monkeypatch.setattr(sys, "argv", ["gorl_fm_ppo.py", *line])
    made = gorl_fm_ppo.make_run_dir(gorl_fm_ppo.parse_args(), "toy")
    one = "--tasks FishSwim --methods gorl_fm_ppo --num-seeds 2 --dry-run".split()
    same = run(tmp_path, *one, tiny=[*tiny, "--track", "--wandb-entity", "me"])
    assert same.returncode == 0, same.err
    words = f"python gorl_fm_ppo.py --resume {made.relative_to(tmp_path)} --track"
    assert words in same.out and "--wandb-entity me" in same.out
    other = run(tmp_path, *one, tiny=[*tiny, "--gamma", "0.8"])
    assert other.returncode == 2 and "table_1.py: --gamma: got 0.8; takes that of" in other.err
    assert other.err.count("\n") == 1


def test_a_signal_while_a_script_is_starting(tmp_path):
    """Otherwise a task that is pre-empted early counts as failed, and is not queued again."""
    process = start(tmp_path, *TWO)
    folder = tmp_path / "runs/table_1/FishSwim/ppo_gaussian"
    while process.poll() is None and not (folder / "lock").exists():
        time.sleep(0.01)
    time.sleep(0.3)  # it imports JAX
    process.send_signal(signal.SIGTERM)
    *_, err = ended(process)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert not list(folder.glob("*/args.json")) and not (folder.parent / "fpo").exists()


@pytest.fixture
def main(tmp_path, monkeypatch):
    """main() in this process; cells only note that they were started, and have a given status."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    table_1 = importlib.import_module("table_1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table_1, "checked", lambda argv: None)  # nothing is there to go on with
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(statuses, *arguments):
        started = []

        def start(argv, *_):
            started.append(argv[0])
            return statuses[len(started) - 1]

        monkeypatch.setattr(table_1, "start", start)
        monkeypatch.setattr(sys, "argv", ["table_1.py", *arguments])
        return table_1.main(), started

    return call


def test_a_cell_that_fails(main, capsys):
    """Otherwise one bad cell stops the other 29, or nobody hears of it."""
    assert main([2, 0], *TWO) == (1, ["ppo_gaussian.py", "fpo.py"])
    assert "cell 0 failed with status 2; the others go on" in capsys.readouterr().err
    assert main([0, 0], *TWO) == (0, ["ppo_gaussian.py", "fpo.py"])
    assert main([143], *TWO) == (143, ["ppo_gaussian.py"])
    assert main([0], *TWO, "--cell", "1") == (0, ["fpo.py"])


def test_a_cell_that_another_process_works_on(main, tmp_path, capsys):
    """Otherwise two processes write into one run directory."""
    folder = tmp_path / "runs/table_1/FishSwim/ppo_gaussian"
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([0], *TWO) == (0, ["fpo.py"])
    assert "cell 0 is being worked on by another process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--cell 30", "--cell: got 30; takes a number from 0 to 29"),
        ("--tasks Hopper", "--tasks: got Hopper; takes some of HopperStand"),
        ("--methods ppo", "--methods: got ppo; takes some of gorl_fm_ppo"),
        ("--num-seeds 0", "--num-seeds: got 0; takes"),
    ],
)
def test_wrong_arguments(arguments, words, tmp_path):
    """Otherwise a mistake costs a queue's waiting time."""
    done = run(tmp_path, *arguments.split(), tiny=())
    assert done.returncode == 2 and words in done.err and done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
