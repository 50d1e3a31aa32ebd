"""The script as a user runs it: arguments, files, resuming."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

import gorl_fm_ppo as gorl

ROOT = Path(gorl.__file__).parent
SCRIPT = ROOT / "gorl_fm_ppo.py"
TINY = (
    "--env-id CheetahRun --num-envs 8 --batch-size 4 --num-minibatches 4 --unroll-length 5 --update-epochs 2 "
    "--stage-timesteps 160 160 80 80 --eval-every 80 --eval-envs 8 --episode-length 20 --decoder-epochs 2 "
    "--decoder-buffer-size 120 --decoder-batch-size 16"
).split()


def script(*arguments, timeout=600, **environment):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
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
    done = script(*TINY, "--num-seeds", 2, "--runs-dir", runs, JAX_LOG_COMPILES="1")
    assert done.returncode == 0, done.stderr[-3000:]
    return next(runs.iterdir()), done


# --- arguments ---


def test_help_needs_no_device():
    """Otherwise reading the help takes a free GPU, or fails without one."""
    start = time.time()
    done = script("--help", JAX_PLATFORMS="none_such")
    assert done.returncode == 0 and "--env-id" in done.stdout
    assert time.time() - start < 30  # 10 s on an idle machine


BAD = {
    "env-id": "--env-id HopperFly",
    "total-timesteps": "--total-timesteps 1000000",
    "batch-size": "--batch-size 1000",
    "num-envs": "--num-envs 0",
    "unroll-length": "--unroll-length -3",
    "eval-envs": "--eval-envs 0",
    "gamma": "--gamma 1.5",
    "gae-lambda": "--gae-lambda nan",
    "learning-rate": "--learning-rate 0",
    "seed": "--seed -1",
    "clip-eps": "--clip-eps 0.1 0",
    "kl-coef": "--kl-coef -1e-3",
    "max-grad-norm": "--max-grad-norm nan",
    "decoder-batch-size": "--decoder-batch-size 100000000",
    "decoder-buffer-size": "--decoder-buffer-size 100 --decoder-batch-size 10",
    "exp-name": "--exp-name a/b",
    "resume": "--resume no-such-run",
    "stage-timesteps": "--stage-timesteps 60000000 1000",
}


@pytest.mark.parametrize(
    "argument",
    [*BAD, "gamma 0", "total -1", "no resume", "stages empty", "stages against total", "default total"],
)
def test_wrong_arguments(argument, monkeypatch, capsys):
    """Otherwise a typo costs a compilation, or a day, and ends in a traceback."""
    more = {
        "gamma 0": "--gamma 0",
        "total -1": "--total-timesteps -1",
        "no resume": "--resume=",
        "stages empty": "--stage-timesteps",
        "stages against total": "--stage-timesteps 60000000 60000000 --total-timesteps 70000000",
        "default total": "--stage-timesteps 60000000 60000000 --total-timesteps 180000000",
    }
    monkeypatch.setattr(sys, "argv", ["gorl_fm_ppo.py", *(BAD | more)[argument].split()])
    monkeypatch.setattr(jax, "jit", None)  # nothing may compile
    with pytest.raises(SystemExit) as stopped:
        gorl.check(gorl.parse_args())
    error = capsys.readouterr().err
    names = {"gamma 0": "gamma", "stages empty": "stage-timesteps", "no resume": "resume"}
    name = names.get(argument, "total-timesteps" if " " in argument else argument)
    assert stopped.value.code == 2 and f"--{name}" in error and error.count("\n") == 1


def test_wrong_arguments_in_the_shell(tmp_path):
    """Otherwise the checks work only when called by hand."""
    (tmp_path / "file").write_text("")
    cases = [("--env-id", "X"), ("--runs-dir", tmp_path / "file"), ("--preset", "gpu")]
    for case in cases:
        done = script(*case)
        assert done.returncode == 2 and case[0] in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_presets_and_explicit_arguments(monkeypatch):
    """Otherwise `--preset cpu --env-id X` does not mean what it says."""
    monkeypatch.setattr(sys, "argv", ["gorl_fm_ppo.py", "--preset", "cpu", "--num-envs", "64", "--seed", "7"])
    args = gorl.parse_args()
    assert (args.preset, args.env_id, args.num_envs, args.seed) == ("cpu", "CheetahRun", 64, 7)
    monkeypatch.setattr(sys, "argv", ["gorl_fm_ppo.py"])
    args = gorl.parse_args()
    assert args.stage_timesteps == (60_000_000, 60_000_000, 30_000_000, 30_000_000)
    gorl.check(args)


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


def test_everything_compiles_once(finished):
    """Otherwise each run pays for the physics' compilation twice."""
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", finished[1].stderr)
    assert compiled.count("iteration") == 1 and compiled.count("evaluate") == 1


