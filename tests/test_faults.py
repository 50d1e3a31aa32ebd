"""Runs that are killed, stopped, starved of disk, damaged or cut off from the network; by command line."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GORL, SCRIPTS, name_of
from fake_wandb import FakeWandb
from toy import PointMass

import gorl_fm_ppo
import ppo_gaussian

TOY = str(Path(__file__).parent / "toy.py")
# Iterations of 40 steps, an evaluation every 4 of them; checkpoints whenever 30 ms have gone by, too.
COMMON = (
    "--num-envs 4 --batch-size 4 --num-minibatches 2 --unroll-length 5 --update-epochs 2 --num-seeds 2 "
    "--total-timesteps 1920 --eval-every 160 --eval-envs 4 --episode-length 20 --checkpoint-minutes 0.0005"
).split()
STAGES = (
    "--stage-timesteps 640 640 320 320 --decoder-epochs 8 --decoder-buffer-size 400 --decoder-batch-size 16"
).split()
TABLES = "eval", "train", "decoder", "refine"
TWO = [
    gorl_fm_ppo,
    ppo_gaussian,
]  # the others' loops are to the letter those of one of these (test_shared.py)
WANDB = {"WANDB_API_KEY": "a" * 40, "WANDB_ERROR_REPORTING": "false", "WANDB_MODE": "online"}


def command(script, *arguments):
    tiny = [] if "--resume" in arguments else [*COMMON, *(STAGES if script in GORL else [])]
    return [sys.executable, TOY, script.__name__, *tiny, *map(str, arguments)]


def start(script, *arguments, environment=(), prefix=()):
    """A process that writes into files: a pipe that nobody reads would stop it once it is full."""
    out, err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
    env, line = os.environ | dict(environment), [*prefix, *command(script, *arguments)]
    process = subprocess.Popen(line, env=env, stdout=out, stderr=err)
    process.files = out, err
    return process


def finish(process, timeout=300):
    try:
        process.wait(timeout)
    finally:
        process.kill()
    for file in process.files:
        file.seek(0)
    process.out, process.err = (file.read() for file in process.files)
    return process


def run(script, *arguments, **how):
    return finish(start(script, *arguments, **how))


def table(run_dir, name):
    if not (run_dir / f"{name}.csv").exists():
        return []
    with (run_dir / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if "time" not in k and "sps" not in k} for row in rows]


def same_run(run_dir, reference):
    """All tables but for the clock, and all policies, bit for bit."""
    for name in TABLES:
        assert table(run_dir, name) == table(reference, name)
    policies = sorted(path.name for path in reference.glob("checkpoints/policy_*.npz"))
    assert sorted(path.name for path in run_dir.glob("checkpoints/policy_*.npz")) == policies and policies
    for name in policies:
        with np.load(run_dir / "checkpoints" / name) as a, np.load(reference / "checkpoints" / name) as b:
            assert a.files == b.files and all((a[k] == b[k]).all() for k in a.files)


def states(run_dir):
    return sorted(run_dir.glob("checkpoints/state_*.npz"))


def size(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:  # the run renames it just now
        return 0


# --- kills ---


def wait_for(phase, process, runs, rng):
    """Waits until a process is in a phase of its work; False if it ends before."""
    if phase == "start":
        time.sleep(rng.uniform(0, 4))
        return process.poll() is None
    while process.poll() is None and not (found := list(runs.glob("*/args.json"))):
        time.sleep(0.01)
    if process.poll() is not None:
        return False
    run_dir, seen = found[0].parent, -1
    file = {"decoder": "decoder.csv", "checkpoint": "checkpoints/unfinished.tmp"}.get(phase, "train.csv")
    events = int(rng.integers(2, 5))  # the first event is the one that is there already
    while process.poll() is None:
        time.sleep(0.0003)
        now = size(run_dir / file)
        if now != seen and (phase != "checkpoint" or now):
            seen, events = now, events - 1
            if events <= 0 and (phase != "evaluation" or evaluates(run_dir)):
                time.sleep(rng.uniform(0, 0.002 if phase == "checkpoint" else 0.01))
                return process.poll() is None
    return False


def evaluates(run_dir):
    """Whether the last row of train.csv is of a step at which an evaluation is due."""
    row = ((run_dir / "train.csv").read_text().splitlines() or [""])[-1].split(",")
    return len(row) > 1 and row[1].isdigit() and int(row[1]) % 160 == 0


def campaign(script, runs, phases, seed):
    """Kills runs in each of the phases in turn, then lets them end: run directories, and kills by phase."""
    rng, kills, done, resume = np.random.default_rng(seed), Counter(), [], []
    todo = [*phases, None]  # the last one is not killed
    while todo:
        process = start(script, *(resume or ["--runs-dir", runs / str(len(done))]))
        if todo[0] and wait_for(todo[0], process, runs / str(len(done)), rng):
            process.send_signal(signal.SIGKILL)
        finish(process)
        assert process.returncode in (0, -signal.SIGKILL), process.err[-2000:]
        run_dirs = [path.parent for path in runs.glob(f"{len(done)}/*/args.json")]
        if process.returncode == 0:  # a run has ended; a phase that did not come is tried in another
            assert "finished" in process.out and len(done) < 2 + len(phases)
            done, resume, todo = done + run_dirs, [], todo if todo[0] else []
            continue
        phase = todo.pop(0)
        kills[phase] += 1
        resume = ["--resume", run_dirs[0]] if run_dirs else []
        for path in run_dirs[0].glob("*.csv") if run_dirs and phase == "start" else ():
            if size(path):
                with path.open("a") as file:
                    file.write("1,99")  # as if killed in the middle of a row
        if not run_dirs:
            shutil.rmtree(runs / str(len(done)), ignore_errors=True)
    return done, kills


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """An undisturbed run of each script."""
    runs = {script: tmp_path_factory.mktemp("reference") for script in SCRIPTS}

    def reference(script):
        done = run(script, "--runs-dir", runs[script])
        assert done.returncode == 0, done.err[-2000:]
        return script, next(runs[script].iterdir())

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(reference, SCRIPTS))


PHASES = "iteration", "evaluation", "checkpoint", "start"
# A run has about five minutes of start-ups in it, so 20 kills are those of two runs.
CAMPAIGNS = [(gorl_fm_ppo, ("decoder", *PHASES) * 2, seed) for seed in (1, 2)]
CAMPAIGNS += [(script, ("decoder",) * (script in GORL) + PHASES, 3) for script in SCRIPTS[1:]]


@pytest.fixture(scope="module")
def killed(tmp_path_factory, references):
    """All campaigns, two at a time: of each, the future of its run directory and its kills."""
    with ThreadPoolExecutor(2) as pool:
        yield [
            pool.submit(campaign, script, tmp_path_factory.mktemp("killed") / "runs", phases, seed)
            for script, phases, seed in CAMPAIGNS
        ]


@pytest.mark.parametrize("i", range(len(CAMPAIGNS)), ids=[f"{c[0].__name__}-{c[2]}" for c in CAMPAIGNS])
def test_killed_runs_end_as_if_they_had_not_been(killed, references, i):
    """Otherwise a pre-empted run is not the run that its command line says."""
    run_dirs, kills = killed[i].result()
    script, phases, _ = CAMPAIGNS[i]
    for run_dir in run_dirs:
        same_run(run_dir, references[script])
    assert kills == Counter(phases) and run_dirs


# --- signals ---


@pytest.mark.parametrize(
    ("script", "number", "file"),
    [*((s, signal.SIGTERM, "eval.csv") for s in SCRIPTS), (gorl_fm_ppo, signal.SIGINT, "decoder.csv")],
    ids=lambda x: getattr(x, "__name__", None) or getattr(x, "name", x),
)
def test_a_signal_stops_with_a_checkpoint(script, number, file, references, tmp_path):
    """Otherwise the end of a time slice costs what was done since the last evaluation, or looks a success."""
    process = start(script, "--runs-dir", tmp_path, "--checkpoint-minutes", "60", "--eval-every", "100000")
    while process.poll() is None and not [p for p in tmp_path.glob(f"*/{file}") if size(p)]:
        time.sleep(0.001)
    process.send_signal(number)
    finish(process)
    (run_dir,) = tmp_path.iterdir()
    assert process.returncode == 128 + number, process.err[-2000:]
    assert number.name in process.out and f"--resume {run_dir}" in process.out
    assert "another Ctrl-C" in process.err and "Traceback" not in process.err
    step, *refinement = map(int, states(run_dir)[-1].stem.split("_")[1:])
    assert step == int(table(run_dir, "train")[-1]["step"])
    if file == "decoder.csv":
        last = table(run_dir, "decoder")[-1]
        over = int(last["epoch"]) == 7  # the refinement was: the next stage has begun
        assert refinement == [int(last["stage"]) - 1 + over, 0 if over else int(last["epoch"]) + 1]
    if script not in TWO or (file == "eval.csv" and script in GORL):
        return
    before = {name: table(run_dir, name) for name in TABLES}
    done = run(script, "--resume", run_dir)
    assert done.returncode == 0, done.err[-2000:]
    assert all(table(run_dir, name)[: len(rows)] == rows for name, rows in before.items())
    assert table(run_dir, "train") == table(references[script], "train")
    assert table(run_dir, "decoder") == table(references[script], "decoder")


def test_a_second_signal_stops_at_once(tmp_path):
    """Otherwise a run that hangs in compiled code has to be hunted down, or schedulers' SIGTERMs end it."""
    process = start(ppo_gaussian, "--runs-dir", tmp_path, "--update-epochs", "5000000")  # hours an iteration
    while process.poll() is None and not [p for p in tmp_path.glob("*/eval.csv") if size(p)]:
        time.sleep(0.01)
    time.sleep(5)  # it is in its first iteration, or compiling that
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.time()
    finish(process, timeout=60)
    assert time.time() - began < 5 and process.returncode == 128 + signal.SIGINT


