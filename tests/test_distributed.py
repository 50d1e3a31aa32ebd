"""Runs of several processes, over loopback: --distributed as a user gives it, on a point mass."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ended, processes

TOY = Path(__file__).parent / "toy.py", "gorl_fm_ppo"
TINY = (
    "--num-envs 4 --unroll-length 5 --batch-size 4 --num-minibatches 2 --update-epochs 2 --eval-envs 4 "
    "--episode-length 20 --eval-every 80 --decoder-epochs 2 --decoder-batch-size 16 --decoder-buffer-size 80 "
    "--num-seeds 2 --checkpoint-minutes 0.02"
).split()
STAGES = "--stage-timesteps", "8000", "40"


def start(count, *arguments):
    return processes(count, *TOY, *arguments, flag=["--distributed"])


def training(runs_dir, rows=8):
    """The run's directory, once that many iterations are done."""
    until = time.time() + 120
    while time.time() < until:
        for file in runs_dir.glob("*/train.csv"):
            if file.read_text().count("\n") > 2 * rows:
                return file.parent
        time.sleep(0.1)
    raise TimeoutError(runs_dir)


def table(run_dir, name="eval"):
    return np.genfromtxt(run_dir / f"{name}.csv", delimiter=",", names=True)


def test_killed_with_two_processes_resumed_with_four_and_one(tmp_path):
    """Otherwise a host that fails leaves the others waiting, or the run bound to the number it began with."""
    started = start(2, *TINY, *STAGES, "--runs-dir", tmp_path)
    run_dir = training(tmp_path)
    started[1].kill()
    killed = time.time()
    status, out, err = ended(started[0])
    assert status != 0 and time.time() - killed < 60
    assert f"--resume {run_dir} --distributed localhost:" in err and "state_" in err
    rows = len(table(run_dir, "train"))
    # Another number of processes, and a second stage soon.
    shorter = "--stage-timesteps", "8000", "80"
    started = start(4, "--resume", run_dir, *shorter)
    time.sleep(1)
    until = time.time() + 120
    while len(table(run_dir, "train")) < rows + 40 and time.time() < until:
        time.sleep(0.2)
    started[2].send_signal(signal.SIGTERM)  # to one of them only
    results = [ended(process) for process in started]
    assert [status for status, *_ in results] == [128 + signal.SIGTERM] * 4
    assert "stopped by SIGTERM; go on with: " in results[0][1] and "--distributed" in results[0][1]
    assert len(table(run_dir, "train")) >= rows + 40
    for _, out, _ in results[1:]:  # JAX's CPU collectives announce themselves
        assert not [line for line in out.splitlines() if line and "Gloo" not in line]


def test_a_first_process_that_dies(tmp_path):
    """Otherwise the others wait for the one that coordinates them."""
    started = start(2, *TINY, *STAGES, "--runs-dir", tmp_path)
    training(tmp_path)
    started[0].kill()
    killed = time.time()
    status, _, err = ended(started[1])
    assert status != 0 and time.time() - killed < 60 and "another task died" in err


def test_two_processes_train_as_one(tmp_path):
    """Otherwise a run over several hosts, through a refinement, is another experiment, or its files are."""
    stages = "--stage-timesteps", "80", "40"
    started = start(2, *TINY, *stages, "--runs-dir", tmp_path / "two")
    results = [ended(process) for process in started]
    assert [status for status, *_ in results] == [0, 0] and "finished" in results[0][1]
    (alone,) = processes(1, *TOY, *TINY, *stages, "--runs-dir", tmp_path / "one", flag=["--distributed"])
    assert ended(alone)[0] == 0
    two, one = (next((tmp_path / name).iterdir()) for name in ("two", "one"))
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert len(list((tmp_path / "two").iterdir())) == 1
    for name in ("eval", "train", "decoder", "refine"):
        a, b = table(two, name), table(one, name)
        columns = [c for c in a.dtype.names if not re.search("time|sps", c)]
        assert len(columns) > 3 and len(a) == len(b) > 0
        for column in columns:
            np.testing.assert_allclose(a[column], b[column], rtol=0.02, atol=1e-3, err_msg=f"{name} {column}")
    policies = [np.load(run_dir / "checkpoints" / "policy_120.npz") for run_dir in (two, one)]
    assert policies[0].files == policies[1].files
    for name in set(policies[0].files) - {"meta"}:
        np.testing.assert_allclose(policies[0][name], policies[1][name], rtol=0.02, atol=2e-3, err_msg=name)


def test_a_first_process_that_cannot_write(tmp_path):
    """Otherwise the others wait for the one whose disk is full for ever, and bill for their GPUs."""
    started = start(2, *TINY, *STAGES, "--runs-dir", tmp_path)
    run_dir = training(tmp_path)
    (run_dir / "checkpoints").rename(run_dir / "gone")
    failed = time.time()
    results = [ended(process) for process in started]
    assert all(status != 0 for status, *_ in results) and time.time() - failed < 70
    assert "No such file" in results[0][2] and "--resume" in results[0][2]


def test_processes_with_other_arguments(tmp_path):
    """Otherwise two halves of two experiments are trained as one."""
    seeds, arguments = (["--seed", "12"], ["--seed", "21"]), [*TINY, *STAGES, "--runs-dir", tmp_path]
    started = processes(2, *TOY, *arguments, flag=["--distributed"], each=seeds)
    for status, _, err in map(ended, started):
        assert status != 0 and "arguments or checkpoints differ" in err
    assert not list(tmp_path.glob("*/train.csv"))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ([], "coordinator_address should be defined"),
        (["localhost:1", "2", "2"], "process_id and num_processes must be nonnegative"),
        (["localhost", "2", "0"], "list index out of range"),
        (["localhost:1", "two", "0"], "invalid literal for int()"),
    ],
)
def test_wrong_addresses(tmp_path, where, message):
    """Otherwise a user sees a traceback of JAX, or N processes train N runs."""
    line = [sys.executable, *TOY, *TINY, "--runs-dir", tmp_path / "runs", "--distributed", *where]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"--distributed: got {' '.join(where)}" in done.stderr and message in done.stderr
    assert "HOST:PORT NUMBER ID" in done.stderr and not (tmp_path / "runs").exists()
