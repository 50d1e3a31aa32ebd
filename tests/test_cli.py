"""Scripts as a user runs them: arguments, a run of a real environment, resuming it, a fork."""

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from command import one_line, policies, real, run, same_run, states, table, toy
from conftest import GORL, SCRIPTS, name_of

import fpo
import gorl_fm_ppo as gorl


# --- arguments ---
def set_line(monkeypatch, script, *words):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])


def test_help_needs_no_device(script):
    """Otherwise reading the help takes a free GPU, or fails without one."""
    done = run(real(script, "--help"), JAX_PLATFORMS="none_such")
    assert done.returncode == 0
    assert done.stderr == ""
    for argument in script.Args.__dataclass_fields__:
        assert f"--{argument.replace('_', '-')}" in done.stdout


BAD = [  # the argument that the message names, and the command line
    ("num-seeds", "--num-seeds 0"),
    ("total-timesteps", "--total-timesteps -1"),
    ("num-envs", "--num-envs 0"),
    ("num-envs", "--num-envs 2047"),
    ("batch-size", "--batch-size 0"),
    ("num-minibatches", "--num-minibatches -1"),
    ("unroll-length", "--unroll-length -3"),
    ("update-epochs", "--update-epochs 0"),
    ("eval-envs", "--eval-envs 0"),
    ("eval-every", "--eval-every 0"),
    ("episode-length", "--episode-length 0"),
    ("gamma", "--gamma 1.5"),
    ("gae-lambda", "--gae-lambda nan"),
    ("learning-rate", "--learning-rate -1e-3"),
    ("learning-rate", "--learning-rate inf"),
    ("reward-scale", "--reward-scale nan"),
    ("seed", "--seed -1"),
    ("clip-eps", "--clip-eps 1.5"),
    ("exp-name", "--exp-name a/b"),
    ("resume", "--resume no-such-run"),
    ("resume", "--resume="),
    ("env-id", "--env-id HopperFly"),
    ("env-id", "--env-id ReacherEasy"),  # which MuJoCo 3.17 cannot build
]
BAD_GORL = [
    ("eval-envs", "--eval-envs 1"),
    ("stage-timesteps", "--total-timesteps 400000"),
    ("stage-timesteps", "--stage-timesteps 60000000 1000"),
    ("total-timesteps", "--stage-timesteps 60000000 60000000 --total-timesteps 70000000"),
    ("total-timesteps", "--stage-timesteps 60000000 60000000 --total-timesteps=170000000"),
    ("clip-eps", "--clip-eps 0.1 -1"),
    ("clip-eps", "--clip-eps"),
    ("kl-coef", "--kl-coef -1e-3"),
    ("decoder-epochs", "--decoder-epochs 0"),
    ("decoder-learning-rate", "--decoder-learning-rate nan"),
    ("decoder-batch-size", "--decoder-batch-size 0"),
    ("decoder-buffer-size", "--decoder-buffer-size 0"),
    ("decoder-batch-size", "--decoder-buffer-size 10000"),
    ("decoder-lr-ratio", "--decoder-lr-ratio -1"),
    ("advantage-temperature", "--advantage-temperature nan"),
    ("decoder-data", "--decoder-data redrawn --advantage-temperature 0.5"),
    ("decoder-steps", "--decoder-steps 0"),
    ("stage-timesteps", "--stage-timesteps 60000000 0"),
    ("total-timesteps", "--preset cpu --total-timesteps 1200000 --stage-timesteps 61440 61440"),
]
BAD_OF = {
    "gorl_fm_ppo": BAD_GORL,
    "gorl_diff_ppo": [*BAD_GORL, ("decoder-steps", "--decoder-steps 1")],
    "ppo_gaussian": [("total-timesteps", "--total-timesteps 400000")],
    "fpo": [
        ("total-timesteps", "--total-timesteps 400000"),
        ("ent-coef", "--ent-coef 0.01"),
        ("flow-steps", "--flow-steps 0"),
        ("samples-per-action", "--samples-per-action 0"),
    ],
    "dppo": [
        ("total-timesteps", "--total-timesteps 400000"),
        ("ent-coef", "--ent-coef 0.01"),
        ("denoising-steps", "--denoising-steps 0"),
        ("denoising-std", "--denoising-std 0"),
    ],
}


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_wrong_arguments(script, monkeypatch, capsys):
    """Otherwise a typo costs a compilation, or a day, and ends in a traceback."""
    monkeypatch.setattr(jax, "jit", None)  # nothing may compile
    for argument, line in BAD + BAD_OF[script.__name__]:
        set_line(monkeypatch, script, *line.split())
        with pytest.raises(SystemExit) as stopped:
            script.make_env(script.parse_args())
        error = capsys.readouterr().err
        assert stopped.value.code == 2, line
        assert error.startswith(f"{script.__name__}.py: --{argument}: got "), line
        assert error.count("\n") == 1, line
        assert "takes" in error, line