# --- disks and files ---


def one_line(process, *words):
    """Its error message: a line with all of the words, in which no traceback is."""
    lines = [line for line in process.err.splitlines() if ".py: " in line]
    assert "Traceback" not in process.err and len(lines) == 1, process.err[-2000:]
    assert all(word in lines[0] for word in words), lines[0]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB, and what makes it large enough; None where it cannot be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield None
    else:
        yield disk, ["mount", "-o", "remount,size=200m", str(disk)]
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(
    ("script", "kind"), [(gorl_fm_ppo, "mount"), (gorl_fm_ppo, "limit"), (ppo_gaussian, "mount")]
)
def test_full_disk(script, kind, small_disk, references, tmp_path):
    """Otherwise a full disk ends in a traceback, or costs the checkpoints that were there."""
    if kind == "mount" and small_disk:
        disk, enlarge = small_disk  # the third checkpoint does not fit, with two kept
        process = run(script, "--runs-dir", disk / "runs")
        (run_dir,) = (disk / "runs").iterdir()
    else:  # where mounting is forbidden, twice
        process = start(script, "--runs-dir", tmp_path / "runs")
        while process.poll() is None and not list(tmp_path.glob("runs/*/checkpoints/state_*")):
            time.sleep(0.001)
        process.kill()
        finish(process)
        (run_dir,), enlarge = (tmp_path / "runs").iterdir(), None
        # Of this process's files, none may get larger than 1 MB.
        limit = ["bash", "-c", 'ulimit -f 976 && exec "$@"', "bash"]
        process = run(script, "--resume", run_dir, prefix=limit)
    assert process.returncode == 1
    problem = "No space left" if kind == "mount" and small_disk else "File too large"
    one_line(process, problem, str(states(run_dir)[-1]), f"--resume {run_dir}")
    if enlarge:
        subprocess.run(enlarge, check=True)
    done = run(script, "--resume", run_dir)
    assert done.returncode == 0 and "damaged" not in done.err, done.err[-2000:]
    same_run(run_dir, references[script])


