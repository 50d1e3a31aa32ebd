"""The script as a user runs it: arguments, files, resuming."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import GORL, SCRIPTS, name_of

import fpo
import gorl_fm_ppo as gorl
import ppo_gaussian

COMMON = (
    "--env-id CheetahRun --num-envs 8 --batch-size 4 --num-minibatches 4 --unroll-length 5 --update-epochs 2 "
    "--total-timesteps 480 --eval-every 80 --eval-envs 8 --episode-length 20"
).split()
STAGES = (
    "--stage-timesteps 160 160 80 80 --decoder-epochs 2 --decoder-buffer-size 120 --decoder-batch-size 16"
).split()
TINY = [*COMMON, *STAGES]


def run(script, *arguments, timeout=600, **environment):
    command = [sys.executable, script.__file__, *map(str, arguments)]
    env = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)


def rows(run_dir, name):
    with (run_dir / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def without_clock(run_dir, name):
    table = rows(run_dir, name)
    return [{k: v for k, v in row.items() if "time" not in k and "sps" not in k} for row in table]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted tiny run with two seeds, its directory and its output."""
    runs = tmp_path_factory.mktemp("runs")
    done = run(gorl, *TINY, "--num-seeds", 2, "--runs-dir", runs, JAX_LOG_COMPILES="1")
    assert done.returncode == 0, done.stderr[-3000:]
    return next(runs.iterdir()), done


# --- arguments ---


def test_help_needs_no_device(script):
    """Otherwise reading the help takes a free GPU, or fails without one."""
    start = time.time()
    done = run(script, "--help", JAX_PLATFORMS="none_such")
    assert done.returncode == 0
    for argument in script.Args.__dataclass_fields__:
        assert f"--{argument.replace('_', '-')}" in done.stdout
    assert time.time() - start < 30  # 10 s on an idle machine


BAD = [  # the argument that the message names, and the command line
    ("env-id", "--env-id HopperFly"),
    ("env-id", "--env-id ReacherEasy"),
    ("total-timesteps", "--total-timesteps 400000"),
    ("total-timesteps", "--total-timesteps -1"),
    ("batch-size", "--batch-size 1000"),
    ("num-envs", "--num-envs 0"),
    ("unroll-length", "--unroll-length -3"),
    ("eval-envs", "--eval-envs 0"),
    ("gamma", "--gamma 1.5"),
    ("gamma", "--gamma 0"),
    ("gae-lambda", "--gae-lambda nan"),
    ("learning-rate", "--learning-rate 0"),
    ("learning-rate", "--learning-rate inf"),
    ("seed", "--seed -1"),
    ("clip-eps", "--clip-eps 0"),
    ("clip-eps", "--clip-eps 1.5"),
    ("max-grad-norm", "--max-grad-norm nan"),
    ("max-grad-norm", "--max-grad-norm -1"),
    ("exp-name", "--exp-name a/b"),
    ("resume", "--resume no-such-run"),
    ("resume", "--resume="),
]
BAD_OF = {
    "gorl_fm_ppo": [
        ("clip-eps", "--clip-eps 0.1 0"),
        ("kl-coef", "--kl-coef -1e-3"),
        ("decoder-batch-size", "--decoder-batch-size 100000000"),
        ("decoder-buffer-size", "--decoder-buffer-size 100 --decoder-batch-size 10"),
        ("decoder-steps", "--decoder-steps 0"),
        ("stage-timesteps", "--stage-timesteps 60000000 1000"),
        ("stage-timesteps", "--stage-timesteps"),
        ("total-timesteps", "--stage-timesteps 60000000 60000000 --total-timesteps 70000000"),
        ("total-timesteps", "--stage-timesteps 60000000 60000000 --total-timesteps 180000000"),
    ],
    "fpo": [
        ("ent-coef", "--ent-coef 0.01"),
        ("flow-steps", "--flow-steps 0"),
        ("samples-per-action", "--samples-per-action 0"),
    ],
    "dppo": [
        ("ent-coef", "--ent-coef 0.01"),
        ("denoising-steps", "--denoising-steps 0"),
        ("denoising-std", "--denoising-std 0"),
    ],
}
BAD_OF["gorl_diff_ppo"] = [*BAD_OF["gorl_fm_ppo"], ("decoder-steps", "--decoder-steps 1")]
CASES = [(s, *case) for s in SCRIPTS for case in [*BAD, *BAD_OF.get(s.__name__, [])]]