def test_wrong_arguments_in_the_shell(tmp_path):
    """Otherwise the checks work only when called by hand."""
    file = tmp_path / "file"
    file.write_text("")
    for command in (toy(gorl, "--runs-dir", file), real(gorl, "--num-envs", 3)):
        done = run(command)
        assert done.returncode == 2
        assert done.stdout == ""
        one_line(done.stderr, command[-2])
    done = run(real(fpo, "--ratio", "mean"))  # as tyro says it
    assert done.returncode == 2
    assert "--ratio" in done.stderr
    assert "Traceback" not in done.stderr


def test_presets_and_explicit_arguments(script, monkeypatch):
    """Otherwise `--preset cpu --env-id X` does not mean what it says."""
    set_line(monkeypatch, script, "--preset", "cpu", "--num_envs=64", "--seed", 7)
    args = script.parse_args()
    found = args.preset, args.env_id, args.num_envs, args.seed, args.total_timesteps
    assert found == ("cpu", "CheetahRun", 64, 7, 1_200_000)
    if script in GORL:
        assert args.stage_timesteps == (400_000, 400_000, 200_000, 200_000)
    set_line(monkeypatch, script, "--preset", "cpu", "--env-id", "FishSwim")
    assert script.parse_args().env_id == "FishSwim"


PAPER = ["CheetahRun", "FingerSpin", "FingerTurnHard", "FishSwim", "HopperStand", "WalkerWalk"]


@pytest.mark.parametrize("env_id", PAPER)
def test_the_papers_commands(script, env_id, monkeypatch):
    """Otherwise a command of the README is refused, or trains fewer steps than the paper."""
    set_line(monkeypatch, script, "--env-id", env_id, "--seed", 3)
    args = script.parse_args()
    found = args.env_id, args.seed, args.num_envs, args.total_timesteps
    assert found == (env_id, 3, 2048, 180_000_000)
    if script in GORL:
        assert args.stage_timesteps == (60_000_000, 60_000_000, 30_000_000, 30_000_000)
        assert args.stage_ends == [61, 122, 153, 183]
    else:
        assert args.policy_iterations == [61, 122, 153, 183]


def test_steps_of_stages(monkeypatch):
    """Otherwise stages are not those that were asked for."""
    set_line(monkeypatch, gorl, "--total-timesteps", 90_000_000)
    assert gorl.parse_args().stage_timesteps == (30_000_000, 30_000_000, 15_000_000, 15_000_000)
    set_line(monkeypatch, gorl, "--stage-timesteps", 60_000_000, 20_000_000)
    args = gorl.parse_args()
    assert args.stage_timesteps == (60_000_000, 20_000_000)
    assert args.total_timesteps == 80_000_000
    set_line(monkeypatch, gorl, "--stage-timesteps", 5_000_000, "--total-timesteps", 5_000_000)
    assert gorl.parse_args().stage_timesteps == (5_000_000,)


# --- a fork ---
FIELDS = "    hidden: tuple[int, ...] = (32, 32)\n    margin: float = 0.0\n"


