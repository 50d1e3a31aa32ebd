"""Runs that are killed, stopped, starved of disk or damaged, by command line on a point mass.

PYTHONPATH=. python tests/test_faults.py 100 kills.json: a longer campaign of kills than the tests'.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import (
    HERE,
    TABLES,
    Process,
    few_steps,
    one_line,
    run,
    same_run,
    size,
    states,
    table,
    toy,
)
from conftest import GORL, SCRIPTS, name_of
from toy import PointMass

import gorl_fm_ppo
import ppo_gaussian

# Iterations of 40 steps, an evaluation after every third, a checkpoint after about each.
COMMON = (
    "--num-envs 4 --batch-size 4 --num-minibatches 2 --unroll-length 5 --update-epochs 2 "
    "--num-seeds 2 --total-timesteps 960 --eval-every 120 --eval-envs 4 --episode-length 20 "
    "--checkpoint-minutes 0.0005"
).split()
STAGES = (
    "--stage-timesteps 320 320 160 160 --decoder-epochs 20 --decoder-buffer-size 120 "
    "--decoder-batch-size 16"
).split()
TWO = [gorl_fm_ppo, ppo_gaussian]  # other loops are those of one of these, by test_shared.py


def tiny(script, *arguments):
    """The command of a short run."""
    stages = STAGES if script in GORL else []
    return toy(script, *COMMON, *stages, *few_steps(script), *arguments)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """The directories of undisturbed runs, made as they are asked for."""
    made = {}

    def get(script):
        if script not in made:
            folder = tmp_path_factory.mktemp("reference")
            done = run(tiny(script, "--runs-dir", folder))
            assert done.returncode == 0, done.stderr
            made[script] = next(folder.iterdir())
        return made[script]

    return get


# --- kills ---
PHASES = ("iteration", "evaluation", "checkpoint", "start")
FILES = {"decoder": "decoder.csv", "checkpoint": "checkpoints/unfinished.tmp"}


def is_evaluated(run_dir):
    """Whether the last row of train.csv is of a step after which an evaluation follows."""
    row = (run_dir / "train.csv").read_text().splitlines()[-1].split(",")
    return len(row) > 1 and row[1].isdigit() and int(row[1]) % 120 == 0


def wait_for(phase, process, folder, rng):
    """Waits until a run in `folder` is in a phase of its work; False if it ends before."""
    if phase == "start":
        time.sleep(rng.uniform(0, 4))
        return process.poll() is None
    while process.poll() is None and not list(folder.glob("*/args.json")):
        time.sleep(0.01)
    if process.poll() is not None:
        return False
    run_dir = next(folder.glob("*/args.json")).parent
    path = run_dir / FILES.get(phase, "train.csv")
    events = rng.integers(2, 5)  # times that the file changes
    seen = size(path)
    while process.poll() is None:
        time.sleep(0.0003)
        now = size(path)
        if now == seen:
            continue
        seen = now
        if now == 0:  # a finished checkpoint has another name
            continue
        events -= 1
        if events > 0:
            continue
        if phase == "evaluation" and not is_evaluated(run_dir):
            continue
        time.sleep(rng.uniform(0, 0.002 if phase == "checkpoint" else 0.01))
        return process.poll() is None
    return False


def tear(run_dir):
    """As if killed in the middle of a row of each table."""
    for name in TABLES:
        path = run_dir / f"{name}.csv"
        if size(path):
            with path.open("a") as file:
                file.write("1,99")


def campaign(script, folder, phases, seed):
    """Kills runs in each of the phases in turn, then lets the last one end: directories, kills."""
    rng = np.random.default_rng(seed)
    kills = Counter()
    run_dirs = []
    todo = list(phases)
    command = None
    while todo or command:
        runs = folder / str(len(run_dirs))
        process = Process(*(command or tiny(script, "--runs-dir", runs)))
        if todo and wait_for(todo[0], process, runs, rng):
            process.kill()
        done = process.finish()
        found = [path.parent for path in runs.glob("*/args.json")]
        if done.returncode == 0:  # a phase that did not come is tried in another run
            assert "Finished" in done.stdout
            run_dirs += found
            command = None
            assert len(run_dirs) < 2 + len(phases)
            continue
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert done.stderr == ""
        phase = todo.pop(0)
        kills[phase] += 1
        if found:
            if phase == "start":
                tear(found[0])
            command = toy(script, "--resume", found[0])
        else:
            command = None
            shutil.rmtree(runs, ignore_errors=True)
            if not todo and not run_dirs:
                todo.append("start")  # one has to end
    return run_dirs, kills


@pytest.mark.parametrize("script", TWO, ids=name_of)
def test_killed_runs_end_as_if_they_had_not_been(script, references, tmp_path):
    """Otherwise a pre-empted run is not the run that its command line says."""
    phases = ["decoder", *PHASES] if script in GORL else PHASES
    run_dirs, kills = campaign(script, tmp_path, phases, seed=1)
    assert set(kills) == set(phases)
    assert run_dirs
    for run_dir in run_dirs:
        same_run(run_dir, references(script))


# --- signals ---
def test_ctrl_c_ends_at_once(tmp_path):
    """Otherwise a mistyped argument costs the time of an iteration until the prompt is back."""
    endless = "--update-epochs", 3_000_000, "--runs-dir", tmp_path
    process = Process(*tiny(ppo_gaussian, *endless))
    while process.poll() is None and not list(tmp_path.glob("*/checkpoints/state_*")):
        time.sleep(0.01)
    time.sleep(6)  # it is in its first iteration, or compiles that
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    done = process.finish()
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""
    (run_dir,) = tmp_path.iterdir()
    assert not table(run_dir, "train")
    assert f"--resume {run_dir}" in done.stdout


def stopped(name, number, script, *arguments):
    """What is left of a run that gets SIGTERM after so many rows of a table."""
    _, _, *rest = tiny(script, *arguments)
    done = run([sys.executable, HERE / "stopped.py", name, number, *rest])
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == ""


@pytest.mark.parametrize("script", TWO, ids=name_of)
def test_sigterm_makes_a_checkpoint(script, references, tmp_path):
    """Otherwise the end of a time slice costs the time since the last checkpoint."""
    stopped("train", 10, script, "--runs-dir", tmp_path, "--checkpoint-minutes", 60)
    (run_dir,) = tmp_path.iterdir()
    assert [int(row["step"]) for row in table(run_dir, "train")[::2]] == list(range(40, 401, 40))
    assert states(run_dir)[-1].stem.split("_")[1] == "000000010"
    if script is ppo_gaussian:
        assert run(toy(script, "--resume", run_dir)).returncode == 0
        same_run(run_dir, references(script))


def test_sigterm_in_a_refinement(references, tmp_path):
    """Otherwise a refinement goes on for minutes, until it is killed, or is resumed half done."""
    stopped("decoder", 3, gorl_fm_ppo, "--runs-dir", tmp_path)
    (run_dir,) = tmp_path.iterdir()
    assert [row["epoch"] for row in table(run_dir, "decoder")[::2]] == ["0", "1", "2"]
    assert states(run_dir)[-1].name == "state_000000008_00.npz"
    assert run(toy(gorl_fm_ppo, "--resume", run_dir)).returncode == 0
    same_run(run_dir, references(gorl_fm_ppo))


def test_one_seed_goes_on(tmp_path):
    """Otherwise the README's own command, which runs without `vmap`, does not resume exactly."""
    one = "--num-seeds", 1, "--runs-dir"
    assert run(tiny(gorl_fm_ppo, *one, tmp_path / "whole")).returncode == 0
    stopped("decoder", 3, gorl_fm_ppo, *one, tmp_path / "stopped")
    (whole,) = (tmp_path / "whole").iterdir()
    (run_dir,) = (tmp_path / "stopped").iterdir()
    assert run(toy(gorl_fm_ppo, "--resume", run_dir)).returncode == 0
    same_run(run_dir, whole)
    assert {row["seed"] for row in table(run_dir, "train")} == {"1"}