def test_a_terminal_that_is_gone(script, tmp_path):
    """Otherwise a run whose log cannot be written hangs for good at its end."""
    line = ["bash", "-c", '"$@" | head -c 1500', "bash", *command(script, "--runs-dir", tmp_path)]
    assert subprocess.run(line, capture_output=True, timeout=60).returncode == 0
    (run_dir,) = tmp_path.iterdir()
    assert states(run_dir)


def test_a_directory_that_cannot_be_written(references, tmp_path):
    """Otherwise that is a traceback, after everything was compiled."""
    run_dir = shutil.copytree(references[gorl_fm_ppo], tmp_path / "run")
    for path in [*states(run_dir), *run_dir.glob("*.csv")]:
        path.unlink()
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").write_text("not a directory")
    process = run(gorl_fm_ppo, "--resume", run_dir)
    assert process.returncode == 1
    one_line(process, "Not a directory", f"--resume {run_dir}")


@pytest.fixture
def interrupted(references, tmp_path):
    """A copy of a finished run."""
    run_dir = shutil.copytree(references[gorl_fm_ppo], tmp_path / "run")
    assert len(states(run_dir)) == 2
    return run_dir


def damage(path, how, rng):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: int(rng.integers(len(content)))]
    elif how == "empty":
        content = b""
    elif how == "zeros":
        content = bytes(len(content))
    else:
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def test_a_damaged_checkpoint(interrupted, references):
    """Otherwise a run goes on from wrong numbers, or is lost with its newest file."""
    old, new = states(interrupted)
    damage(new, "truncated", np.random.default_rng(0))
    done = run(gorl_fm_ppo, "--resume", interrupted)
    assert done.returncode == 0 and str(new) in done.err and "trying the one before" in done.err
    assert str(old) not in done.err
    same_run(interrupted, references[gorl_fm_ppo])


