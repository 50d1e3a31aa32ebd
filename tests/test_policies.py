"""Saved policies, opened, evaluated, filmed and sampled, and the figures that run things
themselves.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import GORL, SCRIPTS
from PIL import Image
from scipy import stats
from toy import PointMass

import ppo_gaussian
from plotting import evaluate, figure_1, figure_7, paper, policies, runs, style

TOTAL = 480


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_args):
    """A finished run of two seeds on PointMass by each script, as if that were HopperStand."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("trained")
    for script in SCRIPTS:
        patch.setattr(script, "make_env", lambda args: PointMass())
        changes = {"num_seeds": 2, "total_timesteps": TOTAL, "eval_every": 160, "eval_envs": 16}
        if script in GORL:
            changes["stage_timesteps"] = (160, 160, 80, 80)
        args = make_args(script, **changes, runs_dir=str(folder))
        run = script.make_run_dir(args, "toy").rename(folder / script.__name__)
        script.train(args, PointMass(), run)
    runs.load.cache_clear()
    yield folder
    patch.undo()
    runs.load.cache_clear()


@pytest.mark.parametrize("seed", [1, 2])
def test_an_evaluation_gives_the_logged_return_again(trained, script, seed, capsys):
    """Otherwise `plotting.evaluate` measures something else than eval.csv, or another seed's
    policy.
    """
    run = trained / script.__name__
    (file,) = evaluate.evaluate(run, seed=seed, episodes=16, out=run / f"own_{seed}.csv")
    got, want = runs.read_table(file), runs.read_table(run / "eval.csv")
    row = (want["seed"] == seed) & (want["step"] == TOTAL)
    for name in ("return_mean", "return_std", "return_min", "return_max"):
        np.testing.assert_allclose(got[name], want[name][row], rtol=2e-4)
    assert (got["step"], got["deterministic"], got["env_seed"]) == (TOTAL, 1, seed)


def test_what_an_evaluation_can_be_asked(trained, capsys):
    """Otherwise an argument does nothing, or statistics are not those of the returns."""
    run = trained / "gorl_fm_ppo"
    ask = dict(run_dir=run, episodes=200, out=run / "asked.csv")
    for change in ({}, {"stochastic": True}, {"env_seed": 7}, {"step": 160}, {"seed": 2}):
        evaluate.evaluate(**ask | change)
    table = runs.read_table(run / "asked.csv")
    assert len(set(table["return_mean"])) == 5 and table["deterministic"].tolist() == [
        1,
        0,
        1,
        1,
        1,
    ]
    assert table["step"].tolist() == [480, 480, 480, 160, 480]
    assert table["env_seed"].tolist() == [1, 1, 7, 1, 2]
    script, args, policy, step, _ = policies.open_policy(run)
    returns, seen = policies.evaluate(script, args, policy, step, 1, 200, True)
    assert returns.shape == (200,) and seen == {}
    assert table["return_iqm"][0] == pytest.approx(stats.trim_mean(returns, 0.25), rel=1e-5)
    assert table["return_std"][0] == pytest.approx(returns.std(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"step": 161}, "has no step 161"),
        ({"seed": 9}, "seed 9"),
        ({"seed": 0}, "seed 0"),
        ({"episodes": 0}, "--episodes: got 0"),
        ({"env_seed": -1}, "--env-seed: got -1"),
        ({"out": Path("/no/such/folder/file.csv")}, "--out"),
        ({"out": "eval.csv"}, "a new file, or one that this command has written"),
    ],
)
def test_wrong_questions(trained, change, says, capsys):
    """Otherwise a mistake ends in a traceback, or evaluates another policy than was meant."""
    run = trained / "ppo_gaussian"
    change = {"out": run / change["out"]} if change.get("out") == "eval.csv" else change
    with pytest.raises(SystemExit) as error:
        evaluate.evaluate(**{"run_dir": run, "episodes": 2} | change)
    captured = capsys.readouterr().err
    assert error.value.code == 2 and says in captured and captured.count("\n") == 1