# --- disks and files ---
def test_full_disk(references, tmp_path):
    """Otherwise a full disk ends in a traceback, or costs the checkpoints that were there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, "size=16m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no permission to mount a file system")
    try:  # the third checkpoint does not fit, with two kept
        done = run(tiny(gorl_fm_ppo, "--runs-dir", disk / "runs"))
        (run_dir,) = (disk / "runs").iterdir()
        assert done.returncode == 1
        resume = f"--resume {run_dir}"
        one_line(done.stderr, "No space left", states(run_dir)[-1], resume)
        assert len(done.stderr.splitlines()) == 1
        subprocess.run([*mount, "remount,size=200m", disk], check=True)
        done = run(toy(gorl_fm_ppo, "--resume", run_dir))
        assert done.returncode == 0
        assert done.stderr == ""
        same_run(run_dir, references(gorl_fm_ppo))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_limit_on_files(references, tmp_path):
    """Otherwise the same where mounting is forbidden, from the first checkpoint on."""
    small_files = ["bash", "-c", 'ulimit -f 1000 && exec "$@"', "bash"]
    done = run([*small_files, *tiny(ppo_gaussian, "--runs-dir", tmp_path)])
    (run_dir,) = tmp_path.iterdir()
    assert done.returncode == 1
    one_line(done.stderr, "File too large", f"--resume {run_dir}")
    assert not states(run_dir)
    done = run(toy(ppo_gaussian, "--resume", run_dir))
    assert done.returncode == 0
    same_run(run_dir, references(ppo_gaussian))


def test_a_damaged_checkpoint(references, tmp_path):
    """Otherwise a run goes on from wrong numbers, or is lost with its newest file."""
    run_dir = shutil.copytree(references(gorl_fm_ppo), tmp_path / "run")
    old, new = states(run_dir)
    new.write_bytes(new.read_bytes()[:-5000])
    (run_dir / "notes.csv").write_text("mine\n" * 9999)
    done = run(toy(gorl_fm_ppo, "--resume", run_dir))
    assert done.returncode == 0
    assert str(new) in done.stderr
    assert str(old) not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert new.with_suffix(".bad").exists()
    assert (run_dir / "notes.csv").read_text() == "mine\n" * 9999
    same_run(run_dir, references(gorl_fm_ppo))


def load(script, run_dir, **changes):
    """What a script's own reading of a directory gives: state and progress."""
    args = script.replace(script.load_args(run_dir), **changes)
    stage = (0,) if script in GORL else ()
    init = jax.vmap(lambda key: script.init_state(args, PointMass(), key, *stage))
    like = jax.eval_shape(init, jnp.zeros((args.num_seeds, 2), jnp.uint32))
    return script.load_checkpoint(args, run_dir, like)