def restore(script, run_dir, references, env_id="HopperStand"):
    """What the script's own reading of a directory gives, or the error line with which it ends."""
    args = script.load_args(str(references[script]))
    begin = jax.vmap(partial(script.begin, args, PointMass()), in_axes=(0, None))
    like = jax.eval_shape(begin, jnp.zeros((2, 2), jnp.uint32), 0)
    return script.restore(run_dir, like, [f"{script.__name__}.py", env_id, args.seed, args.num_seeds])


def test_damaged_bytes(script, references, tmp_path, capsys):
    """Otherwise a bad disk changes weights, and nobody notices."""
    run_dir, rng = shutil.copytree(references[script], tmp_path / "run"), np.random.default_rng(0)
    new = states(run_dir)[-1]
    want, right = restore(script, run_dir, references)
    content, outcomes = new.read_bytes(), Counter()
    for how in ["flipped"] * 40 + ["truncated"] * 5 + ["empty", "zeros"]:
        damage(new, how, rng)
        got, meta = restore(script, run_dir, references)
        if f"{new}: damaged" in capsys.readouterr().err:
            outcomes["the one before"] += 1
            assert meta["bytes"]["train.csv"] < right["bytes"]["train.csv"]
        else:  # a byte that nothing is read from, such as a date
            outcomes["harmless"] += 1
            jax.tree.map(np.testing.assert_array_equal, got, want)
        new.write_bytes(content)
        for name in TABLES:  # restoring cut them
            if (references[script] / f"{name}.csv").exists():
                shutil.copy(references[script] / f"{name}.csv", run_dir)
    print(outcomes)
    assert outcomes["the one before"] > 40