@pytest.fixture
def fork(script, tmp_path, monkeypatch):
    """A copy of a script, under another name, with two more arguments."""
    text = Path(script.__file__).read_text()
    marker = "\n    # PPO (App. E.2)\n"
    assert text.count(marker) == 1
    path = tmp_path / "my_algo.py"
    path.write_text(text.replace(marker, f"{marker}{FIELDS}"))
    spec = importlib.util.spec_from_file_location("my_algo", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "my_algo", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("given", ["", "--hidden 64 --margin 0.5", "--hidden 8 8 8 --margin -1"])
def test_arguments_of_a_fork(fork, given, tmp_path, monkeypatch, capsys):
    """Otherwise a forker's first tuple, or a default of 0.0, is refused or comes back as a list."""
    set_line(monkeypatch, fork, *given.split(), "--runs-dir", tmp_path / "runs")
    args = fork.parse_args()
    assert args.hidden == {"": (32, 32), "--hidden 64 --margin 0.5": (64,)}.get(given, (8, 8, 8))
    run_dir = fork.make_run_dir(args, "cpu")
    assert run_dir.name.startswith("HopperStand__my_algo__1__")
    assert fork.load_args(run_dir) == args
    set_line(monkeypatch, fork, "--resume", run_dir)
    assert fork.parse_args() == fork.replace(args, resume=str(run_dir))
    set_line(monkeypatch, fork, "--resume", run_dir, "--margin", "0.0")
    with pytest.raises(SystemExit) as stopped:
        fork.parse_args()
    assert stopped.value.code == 2
    one_line(capsys.readouterr().err, "--resume", "--margin")


# --- a run ---
TINY = (  # the environment of Playground that compiles fastest
    "--env-id PendulumSwingup --num-envs 8 --batch-size 4 --num-minibatches 4 --unroll-length 5 "
    "--update-epochs 2 --eval-every 80 --eval-envs 8 --episode-length 20 --num-seeds 2 "
    "--stage-timesteps 160 160 --decoder-epochs 2 --decoder-buffer-size 80 "
    "--decoder-batch-size 16 --decoder-steps 3 --checkpoint-minutes 0"
).split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted tiny run, its directory and its output."""
    runs = tmp_path_factory.mktemp("runs")
    done = run(real(gorl, *TINY, "--runs-dir", runs), JAX_LOG_COMPILES="1")
    assert done.returncode == 0
    return next(runs.iterdir()), done


def test_files_of_a_run(finished):
    """Otherwise plots and tools that read runs break."""
    run_dir, _ = finished
    assert re.fullmatch(r"PendulumSwingup__gorl_fm_ppo__1__\d+", run_dir.name)
    evals = [(row["seed"], int(row["step"]), int(row["stage"])) for row in table(run_dir, "eval")]
    steps = [(0, 0), (80, 0), (160, 0), (240, 1), (320, 1)]
    assert evals == [(seed, *step) for step in steps for seed in "12"]
    for row in table(run_dir, "train") + table(run_dir, "eval"):
        assert np.isfinite([float(x) for x in row.values()]).all()
    stored = json.loads((run_dir / "args.json").read_text())
    assert stored["num_envs"] == 8
    assert {"jax", "mujoco", "playground", "device"} <= set(stored["versions"])
    assert policies(run_dir) == ["policy_160.npz", "policy_320.npz"]


def test_what_a_run_says(finished):
    """Otherwise a user does not know what runs where, how to resume it, or what comes next."""
    run_dir, done = finished
    lines = done.stdout.splitlines()
    assert "PendulumSwingup: 2 x 320 steps on" in lines[0]
    assert f"--resume {run_dir}" in done.stdout
    assert "compiling" in done.stdout
    assert "steps/s" in done.stdout
    assert "stage 1: return [" in done.stdout
    for tool in ("figure_4", "video", "evaluate"):
        assert re.search(rf"python -m plotting\.{tool} .*{re.escape(str(run_dir))}", done.stdout)


def test_a_clean_screen(finished):
    """Otherwise real errors drown in other packages' warnings."""
    lines = finished[1].stderr.splitlines()
    assert any("Finished XLA compilation" in line for line in lines)
    assert not [line for line in lines if "jax._src" not in line]  # JAX_LOG_COMPILES' own


def test_everything_compiles_once(finished):
    """Otherwise each run pays for the physics' compilation twice."""
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", finished[1].stderr)
    for name in ("init_state", "iteration", "evaluate", "decoder_epoch"):
        assert compiled.count(name) == 1


def test_a_policy_of_a_run(finished):
    """Otherwise a policy of a real environment does not load."""
    policy = gorl.load_policy(finished[0], seed=2)
    u = policy(np.zeros((4, 3), np.float32), jax.random.PRNGKey(0))
    assert u.shape == (4, 1)
    assert np.isfinite(u).all()


def test_the_real_physics_goes_on(finished, tmp_path):
    """Otherwise MuJoCo's state is not restored exactly. test_faults.py kills toy runs."""
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    states(run_dir)[-1].unlink()
    (newest,) = states(run_dir)
    assert newest.stem == "state_000000003_01"  # the first of the stage's two iterations is done
    damaged = newest.with_stem("state_000000003_99")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with (run_dir / "train.csv").open("a") as file:
        file.write("1,480,3,99")  # a row cut off in the middle
    done = run(real(gorl, "--resume", run_dir))
    assert done.returncode == 0
    assert str(damaged) in done.stderr
    assert len(done.stderr.splitlines()) == 1  # a warm start, too, has a clean screen
    same_run(run_dir, finished[0])


def test_the_readmes_edits(tmp_path):
    """Otherwise the first thing that a forker tries does not apply, or does not run."""
    text = Path(gorl.__file__).read_text()
    readme = (Path(gorl.__file__).parent / "README.md").read_text()
    diffs = re.findall(r"```diff\n(.*?)```", readme, re.DOTALL)
    assert len(diffs) == 5
    for diff in diffs:
        lines = diff.splitlines()
        before = "\n".join(line[1:] for line in lines if line[0] in " -")
        after = "\n".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    (tmp_path / "my_gorl.py").write_text(text)
    (tmp_path / "my_task.py").write_text("from toy import PointMass as MyTask\n")
    tests = Path(__file__).parent
    done = run(
        [sys.executable, tmp_path / "my_gorl.py", "--env-id", "MyTask", "--action-cost", "0.2"]
        + ["--num-envs", 4, "--batch-size", 4, "--num-minibatches", 2, "--unroll-length", 5]
        + ["--stage-timesteps", 80, 40, "--decoder-epochs", 1, "--decoder-batch-size", 16]
        + ["--decoder-steps", 2, "--eval-envs", 4, "--episode-length", 20]
        + ["--runs-dir", tmp_path / "runs"],
        PYTHONPATH=f"{tests}{os.pathsep}{tests / 'fake_playground'}",
    )
    assert done.returncode == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("MyTask__my_gorl__1__")
    assert len(table(run_dir, "train")) == 3