def contents(run_dir):
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def restore(before, run_dir):
    for path in contents(run_dir):
        path.unlink()
    for path, content in before.items():
        path.write_bytes(content)


def damaged(content, how, rng):
    at = int(rng.integers(len(content)))
    if how == "flipped":
        bit = 1 << int(rng.integers(8))
        return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
    if how == "truncated":
        return content[:at]
    if how == "zeros":
        return bytes(len(content))
    return b""


@pytest.mark.parametrize("script", TWO, ids=name_of)
def test_damaged_bytes(script, references, tmp_path, capsys):
    """Otherwise a bad disk changes weights, and nobody notices."""
    run_dir = shutil.copytree(references(script), tmp_path / "run")
    rng = np.random.default_rng(0)
    before = contents(run_dir)
    new = states(run_dir)[-1]
    good = before[new]
    want, right = load(script, run_dir)
    capsys.readouterr()
    outcomes = Counter()
    for how in ["flipped"] * 20 + ["truncated"] * 5 + ["empty", "zeros"]:
        new.write_bytes(damaged(good, how, rng))
        got, progress = load(script, run_dir)
        if new.exists():  # a byte that nothing is read from, such as a date
            outcomes["harmless"] += 1
            assert progress == right
            jax.tree.map(np.testing.assert_array_equal, got, want)
        else:
            outcomes["the one before"] += 1
            assert str(new) in capsys.readouterr().err
            assert progress["done"] < right["done"]
        restore(before, run_dir)
    assert outcomes["the one before"] > 20


@pytest.mark.parametrize("script", TWO, ids=name_of)
def test_checkpoints_of_other_runs(script, references, tmp_path, capsys):
    """Otherwise a run goes on with another method's, task's or seed's weights."""
    run_dir = shutil.copytree(references(script), tmp_path / "run")
    old, new = states(run_dir)
    other = TWO[1 - TWO.index(script)]
    shutil.copy(states(references(other))[-1], new)
    _, progress = load(script, run_dir)
    assert progress["done"] == int(old.stem.split("_")[1])
    assert str(new) in capsys.readouterr().err
    assert new.with_suffix(".bad").exists()
    before = contents(run_dir)
    for change in ({"env_id": "HopperHop"}, {"seed": 2}, {"num_seeds": 1}):
        with pytest.raises(SystemExit) as stopped:
            load(script, run_dir, **change)
        assert stopped.value.code == 2
        assert "--resume: got" in capsys.readouterr().err
        assert contents(run_dir) == before