def test_checkpoints_of_other_runs(script, references, tmp_path, capsys):
    """Otherwise a run goes on with the weights of another method, environment, seed or network size."""
    run_dir = shutil.copytree(references[script], tmp_path / "run")
    newest = states(run_dir)[-1]
    assert restore(script, run_dir, references)[0] is not None and not capsys.readouterr().err
    for other in SCRIPTS:
        if other is not script:
            shutil.copy(states(references[other])[-1], newest)
            assert restore(script, run_dir, references)[1]["run"][0] == f"{script.__name__}.py"
            assert str(newest) in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        restore(script, run_dir, references, env_id="HopperHop")
    assert stopped.value.code == 2 and "--resume" in capsys.readouterr().err


def test_lost_rows(interrupted):
    """Otherwise a log with a hole looks like a whole one."""
    for name in ("eval", "train"):
        path = interrupted / f"{name}.csv"
        path.write_text("\n".join(path.read_text().splitlines()[:3]) + "\n")
    process = run(gorl_fm_ppo, "--resume", interrupted)
    assert process.returncode == 2 and "lost rows" in process.err
    one_line(process, "--resume")


def test_a_checkpoint_that_was_passed_over_stays_out(references, tmp_path):
    """Otherwise a file of another past of the run cuts its logs in the middle of a row."""
    run_dir = shutil.copytree(references[ppo_gaussian], tmp_path / "run")
    _, new = states(run_dir)
    damage(new, "truncated", np.random.default_rng(0))
    assert restore(ppo_gaussian, run_dir, references)[1]["done"] < 48
    assert new not in states(run_dir) and new.with_suffix(".bad").exists()


def test_a_refused_resume_changes_nothing(references, tmp_path):
    """Otherwise a mistake on the command line is stored as the run's arguments."""
    small = [
        "--no-checkpoint-env-state",
        "--resume",
        shutil.copytree(references[gorl_fm_ppo], tmp_path / "run"),
    ]
    longer = run(gorl_fm_ppo, *small, "--stage-timesteps", 640, 640, 320, 360)
    assert longer.returncode == 0, longer.err[-2000:]  # its last checkpoint has no decoder data
    before = {path: path.read_bytes() for path in small[-1].rglob("*") if path.is_file()}
    process = run(gorl_fm_ppo, *small, "--stage-timesteps", 640, 640, 320, 360, 320)
    assert process.returncode == 2
    one_line(process, "--resume", "decoder data")
    assert before == {path: path.read_bytes() for path in small[-1].rglob("*") if path.is_file()}


# --- without environments ---


@pytest.mark.parametrize(
    ("script", "number"), [(gorl_fm_ppo, signal.SIGKILL), (ppo_gaussian, signal.SIGTERM)]
)
def test_small_checkpoints(script, number, tmp_path):
    """Otherwise --no-checkpoint-env-state does not save the disk, or ends in a stage without decoder data."""
    small = ["--no-checkpoint-env-state", "--runs-dir", tmp_path]
    sizes, rng, resume = [], np.random.default_rng(0), []
    for phase in ["decoder"] * (script in GORL) + ["iteration", "checkpoint"]:
        process = start(script, *(resume or small))
        assert wait_for(phase, process, tmp_path, rng)
        process.send_signal(number)
        finish(process)
        (run_dir,) = tmp_path.iterdir()
        sizes += [size(path) for path in states(run_dir)]
        resume = ["--resume", run_dir]
        with np.load(states(run_dir)[-1]) as file:
            assert not [name for name in file.files if name.startswith((".envs", ".ring"))]
    done = run(script, *resume)
    assert done.returncode == 0 and "fresh episodes" in done.out
    steps = [int(row["step"]) for row in table(run_dir, "train")]
    assert sorted(steps) == steps and set(steps) == set(range(40, 1921, 40)) and len(steps) == 2 * 48
    refined = [(int(r["stage"]), int(r["pairs"])) for r in table(run_dir, "refine") if r["seed"] == "1"]
    assert [stage for stage, _ in refined] == ([1, 2, 3] if script in GORL else [])
    assert all(16 <= pairs <= 400 for _, pairs in refined)
    assert max(sizes) < 8_000_000