def test_seeds_differ(finished):
    """Otherwise five seeds are one seed five times."""
    train = rows(finished[0], "train")
    assert all(a["reward_mean"] != b["reward_mean"] for a, b in zip(train[::2], train[1::2], strict=True))


def test_load_policy(finished):
    """Otherwise a saved policy acts differently from the trained one, or not at all."""
    run_dir = str(finished[0])
    policy, obs = (
        gorl.load_policy(run_dir),
        np.random.default_rng(0).normal(size=(2, 3, 17)).astype(np.float32),
    )
    keys = jax.random.split(jax.random.PRNGKey(0))
    u = policy(obs, keys[0], deterministic=True)
    assert u.shape == (2, 3, 6)
    np.testing.assert_array_equal(u, policy(obs, keys[1], deterministic=True))
    assert not np.allclose(u, policy(obs, keys[0]))
    np.testing.assert_allclose(policy(obs[1, 2], keys[0], True), u[1, 2], atol=1e-5)
    assert not np.allclose(u, gorl.load_policy(run_dir, seed=2)(obs, keys[0], True))
    assert not np.allclose(u, gorl.load_policy(run_dir, step=160)(obs, keys[0], True))
    for wrong in ({"step": 161}, {"seed": 3}):
        with pytest.raises(ValueError, match="480"):
            gorl.load_policy(run_dir, **wrong)


def test_resuming_what_is_finished(finished):
    """Otherwise a restarted job trains again, or fails."""
    before = (finished[0] / "eval.csv").read_text()
    done = script("--resume", finished[0])
    assert done.returncode == 0 and "finished" in done.stdout
    assert (finished[0] / "eval.csv").read_text() == before


def test_resuming_with_other_arguments(finished, monkeypatch, capsys):
    """Otherwise one run's log mixes two settings."""
    for change in ("--gamma 0.9", "--num-seeds 3", "--stage-timesteps 80 160 80 80", "--total-timesteps 400"):
        monkeypatch.setattr(sys, "argv", ["gorl_fm_ppo.py", "--resume", str(finished[0]), *change.split()])
        with pytest.raises(SystemExit) as stopped:
            gorl.parse_args()
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and change.split()[0] in error and error.count("\n") == 1


def test_kill_and_resume(finished, tmp_path):
    """Otherwise a killed run loses or doubles rows, or goes on differently from one that was not killed."""
    command = [sys.executable, str(SCRIPT), *TINY, "--num-seeds", "2", "--runs-dir", str(tmp_path)]
    for kill_at in ("checkpoints/state_000000000080.npz", "checkpoints/state_000000000400.npz"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.glob(f"*/{kill_at}")):
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        run_dir = next(tmp_path.iterdir())
        command = [sys.executable, str(SCRIPT), "--resume", str(run_dir)]
    with (run_dir / "train.csv").open("a") as file:
        file.write("1,480,3,99")  # a row cut off in the middle
    newest = max(run_dir.glob("checkpoints/state_*.npz"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    done = script("--resume", run_dir)
    assert done.returncode == 0, done.stderr[-3000:]
    assert newest.name in done.stderr and "damaged" in done.stderr
    for name in ("eval", "train", "decoder", "refine"):
        assert without_clock(run_dir, name) == without_clock(finished[0], name)


def test_more_stages_on_resuming_and_tracking(finished, tmp_path):
    """Otherwise a finished run cannot be prolonged, or Weights & Biases needs a network."""
    pytest.importorskip("wandb")
    stages = ["160", "160", "80", "80", "80"]
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = script("--resume", finished[0], "--stage-timesteps", *stages, "--track", **offline)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [int(r["step"]) for r in rows(finished[0], "eval") if r["seed"] == "1"][-2:] == [480, 560]
    assert list(finished[0].glob("wandb/offline-run-*"))


# --- the project ---


def test_pins_are_the_same():
    """Otherwise `uv run` and `pip install -r` give different versions."""
    block = re.search(r"# /// script\n(.*?)# ///", SCRIPT.read_text(), re.S)[1]
    inline = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))["dependencies"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    tests_only = {"pytest", "scipy", "brax", "ruff"}
    assert inline == [line for line in required if line.split("==")[0] not in tests_only]


def test_the_script_stays_a_script():
    """Otherwise it is no longer read in one go."""
    text = SCRIPT.read_text()
    assert text.count("\n") <= 700 and max(map(len, text.splitlines())) <= 110
    assert not re.search(r"pickle", text.replace("allow_pickle=False", "").replace("no pickle", ""))


def test_lint():
    """Otherwise the code drifts from the style that its readers expect."""
    for command in ("check", "format --check"):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command.split(), str(ROOT)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