@pytest.mark.parametrize(("script", "argument", "line"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_wrong_arguments(script, argument, line, monkeypatch, capsys):
    """Otherwise a typo costs a compilation, or a day, and ends in a traceback."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *line.split()])
    monkeypatch.setattr(jax, "jit", None)  # nothing may compile
    with pytest.raises(SystemExit) as stopped:
        script.check(script.parse_args())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f"--{argument}" in error and error.count("\n") == 1
    assert error.startswith(f"{script.__name__}.py: ") and "takes" in error


def test_tracking_without_wandb(script, monkeypatch, capsys):
    """Otherwise a run fails after its directory is made, or after compiling."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--track"])
    monkeypatch.setattr(script.util, "find_spec", {"wandb": None}.get)
    with pytest.raises(SystemExit) as stopped:
        script.check(script.parse_args())
    error = capsys.readouterr().err
    assert (
        stopped.value.code == 2 and "--track" in error and "pip install" in error and error.count("\n") == 1
    )


def test_wrong_arguments_in_the_shell(tmp_path):
    """Otherwise the checks work only when called by hand."""
    (tmp_path / "file").write_text("")
    cases = [(gorl, "--env-id", "X"), (gorl, "--runs-dir", tmp_path / "file"), (fpo, "--ratio", "mean")]
    for script, *case in cases:
        done = run(script, *case)
        assert done.returncode == 2 and case[0] in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_presets_and_explicit_arguments(script, monkeypatch):
    """Otherwise `--preset cpu --env-id X` does not mean what it says."""
    monkeypatch.setattr(sys, "argv", ["x.py", "--preset", "cpu", "--num-envs", "64", "--seed", "7"])
    args = script.parse_args()
    assert (args.preset, args.env_id, args.num_envs, args.seed) == ("cpu", "CheetahRun", 64, 7)
    monkeypatch.setattr(sys, "argv", ["x.py"])
    args = script.parse_args()
    assert args.total_timesteps == 180_000_000
    if script in GORL:
        assert args.stage_timesteps == (60_000_000, 60_000_000, 30_000_000, 30_000_000)
    else:
        assert script.iterations(args) == 183
    script.check(args)


PAPER = ["CheetahRun", "FingerSpin", "FingerTurnHard", "FishSwim", "HopperStand", "WalkerWalk"]


@pytest.mark.parametrize("env_id", PAPER)
def test_the_papers_commands(script, env_id, monkeypatch):
    """Otherwise a command of the README is refused, or trains fewer steps than the paper."""
    monkeypatch.setattr(sys, "argv", ["x.py", "--env-id", env_id, "--seed", "3"])
    args = script.parse_args()
    script.check(args)
    assert (args.env_id, args.seed, args.num_envs, args.total_timesteps) == (env_id, 3, 2048, 180_000_000)


# --- a run ---