def test_no_good_checkpoint(references, tmp_path):
    """Otherwise a run of days starts again, and its logs are gone."""
    run_dir = shutil.copytree(references(ppo_gaussian), tmp_path / "run")
    for path in states(run_dir):
        path.write_bytes(b"")
    before = contents(run_dir)
    done = run(toy(ppo_gaussian, "--resume", run_dir))
    assert done.returncode == 2
    one_line(done.stderr, "--resume", run_dir)
    assert contents(run_dir) == before


# --- numbers ---
@pytest.mark.parametrize(
    ("script", "argument", "where"),
    [
        (gorl_fm_ppo, "--learning-rate", "iteration 1"),
        (ppo_gaussian, "--learning-rate", "iteration 1"),
        (gorl_fm_ppo, "--decoder-learning-rate", "decoder 1, epoch 0"),
    ],
    ids=["gorl_fm_ppo", "ppo_gaussian", "decoder"],
)
def test_exploding_numbers(script, argument, where, tmp_path):
    """Otherwise a day of computing goes into NaN, and the last good weights are overwritten."""
    done = run(tiny(script, "--runs-dir", tmp_path, argument, "1e9"))
    assert done.returncode == 1
    (run_dir,) = tmp_path.iterdir()
    good = states(run_dir)[-1]
    one_line(done.stderr, "not finite", where, good)
    with np.load(good) as file:
        for name in file.files:
            if file[name].dtype.kind == "f":
                assert np.isfinite(file[name]).all()


# --- Weights & Biases ---
@pytest.fixture
def wandb_home(tmp_path):
    """An environment without a login and without a network."""
    pytest.importorskip("wandb")
    home = str(tmp_path / "home")
    nobody = {"HOME": home, "XDG_CACHE_HOME": home, "NETRC": f"{home}/netrc", "WANDB_API_KEY": ""}
    return nobody | {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_ERROR_REPORTING": "false"}


def test_tracking_offline(references, wandb_home, tmp_path):
    """Otherwise Weights & Biases needs a network, or nobody knows where the rows are."""
    command = tiny(gorl_fm_ppo, "--runs-dir", tmp_path / "runs", "--track")
    done = run(command, **wandb_home, WANDB_MODE="offline")
    assert done.returncode == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    (offline,) = run_dir.glob("wandb/offline-run-*")
    assert f"wandb sync {offline}" in done.stdout
    (file,) = offline.glob("run-*.wandb")
    assert size(file) > 20_000  # its rows
    same_run(run_dir, references(gorl_fm_ppo))


def test_tracking_without_a_login(wandb_home, tmp_path):
    """Otherwise a run that nobody can see goes on for a day, or ends in a traceback."""
    command = tiny(ppo_gaussian, "--runs-dir", tmp_path / "runs", "--track")
    done = run(command, **wandb_home, WANDB_MODE="online")
    assert done.returncode == 2
    one_line(done.stderr, "--track", "wandb login", "WANDB_MODE=offline")


# --- the campaign ---
def kill_campaign(kills, out):
    """A longer campaign than the tests', of all scripts. Raises if a run ends differently."""
    began = time.time()
    command = ["PYTHONPATH=.", "python", "tests/test_faults.py", *sys.argv[1:]]
    result = {"command": " ".join(command), "scripts": {}}
    share = kills // len(SCRIPTS)
    for script in SCRIPTS:
        folder = Path(tempfile.mkdtemp())
        done = run(tiny(script, "--runs-dir", folder / "reference"))
        assert done.returncode == 0, done.stderr
        (reference,) = (folder / "reference").iterdir()
        phases = ("decoder", *PHASES) if script in GORL else PHASES
        run_dirs, tried = campaign(script, folder / "killed", (phases * share)[:share], seed=0)
        for run_dir in run_dirs:
            same_run(run_dir, reference)
        found = {"kills": dict(tried), "runs": len(run_dirs), "survived": share}
        result["scripts"][script.__name__] = found
        print(script.__name__, json.dumps(found), flush=True)
        shutil.rmtree(folder)
    result["wall_seconds"] = round(time.time() - began)
    result["python"] = sys.version.split()[0]
    describe = ["git", "-C", HERE, "describe", "--always", "--dirty"]
    result["commit"] = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    result["jax"] = jax.__version__
    result["device"] = jax.devices()[0].device_kind
    Path(out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    kill_campaign(int(sys.argv[1]), sys.argv[2])