# --- numbers ---


@pytest.mark.parametrize(
    ("script", "argument"),
    [*((s, "--learning-rate") for s in TWO), (gorl_fm_ppo, "--decoder-learning-rate")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_exploding_numbers(script, argument, tmp_path):
    """Otherwise a day of computing goes into NaN, and the last good weights are overwritten."""
    process = run(script, "--runs-dir", tmp_path, argument, "1e9")
    assert process.returncode == 1
    (run_dir,) = tmp_path.iterdir()
    good = states(run_dir)[-1]
    where = "epoch 0:" if "decoder" in argument else "iteration 1,"
    one_line(process, "not finite", "loss", where, str(good))
    with np.load(good) as file:
        assert all(np.isfinite(file[name]).all() for name in file.files if file[name].dtype.kind == "f")


# --- Weights & Biases ---


@pytest.fixture
def wandb_home(tmp_path):
    pytest.importorskip("wandb")
    return {**WANDB, "HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home")}


def complaints(process):
    return [line for line in process.err.splitlines() if "Weights & Biases" in line]


def test_unreachable_wandb(references, tmp_path, wandb_home):
    """Otherwise a network that is down stops or slows training."""
    hole = {"WANDB_BASE_URL": "http://127.0.0.1:9"}  # nobody listens there
    began = time.time()
    process = run(gorl_fm_ppo, "--runs-dir", tmp_path / "runs", "--track", environment=wandb_home | hole)
    assert process.returncode == 0 and len(complaints(process)) <= 1, process.err[-2000:]
    assert time.time() - began < 120
    (run_dir,) = (tmp_path / "runs").iterdir()
    same_run(run_dir, references[gorl_fm_ppo])
    times = [float(row["wall_time"]) for row in csv.DictReader((run_dir / "train.csv").open())]
    assert times[-1] - times[0] < 15  # it takes 20 s to give up


def test_refused_wandb_goes_on_offline(tmp_path, wandb_home):
    """Otherwise the rows of a run without a network or a login are in no Weights & Biases run at all."""
    nobody = wandb_home | {"WANDB_API_KEY": ""}  # which is known at once
    process = run(ppo_gaussian, "--runs-dir", tmp_path / "runs", "--track", environment=nobody)
    assert process.returncode == 0 and len(complaints(process)) == 1, process.err[-2000:]
    (run_dir,) = (tmp_path / "runs").iterdir()
    (file,) = run_dir.glob(f"wandb/offline-run-*-{run_dir.name}/run-*.wandb")
    assert file.stat().st_size > 20_000  # its rows


def test_a_resumed_run_continues_its_wandb_run(references, tmp_path, wandb_home):
    """Otherwise a run is two runs in Weights & Biases, or rows are missing there."""
    with FakeWandb() as server:
        online = wandb_home | {"WANDB_BASE_URL": server.url}
        process = start(gorl_fm_ppo, "--runs-dir", tmp_path / "runs", "--track", environment=online)
        while process.poll() is None and not list(tmp_path.glob("runs/*/decoder.csv")):
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        assert finish(process).returncode == 128 + signal.SIGTERM
        (run_dir,) = (tmp_path / "runs").iterdir()
        process = run(gorl_fm_ppo, "--resume", run_dir, "--track", environment=online)
        assert process.returncode == 0 and not complaints(process), process.err[-2000:]
    assert set(server.created) == {run_dir.name} == server.finished
    rows = [row for _, row in sorted(server.rows[run_dir.name].items())]
    for name, column in (("train", "value_loss"), ("eval", "return_mean"), ("decoder", "loss")):
        want = [float(r[column]) for r in table(references[gorl_fm_ppo], name) if r["seed"] == "2"]
        got = [row[key] for row in rows if (key := f"{name}/{column}/seed_2") in row]
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_wandb_that_crashes(references, tmp_path, wandb_home):
    """Otherwise its background process takes a run of a day down with it."""
    with FakeWandb() as server:
        online = wandb_home | {"WANDB_BASE_URL": server.url}
        long = ["--update-epochs", "20", "--learning-rate", "1e-6"]  # it goes on for some seconds after
        process = start(gorl_fm_ppo, "--runs-dir", tmp_path / "runs", "--track", *long, environment=online)
        killed = threading.Event()
        while process.poll() is None and not killed.is_set():
            if server.created and list(tmp_path.glob("runs/*/train.csv")):
                for pid in services(process.pid):
                    os.kill(pid, signal.SIGKILL)
                    killed.set()
            time.sleep(0.05)
        finish(process)
    assert killed.is_set() and process.returncode == 0, process.err[-2000:]
    assert len(complaints(process)) == 1 and "Traceback" not in process.err
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert list(run_dir.glob(f"wandb/offline-run-*-{run_dir.name}"))
    assert len(table(run_dir, "train")) == len(table(references[gorl_fm_ppo], "train"))


def services(pid):
    """Processes that a process and its children have started, by the kernel's list."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def test_more_stages_on_resuming_and_tracking(references, tmp_path, wandb_home):
    """Otherwise a finished run cannot be prolonged, or Weights & Biases needs a network."""
    run_dir = shutil.copytree(references[gorl_fm_ppo], tmp_path / "run")
    stages = ["--stage-timesteps", 640, 640, 320, 320, 160]
    process = run(
        gorl_fm_ppo,
        "--resume",
        run_dir,
        *stages,
        "--track",
        environment=wandb_home | {"WANDB_MODE": "offline"},
    )
    assert process.returncode == 0 and not complaints(process), process.err[-2000:]
    assert [row["step"] for row in table(run_dir, "eval")[-4:]] == ["1920"] * 2 + ["2080"] * 2
    assert list(run_dir.glob("wandb/offline-run-*"))


def test_metadata(references):
    """Otherwise tools that read args.json stop at a run's directory."""
    stored = json.loads((references[gorl_fm_ppo] / "args.json").read_text())
    assert stored["checkpoint_env_state"] is True and re.match(r"\d+ x ", stored["versions"]["device"])


def test_names():
    """The lists of this file cover all scripts."""
    assert {name_of(c[0]) for c in CAMPAIGNS} == {name_of(s) for s in SCRIPTS}


def kill_campaign(kills, out):
    """A longer campaign than the tests', of toy runs of every script. Raises if one ends differently."""
    began, phases = time.time(), ("decoder", *PHASES)
    result = {
        "command": " ".join(["PYTHONPATH=. python", "tests/test_faults.py", *sys.argv[1:]]),
        "scripts": {},
    }
    for script in SCRIPTS:
        runs = Path(tempfile.mkdtemp())
        done = run(script, "--runs-dir", runs / "reference")
        assert done.returncode == 0, done.err[-2000:]
        (reference,), share = (runs / "reference").iterdir(), kills // len(SCRIPTS)
        wanted = [p for p in phases * share if p != "decoder" or script in GORL][:share]
        run_dirs, tried = campaign(script, runs / "killed", wanted, seed=0)
        for run_dir in run_dirs:
            same_run(run_dir, reference)
        result["scripts"][script.__name__] = {"kills": dict(tried), "runs": len(run_dirs), "survived": share}
        print(json.dumps(result["scripts"][script.__name__]), flush=True)
        shutil.rmtree(runs)
    result |= {"wall_seconds": round(time.time() - began), "python": sys.version.split()[0]}
    describe = ["git", "-C", str(Path(TOY).parent), "describe", "--always", "--dirty"]
    result["commit"] = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    result |= {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    Path(out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    kill_campaign(int(sys.argv[1]), sys.argv[2])