def test_files_of_a_run(finished):
    """Otherwise plots and tools that read runs break."""
    run_dir, done = finished
    assert re.fullmatch(r"CheetahRun__gorl_fm_ppo__1__\d+", run_dir.name)
    header = "seed,step,stage,return_mean,return_std,return_min,return_max,wall_time"
    assert (run_dir / "eval.csv").read_text().splitlines()[0] == header
    evals = rows(run_dir, "eval")
    assert [(r["seed"], int(r["step"]), int(r["stage"])) for r in evals] == [
        (seed, step, stage)
        for step, stage in [(0, 0), (80, 0), (160, 0), (240, 1), (320, 1), (400, 2), (480, 3)]
        for seed in "12"
    ]
    assert all(
        0 <= float(r["return_min"]) <= float(r["return_mean"]) <= float(r["return_max"]) for r in evals
    )
    train = rows(run_dir, "train")
    assert list(train[0])[:4] == ["seed", "step", "stage", "sps"] and len(train) == 12
    assert all(np.isfinite(float(v)) for row in train for v in row.values())
    decoder = rows(run_dir, "decoder")
    assert list(decoder[0]) == ["seed", "stage", "epoch", "loss"]
    assert [r["stage"] for r in decoder if r["seed"] == "1"] == ["1", "1", "2", "2", "3", "3"]
    assert [int(r["step"]) for r in rows(run_dir, "refine") if r["seed"] == "2"] == [160, 320, 400]
    stored = json.loads((run_dir / "args.json").read_text())
    assert stored["num_envs"] == 8 and {"jax", "device", "git_commit"} <= set(stored["versions"])
    policies = {f.name: f.stat().st_size for f in run_dir.glob("checkpoints/policy_*")}
    assert set(policies) == {f"policy_{step}.npz" for step in (160, 320, 400, 480)}
    assert max(policies.values()) < 1_000_000
    assert "On a CPU" in done.stdout and "--preset cpu" in done.stdout and "steps/s" in done.stdout


@pytest.mark.parametrize("script", [ppo_gaussian], ids=name_of)
def test_a_run_of_a_baseline(script, tmp_path):
    """Otherwise the other loop runs on toy environments only, as all scripts do in test_faults.py."""
    tiny = TINY if script in GORL else COMMON
    done = run(script, *tiny, "--runs-dir", tmp_path, JAX_LOG_COMPILES="1")
    assert done.returncode == 0, done.stderr[-3000:]
    run_dir = next(tmp_path.iterdir())
    assert re.fullmatch(rf"CheetahRun__{script.__name__}__1__\d+", run_dir.name)
    assert [int(r["step"]) for r in rows(run_dir, "eval")] == list(range(0, 481, 80))
    assert all(np.isfinite(float(v)) for row in rows(run_dir, "train") for v in row.values())
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", done.stderr)
    assert compiled.count("iteration") == 1 and compiled.count("evaluate") == 1
    u = script.load_policy(str(run_dir))(np.zeros((4, 17), np.float32), jax.random.PRNGKey(0))
    assert u.shape == (4, 6) and np.isfinite(u).all()


def test_everything_compiles_once(finished):
    """Otherwise each run pays for the physics' compilation twice."""
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", finished[1].stderr)
    assert compiled.count("iteration") == 1 and compiled.count("evaluate") == 1


def test_seeds_differ(finished):
    """Otherwise five seeds are one seed five times."""
    train = rows(finished[0], "train")
    assert all(a["reward_mean"] != b["reward_mean"] for a, b in zip(train[::2], train[1::2], strict=True))


def test_resuming_what_is_finished(finished):
    """Otherwise a restarted job trains again, or fails."""
    before = (finished[0] / "eval.csv").read_text()
    done = run(gorl, "--resume", finished[0])
    assert done.returncode == 0 and "finished" in done.stdout
    assert (finished[0] / "eval.csv").read_text() == before


def test_kill_and_resume(finished, tmp_path):
    """Otherwise MuJoCo's state is not restored exactly; test_faults.py has other kills, on a toy."""
    command = [sys.executable, gorl.__file__, *TINY, "--num-seeds", "2", "--runs-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("*/checkpoints/state_000000000320_*")):
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_dir = next(tmp_path.iterdir())
    with (run_dir / "train.csv").open("a") as file:
        file.write("1,480,3,99")  # a row cut off in the middle
    newest = max(run_dir.glob("checkpoints/state_*.npz"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    done = run(gorl, "--resume", run_dir)
    assert done.returncode == 0, done.stderr[-3000:]
    assert newest.name in done.stderr and "damaged" in done.stderr
    for name in ("eval", "train", "decoder", "refine"):
        assert without_clock(run_dir, name) == without_clock(finished[0], name)