def test_runs_without_a_good_policy(trained, tmp_path, capsys):
    """Otherwise a damaged policy file is a traceback, or a wrong folder another run's policy."""
    bad = tmp_path / "run"
    (bad / "checkpoints").mkdir(parents=True)
    stored = (trained / "ppo_gaussian/args.json").read_text()
    policy = f"checkpoints/policy_{TOTAL}.npz"
    data = bytearray((trained / "ppo_gaussian" / policy).read_bytes())
    data[len(data) // 2] ^= 255

    def message():
        with pytest.raises(SystemExit):
            evaluate.evaluate(bad, episodes=2)
        return capsys.readouterr().err

    assert "args.json is damaged or missing" in message()
    (bad / "args.json").write_text(stored)
    assert "no policy in" in message()
    (bad / policy).write_bytes(data)
    assert f"policy_{TOTAL}.npz is damaged" in message()
    shutil.copy(trained / "fpo" / policy, bad / policy)
    text = message()
    assert f"policy_{TOTAL}.npz is damaged" in text and "fpo.py" in text
    (bad / "args.json").write_text(json.dumps(json.loads(stored) | {"max_grad_norm": 0.0}))
    assert "its args.json is not one of ppo_gaussian.py as it is here" in message()


def test_figure_7(trained, monkeypatch, capsys):
    """Otherwise methods are sampled at different states, or a density is not the policy's."""
    kept = []
    monkeypatch.setattr(style, "save", lambda figure, out, name: kept.append(figure) or [])
    out = trained / "out"
    out.mkdir()
    for file in trained.glob("*/checkpoints/policy_*.npz"):  # one method's course will do
        if file.parents[1].name != "gorl_fm_ppo" and file.name != f"policy_{TOTAL}.npz":
            file.unlink()
    options = runs.Options(runs=(trained,), out=out)
    *_, file = figure_7.draw(options, samples=10_000, num_states=2)
    record = json.loads(file.read_text())
    state = np.asarray(PointMass().reset(figure_7_key(0)).obs)
    np.testing.assert_allclose(record["observation"], state, rtol=1e-6)
    assert np.linalg.norm(record["projection"]) == pytest.approx(1)
    saved = {(p["method"], p["step"]) for p in record["policies"]}
    last = {(method, TOTAL) for method in paper.METHODS.values()}
    assert saved == last | {("GoRL(FM)", 160), ("GoRL(FM)", 320)}
    panels = np.array(kept[0].axes).reshape(5, 3)
    assert [row[0].get_ylabel() for row in panels] == list(paper.METHODS.values())
    titles = [panel.get_title() for panel in panels[0]]
    ends = ["0.00016M steps", "0.00032M steps", "0.00048M steps"]
    assert [title.rpartition(": ")[2] for title in titles] == ends
    empty = [not panel.texts for panel in panels.ravel()]
    assert empty == 4 * [True, True, False] + 3 * [False]
    for panel, nothing in zip(panels.ravel(), empty, strict=True):
        assert len(panel.get_lines()) == (0 if nothing else 2)  # a line a seed
    # PPO's u is Gaussian: the curve is known, and two Gaussians are no better than one.
    line = panels[0, 2].get_lines()[0]
    ppo = next(p for p in record["policies"] if p["method"] == "PPO")
    axis = np.array(record["projection"])
    _, _, policy, *_ = policies.open_policy(trained / "ppo_gaussian", TOTAL, 1)
    u = np.asarray(policy(np.broadcast_to(state, (20_000, 3)), figure_7_key(5))) @ axis
    want = stats.norm.pdf(line.get_xdata(), u.mean(), u.std())
    np.testing.assert_allclose(line.get_ydata(), want, atol=0.08 * want.max())
    assert abs(ppo["gain"]) < 0.01 and ppo["dip"] < 0.05
    plt.close("all")


def figure_7_key(seed):
    """The key of the first of two states."""
    key = jax.random.PRNGKey(seed)
    return jax.random.split(key, 2)[0] if seed == 0 else key


def test_figure_1(tmp_path, monkeypatch, capsys):
    """Otherwise the paper's first claim is drawn by hand: flow and Gaussian fitted to two equal
    peaks.
    """
    kept = []
    monkeypatch.setattr(style, "save", lambda figure, out, name: kept.append(figure) or [])
    small = {"num_envs": 64, "batch_size": 32, "num_minibatches": 2}
    monkeypatch.setattr(figure_1, "SIZES", figure_1.SIZES | small)
    monkeypatch.setattr(figure_1, "DECODER", figure_1.DECODER | {"decoder_batch_size": 64})
    two = {name: figure_1.METHODS[name] for name in ("PPO", "GoRL(FM), high-reward data")}
    monkeypatch.setattr(figure_1, "METHODS", two)
    before = ppo_gaussian.make_env, signal.getsignal(signal.SIGTERM)
    *_, file = figure_1.draw(runs.Options(out=tmp_path), iterations=12, seeds=2, draws=2000)
    assert (ppo_gaussian.make_env, signal.getsignal(signal.SIGTERM)) == before
    record = json.loads(file.read_text())
    gaussian = record["Gaussian closest to it"][0]
    flow = record["GoRL(FM)'s decoder trained on it"][0]
    x = np.linspace(-4, 4, 8001)
    best = figure_1.best_policy(x)
    assert np.trapezoid(best, x) == pytest.approx(1, abs=1e-3)
    want = np.trapezoid(best * np.asarray(figure_1.reward(x)), x)
    assert flow["mean_reward"] == pytest.approx(want, abs=0.06) and flow["dip"] > 0.5
    std = np.sqrt(np.trapezoid(best * x**2, x))
    middle = stats.norm.cdf(figure_1.PEAK / 2, 0, std) - stats.norm.cdf(-figure_1.PEAK / 2, 0, std)
    assert gaussian["between_peaks"] == pytest.approx(middle, abs=0.03) and gaussian["dip"] < 0.05
    assert flow["between_peaks"] < middle / 2
    assert [len(record[name]) for name in two] == [2, 2]
    fitted, *panels = kept[0].axes
    assert [len(panel.get_lines()) for panel in (fitted, *panels)] == [2, 2, 2]
    for panel, name in zip(panels, two, strict=True):
        mean = np.mean([seed["mean_reward"] for seed in record[name]])
        assert panel.get_title() == f"{name}: {mean:.2f}"
    plt.close("all")


# --- by the command line


def module(name, *arguments, **environment):
    command = [sys.executable, "-m", f"plotting.{name}", *map(str, arguments)]
    how = {"env": os.environ | environment, "cwd": runs.ROOT, "timeout": 600}
    return subprocess.run(command, capture_output=True, text=True, **how)


def test_evaluate_by_the_command_line(trained):
    """Otherwise a user cannot evaluate a policy, or gets another return than was logged."""
    run = trained / "dppo"
    toy = {"PYTHONPATH": str(Path(__file__).parent / "fake_playground")}
    done = module("evaluate", run, "--episodes", 16, **toy)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"wrote {run}/evaluations.csv" in done.stdout
    got = runs.read_table(run / "evaluations.csv")["return_mean"]
    want = runs.read_table(run / "eval.csv")
    seed_1 = want["return_mean"][want["seed"] == 1]
    assert got == pytest.approx(seed_1[-1], rel=2e-4)
    done = module("evaluate", run, "--step", 7)
    assert done.returncode == 2 and "has no step 7" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def cartpole(tmp_path):
    """A run on CartpoleBalance of which there is a policy, untrained."""
    args = ppo_gaussian.Args(
        env_id="CartpoleBalance", episode_length=20, runs_dir=str(tmp_path / "runs")
    )
    run = ppo_gaussian.make_run_dir(args, "none")
    sizes = SimpleNamespace(observation_size=5, action_size=1)
    agent = ppo_gaussian.init_agent(args, sizes, jax.random.PRNGKey(0))
    agents = jax.tree.map(lambda x: np.asarray(x)[None], ppo_gaussian.policy_part(agent))
    ppo_gaussian.save_arrays(args, run / "checkpoints/policy_1.npz", agents)
    return run


def test_video_by_the_command_line(cartpole, tmp_path):
    """Otherwise there is no film, or none without a display, or a half one is left behind."""
    (tmp_path / "film").mkdir()
    film = tmp_path / "film/a.mp4"
    done = module("video", cartpole, "--height", 48, "--width", 64, "--out", film)
    if done.returncode == 1:
        assert "cannot draw: no OpenGL without a display" in done.stderr
        pytest.skip("no EGL or OSMesa here")
    assert done.returncode == 0, done.stderr[-2000:]
    import imageio_ffmpeg

    about, *pictures = imageio_ffmpeg.read_frames(str(film))
    assert about["source_size"] == (64, 48) and about["fps"] == pytest.approx(50)
    pictures = [np.frombuffer(picture, np.uint8).astype(float) for picture in pictures]
    assert len(pictures) == 10  # 20 control steps of 0.01 s
    assert all(picture.std() > 10 for picture in pictures)
    assert np.abs(pictures[0] - pictures[-1]).max() > 10
    small = film.with_suffix(".gif")
    size = ("--seconds", 0.1, "--height", 48, "--width", 64)
    done = module("video", cartpole, *size, "--out", small)
    assert done.returncode == 0 and "Parsed_palette" not in done.stderr
    with Image.open(small) as moving:
        assert (moving.size, moving.n_frames, moving.info["duration"]) == ((64, 48), 2, 50)
    assert {path.name for path in film.parent.iterdir()} == {"a.gif", "a.mp4"}


def test_no_opengl_is_a_clear_message(cartpole):
    """Otherwise a machine without EGL and OSMesa gives a traceback after the simulation."""
    done = module("video", cartpole, MUJOCO_GL="glfw", DISPLAY="")
    says = "cannot draw: no OpenGL without a display (MUJOCO_GL=glfw tried)"
    assert done.returncode == 1 and says in done.stderr
    assert "Traceback" not in done.stderr
    done = module("video", cartpole, "--width", 63)
    assert done.returncode == 2 and "--width: got 63; takes an even number" in done.stderr


def test_figure_3_by_the_command_line(tmp_path):
    """Otherwise a task is missing, or its picture is empty."""
    done = module("figure_3", "--out", tmp_path)
    if done.returncode == 1:
        assert "cannot draw: no OpenGL without a display" in done.stderr
        pytest.skip("no EGL or OSMesa here")
    assert done.returncode == 0, done.stderr[-2000:]
    picture = matplotlib.image.imread(tmp_path / "figure_3.png")[..., :3]
    rows, columns = np.array_split(picture, 2), 3
    for part in (tile for row in rows for tile in np.array_split(row, columns, axis=1)):
        assert part[len(part) // 3 : 2 * len(part) // 3].std() > 0.05
    assert (tmp_path / "figure_3.pdf").stat().st_size > 10_000


def test_every_module_has_help():
    """Otherwise a user finds no arguments, or help takes a device. (Figure 4 stands for those like
    it.)
    """
    for name in ("evaluate", "video", "pack", "all", "figure_4", "figure_7"):
        done = module(name, "--help", JAX_PLATFORMS="none_such")
        assert done.returncode == 0 and ("--to" if name == "pack" else "--out") in done.stdout, (
            done.stderr
        )
