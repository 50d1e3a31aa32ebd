"""Logs to figures and tables: what is read, what is left out, and that the numbers are those of the
logs.
"""

import json
import re
import shlex
import shutil
import sys
from dataclasses import asdict, replace
from itertools import takewhile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import GORL, SCRIPTS, name_of
from fake_runs import write_run
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from PIL import Image
from scipy import stats

from plotting import (
    aggregate,
    figure_2,
    figure_4,
    figure_5,
    figure_6,
    figure_7,
    pack,
    paper,
    runs,
    style,
    table_1,
)
from plotting import all as everything

RESULTS = runs.ROOT / "results"


def rising(end, spread=0.0):
    """Returns that rise linearly to `end` + spread * seed, whatever the step grid."""
    return lambda seed, steps: (end + spread * seed) * steps / steps[-1]


def options(folder, **changes):
    return runs.Options(runs=(Path(folder),), out=Path(folder) / "out", **changes)


@pytest.fixture
def figures(monkeypatch):
    """Figures that are saved, kept open to look at."""
    kept = []
    monkeypatch.setattr(
        style, "save", lambda figure, out, name: kept.append(figure) or [out / f"{name}.png"]
    )
    yield kept
    plt.close("all")


@pytest.fixture(autouse=True)
def fresh_cache():
    runs.load.cache_clear()


# --- the paper's numbers


def test_the_papers_table():
    """Otherwise ours is compared with numbers that the paper does not have."""
    bold = {
        task: max(paper.METHODS.values(), key=lambda m: paper.reported(m, task)[0])
        for task in paper.TASKS
    }
    diff, fm = "GoRL(DIFF)", "GoRL(FM)"  # the bold entries of the paper's Table 1
    assert list(bold.values()) == [diff, fm, diff, fm, diff, fm]
    assert all(len(row) == len(paper.TASKS) for row in paper.TABLE_1.values())
    assert sum(mean for row in paper.TABLE_1.values() for mean, _ in row) == pytest.approx(17538.02)
    assert sum(std for row in paper.TABLE_1.values() for _, std in row) == pytest.approx(2605.96)


def test_methods_are_the_scripts():
    """Otherwise a method is drawn under another's name, or two in one colour."""
    assert set(paper.METHODS) == {script.__name__ for script in SCRIPTS} == set(style.COLOURS)
    assert len(set(style.COLOURS.values())) == 5


# --- loading


def test_seeds_are_collected_and_settings_kept_apart(tmp_path, capsys):
    """Otherwise runs of different arguments are averaged, or seeds of the same are not."""
    write_run(tmp_path / "a", "ppo_gaussian", "FishSwim", rising(100, 1), seeds=(1, 2))
    write_run(
        tmp_path / "deep/er/b", "ppo_gaussian", "FishSwim", rising(100, 1), seeds=(3,), eval_envs=7
    )
    write_run(tmp_path / "c", "ppo_gaussian", "FishSwim", rising(50), clip_eps=0.1)
    write_run(tmp_path / "d", "ppo_gaussian", "HopperStand", rising(50))
    write_run(tmp_path / "e", "ppo_gaussian", "FishSwim", rising(50), preset="cpu")
    write_run(tmp_path / "f", "fpo", "FishSwim", rising(50))
    groups = runs.load((tmp_path,))
    got = {
        (g.method, g.task, g.preset, runs.shown(list(g.settings.items()))): sorted(g.curves)
        for g in groups
    }
    assert got == {
        ("ppo_gaussian", "FishSwim", "paper", ""): [1, 2, 3],
        ("ppo_gaussian", "FishSwim", "paper", "clip_eps,0.1"): [1],
        ("ppo_gaussian", "HopperStand", "paper", ""): [1],
        ("ppo_gaussian", "FishSwim", "cpu", ""): [1],
        ("fpo", "FishSwim", "paper", ""): [1],
    }
    chosen = runs.select(options(tmp_path))
    assert {g.preset for g in chosen} == {"paper"} and len(chosen) == 3
    out = capsys.readouterr().out
    assert "drawn: PPO, FishSwim: seeds 1, 2, 3, 180M steps" in out
    assert out.count("\n") == 4 and "left out: 2 other settings (" in out
    for where in ("clip-eps=0.1", "clip_eps=1e-1", "--clip-eps=.1"):
        (group,) = runs.select(options(tmp_path, where=(where,)))
        assert group.settings == {"clip_eps": 0.1}
    chosen = runs.select(options(tmp_path, where=("clip_eps=0.3",)))  # PPO's default, not FPO's
    assert [(g.name, g.task) for g in chosen] == [("PPO", "FishSwim"), ("PPO", "HopperStand")]
    assert [g.task for g in runs.select(options(tmp_path, preset="cpu"))] == ["FishSwim"]


def set_argument(name, value):
    def change(run):
        args = json.loads((run / "args.json").read_text())
        (run / "args.json").write_text(json.dumps(args | {name: value}))

    return change


def edit(name, change):
    return lambda run: (run / name).write_text(change((run / name).read_text()))


MINIMAL = '{"env_id": "FishSwim", "seed": 1, "total_timesteps": 1}'
DAMAGES = [
    ("args.json is damaged", edit("args.json", lambda text: text[:100])),
    ("args.json is damaged", lambda run: (run / "args.json").unlink()),
    ("args.json is damaged", edit("args.json", lambda text: "[]")),
    ("args.json is damaged", set_argument("total_timesteps", "many")),
    ("args.json is damaged", set_argument("seed", "1")),
    ("args.json is damaged", set_argument("num_seeds", None)),
    ("args.json is damaged", set_argument("batch_size", 0)),
    ("args.json is damaged", set_argument("env_id", 5)),
    ("args.json is damaged", set_argument("preset", ["cpu"])),
    ("args.json is damaged", set_argument("versions", {"script": None})),
    ("args.json lacks batch_size, num_envs", edit("args.json", lambda text: MINIMAL)),
    ("eval.csv is damaged", edit("eval.csv", lambda text: text + "1,2\n")),
    ("eval.csv is damaged", edit("eval.csv", lambda text: text.replace("180", "1x0"))),
    ("eval.csv is damaged", lambda run: (run / "eval.csv").write_bytes(b"\0\xff" * 50)),
    ("eval.csv is damaged", lambda run: (run / "eval.csv").unlink()),
    ("no rows", edit("eval.csv", lambda text: text.splitlines()[0] + "\n")),
    ("no rows", edit("eval.csv", lambda text: "")),
    ("lacks return_mean", edit("eval.csv", lambda text: text.replace("return_mean", "mean"))),
    ("not finite", edit("eval.csv", lambda text: re.sub(r"1,1798\d+,", "1,nan,", text))),
    ("no row of seed 2", set_argument("num_seeds", 2)),
    ("not finite", edit("eval.csv", lambda text: re.sub(r",0,[\d.e+]+,", ",0,nan,", text))),
    ("out of order", edit("eval.csv", lambda text: text + text.splitlines()[-1] + "\n")),
    ("is not finished: at step", edit("eval.csv", lambda text: text[: text[:-1].rindex("\n") + 1])),
]


@pytest.mark.parametrize(
    ("reason", "damage"), DAMAGES, ids=[f"{i} {reason}" for i, (reason, _) in enumerate(DAMAGES)]
)
def test_damaged_runs_are_named_and_skipped(tmp_path, capsys, reason, damage):
    """Otherwise a broken or half run is averaged in, or one of them stops every figure."""
    write_run(tmp_path / "good", "ppo_gaussian", "FishSwim", rising(100))
    write_run(tmp_path / "bad", "ppo_gaussian", "FishSwim", rising(500))
    damage(tmp_path / "bad")
    (group,) = runs.load((tmp_path,))
    assert runs.final_returns(group) == pytest.approx([100])
    out = capsys.readouterr().out
    assert f"skipped: {tmp_path / 'bad'} (" in out and reason in out and out.count("\n") == 1


def test_a_seed_counts_once(tmp_path, capsys):
    """Otherwise a packed copy of a run narrows the std, or an old run hides the one that replaced
    it.
    """
    write_run(tmp_path / "a", "ppo_gaussian", "FishSwim", rising(100, 1), seeds=(1, 2))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write_run(tmp_path / "c", "ppo_gaussian", "FishSwim", rising(300), seeds=(2, 3))
    for time, end in ((1700000000, 40), (1790000000, 50)):
        write_run(
            tmp_path / f"FishSwim__x__4__{time}",
            "ppo_gaussian",
            "FishSwim",
            rising(end),
            seeds=(4,),
        )
    (group,) = runs.load((tmp_path,))
    assert runs.final_returns(group) == pytest.approx([101, 102, 300, 50])
    out = capsys.readouterr().out
    assert f"seed 1 of {tmp_path / 'b'} (a copy of {tmp_path / 'a'})" in out
    assert f"seed 2 of {tmp_path / 'c'} (there is already {tmp_path / 'a'})" in out


def test_experiments_and_links(tmp_path):
    """Otherwise an edited script's runs are averaged with the original's, or linked runs are not
    seen.
    """
    write_run(tmp_path / "disk/a", "ppo_gaussian", "FishSwim", rising(100))
    write_run(
        tmp_path / "disk/b",
        "ppo_gaussian",
        "FishSwim",
        rising(300),
        seeds=(2,),
        exp_name="no_entropy",
    )
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/link").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/loop").symlink_to(tmp_path / "disk")
    chosen = runs.select(options(tmp_path / "runs"))
    got = [(group.label, *runs.final_returns(group)) for group in chosen]
    assert got == [("PPO", pytest.approx(100)), ("PPO, no_entropy", pytest.approx(300))]
    assert style.line(chosen[1])["color"] == style.SPARE[0]
    (chosen,) = runs.select(options(tmp_path / "runs", where=("exp_name=no_entropy",)))
    assert runs.final_returns(chosen) == pytest.approx([300])


def test_unfinished_runs_on_request(tmp_path):
    """Otherwise a run cannot be looked at while it runs; or its seeds end at different steps."""
    for seed, rows in ((1, 10), (2, 20)):
        folder = tmp_path / str(seed)
        write_run(folder, "ppo_gaussian", "FishSwim", rising(180), seeds=(seed,))
        edit("eval.csv", lambda text, rows=rows: "\n".join(text.splitlines()[:rows]))(folder)
    with pytest.raises(runs.CannotDraw):
        runs.select(options(tmp_path))
    (group,) = runs.select(options(tmp_path, unfinished=True))
    steps, returns = runs.align(group)
    assert len(steps) == 8 and returns.shape == (2, 8)  # a row without its end does not count


def test_finished_runs_count_before_unfinished_ones(tmp_path):
    """Otherwise a run that was just started takes the place of a finished one."""
    write_run(tmp_path / "x__1700000000", "ppo_gaussian", "FishSwim", rising(100))
    write_run(tmp_path / "x__1790000000", "ppo_gaussian", "FishSwim", rising(500))
    edit("eval.csv", lambda text: "".join(text.splitlines(keepends=True)[:3]))(
        tmp_path / "x__1790000000"
    )
    (group,) = runs.load((tmp_path,), unfinished=True)
    assert runs.final_returns(group) == pytest.approx([100])


def test_where_reads_values_as_a_user_writes_them(tmp_path):
    """Otherwise a run is not found by the very argument that it was started with."""
    write_run(tmp_path / "a", "gorl_fm_ppo", "FishSwim", rising(1))
    set_argument("reinit_critic", True)(tmp_path / "a")
    write_run(tmp_path / "b", "gorl_fm_ppo", "HopperStand", rising(2))
    for where, task in (
        ("reinit-critic=true", "FishSwim"),
        ("reinit_critic=False", "HopperStand"),
        ("stage_timesteps=6e7,60000000,3e7,30000000", "FishSwim HopperStand"),
    ):
        chosen = runs.select(options(tmp_path, where=(where,)))
        assert [group.task for group in chosen] == task.split()
    with pytest.raises(SystemExit):
        runs.select(options(tmp_path, where=("gamma=0.9", "gamma=0.99")))


def test_align_interpolates(tmp_path):
    """Otherwise rows are averaged that belong to different steps."""
    write_run(tmp_path / "a", "ppo_gaussian", "FishSwim", rising(100), seeds=(1,), every=50)
    write_run(tmp_path / "b", "ppo_gaussian", "FishSwim", rising(300), seeds=(2,), every=7)
    (group,) = runs.load((tmp_path,))
    steps, returns = runs.align(group)
    assert set(steps) == set(group.curves[1].steps) | set(group.curves[2].steps)
    line = steps / steps[-1]
    np.testing.assert_allclose(returns, [100 * line, 300 * line], rtol=1e-5)
    mean, std = runs.mean_std(returns)
    np.testing.assert_allclose(mean, 200 * line, rtol=1e-5)
    np.testing.assert_allclose(std, 100 * np.sqrt(2) * line, rtol=1e-5)  # n - 1
    assert np.isnan(runs.mean_std(returns[:1])[1]).all()


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
@pytest.mark.parametrize(
    "line",
    ["", "--preset cpu", "--total-timesteps 50000000", "--total-timesteps 7000003"],
)
def test_budgets_are_the_scripts(script, line, monkeypatch):
    """Otherwise finished runs are taken for unfinished ones, or the reverse."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *line.split()])
    args = script.parse_args()
    if script in GORL:
        assert runs.default_stages(args.total_timesteps) == list(args.stage_timesteps)
    assert runs.last_step(asdict(args)) == policy_steps(args)[-1]


def policy_steps(args):
    """Steps at which a script saves policies."""
    iterations = args.stage_ends if hasattr(args, "stage_ends") else args.policy_iterations
    return [n * args.steps_per_iteration for n in iterations]


FIRST_VERSION = {"max_grad_norm": [0.0], "latent_penalty": "kl", "reinit_critic": False}
FIRST_VERSION |= {"decoder_from_scratch": False, "distributed": None, "checkpoint_env_state": True}
FIRST_VERSION |= {"kl_coef": [0.001], "checkpoint_minutes": 30.0}


def test_logs_of_the_first_version_are_drawn_beside_new_ones(tmp_path):
    """Otherwise the old logs of `results/` are taken for runs of other settings."""
    write_run(tmp_path / "new", "gorl_fm_ppo", "FishSwim", rising(1), seeds=(1, 2))
    changes = {"old": {}, "bound": {"max_grad_norm": [0.5, 1.0]}, "beta": {"kl_coef": [0.1]}}
    for seed, (name, change) in enumerate(changes.items(), start=3):
        write_run(tmp_path / name, "gorl_fm_ppo", "FishSwim", rising(1), seeds=(seed,))
        for argument, value in (FIRST_VERSION | change).items():
            set_argument(argument, value)(tmp_path / name)
    write_run(tmp_path / "new_beta", "gorl_fm_ppo", "FishSwim", rising(1), kl_coef=0.1)
    got = {runs.shown(list(g.settings.items())): sorted(g.curves) for g in runs.load((tmp_path,))}
    assert got == {"": [1, 2, 3], "max_grad_norm,0.5,1.0": [4], "kl_coef,0.1": [1, 5]}
    (chosen,) = runs.select(options(tmp_path, where=("max_grad_norm=0.5,1",)))
    assert sorted(chosen.curves) == [4]


def test_unknown_scripts_do_not_stop_anything(tmp_path, capsys):
    """Otherwise the log of a program that is not here hides all others."""
    write_run(tmp_path / "a", "ppo_gaussian", "FishSwim", rising(100))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    set_argument("versions", {"script": "../../evil.py"})(tmp_path / "b")
    set_argument("exp_name", "evil")(tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    set_argument("learning_rate", 1.0)(tmp_path / "c")
    names = [group.label for group in runs.select(options(tmp_path))]
    assert names == ["PPO", "evil"]
    assert "left out: 1 other" in capsys.readouterr().out  # of another learning rate


def test_named_runs_are_drawn_as_they_are(tmp_path, capsys):
    """Otherwise a user's own run needs arguments to be seen, or is not seen before it ends."""
    write_run(tmp_path / "a", "gorl_fm_ppo", "CheetahRun", rising(5), preset="cpu", kl_coef=0.1)
    write_run(tmp_path / "b", "gorl_fm_ppo", "CheetahRun", rising(7), num_envs=64)
    write_run(tmp_path / "c", "gorl_fm_ppo", "CheetahRun", rising(9), preset="cpu", gamma=0.9)
    edit("eval.csv", lambda text: "".join(text.splitlines(keepends=True)[:4]))(tmp_path / "a")
    for run in "ab":
        (group,) = runs.select(runs.Options(runs=(tmp_path / run,), out=tmp_path))
        assert group.label == "GoRL(FM)" and group.curves[1].run == tmp_path / run
    two = runs.select(runs.Options(runs=(tmp_path / "a", tmp_path / "c"), out=tmp_path))
    labels = {"GoRL(FM), gamma=0.995, kl_coef=0.1", "GoRL(FM), gamma=0.9, kl_coef=0.001"}
    assert {group.label for group in two} == labels
    assert "left out" not in capsys.readouterr().out
    write_run(tmp_path / "d", "gorl_fm_ppo", "CheetahRun", rising(9), preset="cpu", gamma=0.9)
    write_run(tmp_path / "e", "fpo", "CheetahRun", rising(9), exp_name="x")
    named = runs.Options(runs=tuple(tmp_path / run for run in "cde"), out=tmp_path)
    labels = [group.label for group in runs.select(named)]
    assert labels == ["FPO, x", "GoRL(FM), c", "GoRL(FM), d"]  # one seed twice: both are drawn
    rows = table_1.draw(named)[1].read_text()
    assert all(f"| {label} " in rows for label in labels)


def test_folders_are_side_by_side(tmp_path):
    """Otherwise a user's seeds are averaged with those of `results/`."""
    for folder, seeds in (("mine", (1, 2)), ("theirs", (2, 3))):
        write_run(tmp_path / folder / "a", "ppo_gaussian", "FishSwim", rising(1), seeds=seeds)
    write_run(tmp_path / "theirs" / "earlier" / "b", "ppo_gaussian", "FishSwim", rising(1), (4,))
    write_run(tmp_path / "mine" / "fork", "fpo", "FishSwim", rising(2))
    both = runs.Options(runs=(tmp_path / "mine", tmp_path / "theirs"), out=tmp_path)
    got = {group.label: sorted(group.curves) for group in runs.select(both)}
    mine, theirs = (f"PPO, {tmp_path / name}" for name in ("mine", "theirs"))
    assert got == {mine: [1, 2], theirs: [2, 3], "FPO": [1]}
    assert len({str(style.line(group)) for group in runs.select(both)}) == 3
    (earlier,) = runs.select(runs.Options(runs=(tmp_path / "theirs/earlier",), out=tmp_path))
    assert sorted(earlier.curves) == [4]


def test_methods_are_compared_under_equal_conditions(tmp_path):
    """Otherwise a discount or a length is taken for a method's merit."""
    letter = {"gamma": 0.95, "advantage_temperature": 0.0, "exp_name": "gorl_fm_ppo_letter"}
    for name, method, changes in (
        ("long", "ppo_gaussian", {"gamma": 0.95}),
        ("long_fm", "gorl_fm_ppo", {"gamma": 0.95}),
        ("long_letter", "gorl_fm_ppo", letter),
        ("beta", "gorl_fm_ppo", {"gamma": 0.95, "kl_coef": 0.5}),
        ("other", "gorl_fm_ppo", {}),
        ("short", "fpo", {"gamma": 0.95, "total_timesteps": 6_000_000}),
        ("frozen", "gorl_fm_ppo", {"decoder_from": "x/policy_1.npz"}),
    ):
        write_run(tmp_path / name, method, "FishSwim", rising(1), **changes)
    chosen = {group.label: group.curves[1].run.name for group in runs.select(options(tmp_path))}
    assert chosen == {"PPO": "long", "GoRL(FM)": "long_fm", "GoRL(FM), letter": "long_letter"}
    for where, names in (("gamma=0.995", {"other"}), ("decoder_from=policy_1", {"frozen"})):
        chosen = runs.select(options(tmp_path, where=(where,)))
        assert {group.curves[1].run.name for group in chosen} == names


def test_missing_folders_are_an_error(tmp_path, capsys):
    """Otherwise a mistyped path gives a figure without the runs that were meant."""
    with pytest.raises(SystemExit) as error:
        runs.find(tmp_path / "rnus")
    assert error.value.code == 2 and "--runs: got" in capsys.readouterr().err
    write_run(tmp_path / "a", "ppo_gaussian", "FishSwim", rising(100))
    for where in ("clip_eps", "clip_esp=0.1", "env_id=HopperStand", "seed=1"):
        with pytest.raises(SystemExit) as error:
            runs.select(options(tmp_path, where=(where,)))
        assert (
            error.value.code == 2
            and f"--where: got {where.split('=')[0]}" in capsys.readouterr().err
        )
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        with pytest.raises(SystemExit) as error:
            runs.Options(out=tmp_path / out)
        assert error.value.code == 2 and "--out: got" in capsys.readouterr().err


# --- figures and tables


def test_figure_4(tmp_path, figures):
    """Otherwise a panel lacks a curve, a curve is another method's, or a legend hides data."""
    for i, method in enumerate(paper.METHODS):
        for j, task in enumerate(("CheetahRun", "HopperStand")):
            end = 100 * (i + 1) + 10 * j
            write_run(tmp_path / f"{method}{task}", method, task, rising(end, 1), seeds=(1, 2, 3))
    after = "seed,step,deterministic_after\n1,59965440,10\n2,59965440,20\n3,59965440,60\n"
    (tmp_path / "gorl_fm_ppoCheetahRun/refine.csv").write_text(after)
    figure_4.draw(options(tmp_path))
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == ["CheetahRun", "HopperStand"]
    rings = [line for axes in figure.axes for line in axes.get_lines() if line.get_marker() == "o"]
    (ring,) = rings
    assert ring.axes is figure.axes[0] and ring.get_color() == style.COLOURS["gorl_fm_ppo"]
    assert (*ring.get_xdata(), *ring.get_ydata()) == (59.96544, 30)
    for j, axes in enumerate(figure.axes):
        curves = {line.get_label(): line for line in axes.get_lines()}
        for i, (method, name) in enumerate(paper.METHODS.items()):
            x, y = curves[name].get_data()
            assert curves[name].get_color() == style.COLOURS[method]
            assert (x[0], y[0]) == (0, 0) and x[-1] == pytest.approx(179.9, abs=0.1)
            assert y[-1] == pytest.approx(100 * (i + 1) + 10 * j + 2)
            band = next(
                b
                for b in axes.findobj(PolyCollection)
                if tuple(b.get_facecolor()[0][:3]) == to_rgb(style.COLOURS[method])
            )
            right = band.get_paths()[0].vertices
            right = right[right[:, 0] > 179, 1]
            assert (right.min(), right.max()) == pytest.approx((y[-1] - 1, y[-1] + 1))  # one std
        refined = [
            line.get_xdata()[0]
            for line in axes.get_lines()
            if line.get_label().startswith("decoder")
        ]
        assert refined == [60, 120, 150]
        assert (
            axes.get_xlim()[0] == 0 == axes.get_ylim()[0]
            and axes.get_xlabel() == "environment steps (M)"
        )
        marked = [c.lines[0].get_data() for c in axes.containers]  # the paper's final returns
        assert [float(y[0]) for _, y in marked] == [
            paper.reported(m, axes.get_title())[0] for m in paper.METHODS.values()
        ]
        assert all(x[0] > 180 for x, _ in marked)
    assert "over 3 seeds, fewer than the paper's 5." in figure.get_suptitle().replace("\n", " ")
    figure.canvas.draw()
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    others = {"decoder refined (GoRL)", "the paper's Table 1", "right after a refinement"}
    assert set(names) == {*paper.METHODS.values(), *others}
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0


def test_figure_4_says_what_it_is(tmp_path, figures):
    """Otherwise a small run is taken for a reproduction."""
    write_run(tmp_path / "a", "gorl_fm_ppo", "CheetahRun", rising(100), preset="cpu")
    figure_4.draw(options(tmp_path))
    text = figures[0].get_suptitle().replace("\n", " ")
    assert "One seed, fewer" in text and "--preset cpu" in text
    assert "1.2M steps; the paper has 180M" in text
    assert not figures[0].axes[0].containers  # the paper's returns are no comparison here


def test_unfinished_figures_say_so(tmp_path, figures):
    """Otherwise a curve of 12M steps is read as one of 180M, or two methods are ranked at different
    steps.
    """
    write_run(tmp_path / "a", "ppo_gaussian", "CheetahRun", rising(100), seeds=(1, 2))
    write_run(tmp_path / "b", "fpo", "CheetahRun", rising(100), seeds=(1, 2))
    edit("eval.csv", lambda text: "".join(text.splitlines(keepends=True)[:5]))(tmp_path / "b")
    figure_4.draw(options(tmp_path, unfinished=True))
    text = figures[0].get_suptitle().replace("\n", " ")
    assert "5.9M to 180M steps; the paper has 180M. Not all runs are finished." in text
    write_run(tmp_path / "c", "ppo_gaussian", "CheetahRun", lambda seed, x: x / 1e8 - 5)
    named = tuple(tmp_path / run for run in "bc")
    figure_4.draw(runs.Options(runs=named, out=tmp_path, unfinished=True))
    low, high = figures[1].axes[0].get_ylim()
    assert low <= -5 < 0 <= high  # returns below 0 are shown, and b to where it has come
    (text,) = (
        f.read_text()
        for f in table_1.draw(options(tmp_path, unfinished=True))
        if f.suffix == ".txt"
    )
    assert "FPO         -" in text and "no run here" in text
    with pytest.raises(runs.CannotDraw):
        aggregate.draw(options(tmp_path, unfinished=True))


def test_files_and_fonts(tmp_path):
    """Otherwise fonts are pictures, or files are not where --out says."""
    write_run(tmp_path / "a", "ppo_gaussian", "FishSwim", rising(100), seeds=(1, 2))
    files = figure_4.draw(options(tmp_path))
    assert [file.name for file in files] == ["figure_4.png", "figure_4.pdf"]
    pdf = files[1].read_bytes()
    assert b"/Type /Font" in pdf and b"/FontFile2" in pdf and b"/Type3" not in pdf
    assert files[0].read_bytes().startswith(b"\x89PNG")


def test_table_1(tmp_path):
    """Otherwise a number, its neighbour's or its sign is wrong in one of the three formats."""
    write_run(tmp_path / "a", "ppo_gaussian", "CheetahRun", rising(700, 10), seeds=(1, 2, 3))
    write_run(tmp_path / "b", "gorl_fm_ppo", "CheetahRun", rising(600, 1), seeds=(1, 2))
    write_run(tmp_path / "c", "gorl_fm_ppo", "HopperStand", rising(733.66), seeds=(1,))
    files = {file.suffix: file.read_text() for file in table_1.draw(options(tmp_path))}
    lines = [re.sub(" +", " ", line) for line in files[".md"].splitlines()]
    assert lines[0] == "| task | method | ours | the paper | our seeds x steps |"
    assert lines[2:7] == [
        "| CheetahRun | PPO | **720.0 ± 10.0** | 724.83 ± 155.67 | 3 x 179.9M |",
        "| CheetahRun | FPO | - | 599.15 ± 297.45 | no run here |",
        "| CheetahRun | DPPO | - | 559.79 ± 99.97 | no run here |",
        "| CheetahRun | GoRL(DIFF) | - | **902.24 ± 2.20** | no run here |",
        "| CheetahRun | GoRL(FM) | 601.5 ± 0.7 | 883.40 ± 19.94 | 2 x 179.9M |",
    ]
    # One seed has no std; a method alone is not bold.
    assert lines[11] == "| HopperStand | GoRL(FM) | 733.7 | 733.66 ± 223.76 | 1 x 179.9M |"
    assert "Fewer seeds than the paper's 5" in files[".md"] and "says nothing" not in files[".md"]
    assert "Not run: FingerSpin, FingerTurnHard, FishSwim, WalkerWalk." in files[".md"]
    body = [line for line in files[".tex"].splitlines() if "&" in line]
    assert len(body) == 1 + 2 * 5 and all(line.count("&") == 4 and r"\\" in line for line in body)
    assert sum(r"\addlinespace" in line for line in body) == 1 and r"\addlinespace" in body[5]
    assert r"$\mathbf{720.0 \pm 10.0}$" in files[".tex"] and "*720.0 ± 10.0*" in files[".txt"]
    assert r"Fewer seeds than the paper's 5" in files[".tex"].replace("%", "")


def test_table_1_of_small_runs_says_so(tmp_path):
    """Otherwise 1.2M steps are compared with 180M as if that meant something."""
    write_run(tmp_path / "a", "ppo_gaussian", "CheetahRun", rising(700), preset="cpu")
    (text,) = (f.read_text() for f in table_1.draw(options(tmp_path)) if f.suffix == ".txt")
    assert "1 x 1.198M" in text and "a difference says nothing" in text


def test_best_by_the_papers_rule():
    """Otherwise what is bold is not the highest mean."""
    assert (
        table_1.best({"a": 1.0, "b": 2.0, "c": 2.0}) == {"b", "c"}
        and table_1.best({"a": 1.0}) == set()
    )


def fake_groups(values):
    """Groups with these final returns by seed, by (name, task)."""

    def group(name, task, by_seed):
        curves = {
            s: runs.Curve(np.array([0, 10]), np.array([0, r]), Path()) for s, r in by_seed.items()
        }
        return runs.Group(name, task, "paper", {}, 10, 10, curves, label=name)

    return [group(*key, by_seed) for key, by_seed in values.items()]


def final_scores(values):
    return aggregate.scores(fake_groups(values), runs.final_returns)


def test_aggregate_against_scipy():
    """Otherwise interval or estimate is not that of the seeds."""
    rng = np.random.default_rng(0)
    tasks, seeds = ("CheetahRun", "HopperStand", "WalkerWalk"), range(1, 6)
    values = {
        (m, t): {s: level + 100 * i + 5 * rng.normal() for s in seeds}
        for m, level in (("PPO", 100), ("GoRL(FM)", 130), ("FPO", 101))
        for i, t in enumerate(tasks)
    }
    by_name, got_tasks = final_scores(values)
    assert got_tasks == list(tasks) and by_name["FPO"].shape == (5, 3)
    assert by_name["FPO"][1, 2] == values["FPO", "WalkerWalk"][2]
    iqm, better = aggregate.statistics(by_name, reps=300)
    for name, x in by_name.items():
        estimate, low, high = iqm[name]
        assert estimate == pytest.approx(stats.trim_mean(x, 0.25, axis=None))
        draws = [
            stats.trim_mean(x[rng.integers(5, size=x.shape), np.arange(3)], 0.25, axis=None)
            for _ in range(1000)
        ]
        np.testing.assert_allclose([low, high], np.quantile(draws, [0.025, 0.975]), atol=0.8)
        assert high - low < 15  # the tasks, 100 apart, are strata: they do not widen it
    assert better["GoRL(FM)"] == (1, 1, 1) and "PPO" not in better
    x, y = by_name["FPO"], by_name["PPO"]
    wins = [a > b for t in range(3) for a in x[:, t] for b in y[:, t]]
    assert better["FPO"][0] == pytest.approx(np.mean(wins))
    assert better["FPO"][1] < better["FPO"][0] < better["FPO"][2]
    assert aggregate.statistics(by_name, reps=100) == aggregate.statistics(by_name, reps=100)
    # Nor does an interval depend on what stands beside it, before or after.
    more = {"another": by_name["PPO"] + 1} | by_name | {"last": by_name["PPO"] - 1}
    for alone, beside in zip(
        *(aggregate.statistics(x, reps=100) for x in (by_name, more)), strict=True
    ):
        assert alone.items() <= beside.items()


def test_aggregate_uses_what_is_common(capsys):
    """Otherwise methods are compared on different tasks or seeds."""
    values = {
        ("PPO", "CheetahRun"): {1: 1.0, 2: 2.0, 3: 3.0},
        ("FPO", "CheetahRun"): {2: 20.0, 3: 30.0, 4: 40.0},
        ("FPO", "FishSwim"): {2: 5.0, 3: 6.0},
    }
    by_name, tasks = final_scores(values)
    assert tasks == ["CheetahRun"] and "have run them: FishSwim" in capsys.readouterr().out
    assert {name: x.tolist() for name, x in by_name.items()} == {
        "FPO": [[20], [30], [40]],
        "PPO": [[1], [2], [3]],
    }
    for few in ({("FPO", "FishSwim"): {1: 1.0, 2: 2.0}}, {k: {1: 1.0} for k in values}):
        with pytest.raises(runs.CannotDraw):
            final_scores(few)
    del values["FPO", "CheetahRun"], values["PPO", "CheetahRun"]
    values |= {("GoRL(FM)", "FishSwim"): {1: 7.0, 2: 8.0}}
    iqm, better = aggregate.statistics(final_scores(values)[0], reps=100)
    assert set(iqm) == {"FPO", "GoRL(FM)"} and better == {}  # without PPO, nothing to compare with


def test_area_under_a_curve():
    """Otherwise a method that learns early counts as one that learns late."""
    curve = runs.Curve(np.array([0, 10, 40]), np.array([0.0, 100.0, 100.0]), Path())
    group = runs.Group("x", "FishSwim", "paper", {}, 40, 40, {1: curve, 2: curve})
    assert aggregate.area(group).tolist() == [87.5, 87.5]


def test_aggregate_figure(tmp_path, figures):
    """Otherwise the picture or the text shows other numbers than the statistics."""
    for method, end in (("ppo_gaussian", 100), ("fpo", 50), ("gorl_fm_ppo", 200)):
        write_run(tmp_path / method, method, "CheetahRun", rising(end, 1), seeds=(1, 2, 3))
    (tmp_path / "out").mkdir()
    write_run(tmp_path / "alone", "dppo", "CheetahRun", rising(9))  # one seed
    *_, text = aggregate.draw(options(tmp_path), reps=100)
    left, *others = figures[0].axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["GoRL(FM)", "FPO", "PPO"]
    for panel in figures[0].axes:
        ends = [line.get_xdata()[0] for line in panel.get_lines()]
        assert panel.get_xlim()[0] <= min(ends) <= max(ends) <= panel.get_xlim()[1]
    for panel in others:
        assert [t.get_text() for t in panel.get_yticklabels()] == ["GoRL(FM)", "FPO"]
    line = text.read_text().splitlines()[-1]
    assert line.startswith("GoRL(FM): IQM of the last return 202.0 [")
    assert "P(last return above PPO's) 1.00 [1.00, 1.00]; IQM of the area 101.0 [" in line
    assert line.endswith("P(area above PPO's) 1.00 [1.00, 1.00]")


def test_figure_5(tmp_path, figures, capsys):
    """Otherwise a beta's curve is another's, or the default beta is missing from the sweep."""
    write_run(tmp_path / "default", "gorl_fm_ppo", "CheetahRun", rising(300), seeds=(1, 2))
    with pytest.raises(runs.CannotDraw, match=r"only beta 0\.001"):
        figure_5.draw(options(tmp_path))
    runs.load.cache_clear()
    for beta, end in ((0.1, 100), (0.0, 200)):
        write_run(
            tmp_path / str(beta),
            "gorl_fm_ppo",
            "CheetahRun",
            rising(end),
            seeds=(1, 2),
            kl_coef=beta,
        )
    write_run(tmp_path / "other", "gorl_fm_ppo", "CheetahRun", rising(9), kl_coef=0.5, gamma=0.9)
    write_run(tmp_path / "twice", "gorl_fm_ppo", "CheetahRun", rising(8), kl_coef=[0.1, 0.1])
    figure_5.draw(options(tmp_path))
    left, right = figures[0].axes
    ends = {line.get_label(): line.get_ydata()[-1] for line in left.get_lines()}
    assert ends == {r"$\beta$ = 0": 200, r"$\beta$ = 0.001": 300, r"$\beta$ = 0.1": 100}
    assert [t.get_text() for t in right.get_xticklabels()] == ["0", "0.001", "0.1"]
    assert right.collections[-1].get_offsets()[:, 1].tolist() == [200, 300, 100]
    missing = "0.0001, 0.0005, 0.005, 0.01, 0.05 have not been run"
    assert missing in figures[0].get_suptitle().replace("\n", " ")
    assert "left out: 2 other settings" in capsys.readouterr().out


def test_figure_5_of_short_runs(tmp_path, figures):
    """Otherwise a sweep cannot be drawn if it is shorter than the paper's, or beside other runs."""
    write_run(tmp_path / "other", "ppo_gaussian", "FishSwim", rising(300))
    for beta, end in ((0.001, 100), (0.0, 200)):
        write_run(
            tmp_path / str(beta),
            "gorl_fm_ppo",
            "CheetahRun",
            rising(end),
            preset="cpu",
            kl_coef=beta,
        )
    figure_5.draw(options(tmp_path))
    for beta, end in ((0.001, 10), (0.1, 20)):
        more = {"kl_coef": beta, "total_timesteps": 6_000_000}
        write_run(tmp_path / f"short{beta}", "gorl_fm_ppo", "CheetahRun", rising(end), **more)
    runs.load.cache_clear()
    figure_5.draw(options(tmp_path, where=("total_timesteps=6000000",)))
    ends = [[line.get_ydata()[-1] for line in figure.axes[0].get_lines()] for figure in figures]
    assert ends == [[200, 100], [10, 20]]


def on_decoder(run, task, stage, end, seed=1, total=60_000_000, preset="paper"):
    """A run of one stage on the frozen decoder of a stage of tmp_path/source_<seed>."""
    budget = {"total_timesteps": total, "stage_timesteps": [total]}
    source = run.parent / f"source_{task}_{seed}"
    if not source.is_dir():
        write_run(source, "gorl_fm_ppo", task, rising(999), seeds=(seed,))
    step = [59_965_440, 119_930_880, 150_405_120, 179_896_320][stage]
    budget["decoder_from"] = f"{source}/checkpoints/policy_{step}.npz"
    write_run(run, "gorl_fm_ppo", task, rising(end), seeds=(seed,), preset=preset, **budget)


def test_figure_6(tmp_path, figures):
    """Otherwise a decoder's stage is mixed up with another's, or with ordinary runs."""
    with pytest.raises(runs.CannotDraw, match="decoder-from"):
        figure_6.draw(options(tmp_path))
    write_run(tmp_path / "ordinary", "gorl_fm_ppo", "CheetahRun", rising(999))
    for task in ("CheetahRun", "HopperStand"):
        for stage in range(4):
            for seed in (1, 2):
                run = tmp_path / f"{task}{stage}{seed}"
                on_decoder(run, task, stage, 100 * stage + 50, seed)
                if seed == 2:  # as the first version wrote it
                    set_argument("decoder_from", f"runs/a:b_{seed}:{stage}")(run)
    whole = tmp_path / "four_stages"
    write_run(whole, "gorl_fm_ppo", "CheetahRun", rising(7), decoder_from="x/policy_1.npz")
    runs.load.cache_clear()
    figure_6.draw(options(tmp_path))
    titles = [axes.get_title() for axes in figures[0].axes]
    assert titles == ["GoRL(FM), CheetahRun", "GoRL(FM), HopperStand"]
    names = [f"decoder of stage {stage}" for stage in range(4)]
    names[0] += " (untrained)"
    for axes in figures[0].axes:
        ends = [(line.get_label(), line.get_ydata()[-1]) for line in axes.get_lines()]
        assert ends == list(zip(names, [50, 150, 250, 350], strict=True))
    caption = "Mean and standard deviation over 2 seeds, fewer than the paper's 5."
    assert figures[0].get_suptitle() == caption
    shutil.rmtree(tmp_path / "HopperStand32")
    shutil.rmtree(tmp_path / "HopperStand31")
    for stage in range(4):
        on_decoder(tmp_path / f"short{stage}", "HopperStand", stage, 7, total=30_000_000)
    runs.load.cache_clear()
    figure_6.draw(options(tmp_path))
    assert "30M to 60M steps; the paper has 60M." in figures[1].get_suptitle().replace("\n", " ")


def test_figure_6_without_the_decoders_run(tmp_path, figures):
    """Otherwise a decoder is given a stage that nobody knows, or the figure is not drawn."""
    for stage in (0, 3):
        on_decoder(tmp_path / str(stage), "CheetahRun", stage, 50)
    shutil.rmtree(tmp_path / "source_CheetahRun_1")
    figure_6.draw(options(tmp_path))
    names = [line.get_label() for line in figures[0].axes[0].get_lines()]
    assert names == ["decoder of policy_179896320", "decoder of policy_59965440"]


# --- multimodality


def test_gain_of_known_distributions():
    """Otherwise the number for multimodality is not what it says."""
    rng = np.random.default_rng(0)
    assert abs(figure_7.gain(rng.normal(size=(10_000, 4)) @ rng.normal(size=(4, 4)))) < 0.01
    sign = rng.choice([-1, 1], size=(10_000, 1))
    two = np.concatenate(
        [2 * sign + rng.normal(size=(10_000, 1)), rng.normal(size=(10_000, 2))], axis=1
    )
    x = np.linspace(-9, 9, 20_001)
    mixture = 0.5 * (stats.norm.pdf(x, -2) + stats.norm.pdf(x, 2))
    divergence = np.trapezoid(mixture * np.log(mixture / stats.norm.pdf(x, 0, np.sqrt(5))), x)
    assert figure_7.gain(two) == pytest.approx(divergence, abs=0.03)
    assert figure_7.gain(rng.exponential(size=(10_000, 1))) > 0.1  # skewed


def test_dip_of_known_distributions():
    """Otherwise two peaks are claimed where there is one, or not seen."""
    rng, n, x = np.random.default_rng(0), 10_000, np.linspace(-6, 6, 400)
    assert figure_7.dip(np.array([0, 1, 3, 2, 1])) == 0
    assert figure_7.dip(np.array([0, 4, 1, 2, 0])) == 0.5
    assert figure_7.dip(np.array([0, 4, 3, 4, 2, 8, 0])) == 0.5
    one_peak = {
        "normal": rng.normal(size=n),
        "uniform": rng.uniform(-2, 2, size=n),
        "exponential": rng.exponential(size=n),
        "heavy tails": rng.standard_t(3, size=n),
    }
    for name, samples in one_peak.items():
        assert figure_7.dip(figure_7.kernel_density(samples, x)) < 0.12, name
    sign, wide = rng.choice([-1.5, 1.5], size=n), rng.uniform(size=n) < 0.1
    two = np.where(wide, 3 * rng.normal(size=n), sign + 0.5 * rng.normal(size=n))
    assert figure_7.dip(figure_7.kernel_density(two, x)) > 0.7
    apart = 2 * np.sign(sign) + rng.normal(size=n)
    width = np.sqrt(
        1 + (0.8 * n**-0.2) ** 2 * 5
    )  # of a peak, after the kernels: their std is a share of the samples'
    want = 1 - 2 * stats.norm.pdf(2, 0, width) / (
        stats.norm.pdf(0, 0, width) + stats.norm.pdf(4, 0, width)
    )
    assert figure_7.dip(figure_7.kernel_density(apart, x)) == pytest.approx(want, abs=0.06)


@pytest.mark.parametrize("preset", ["paper", "cpu"])
@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_figure_7_finds_the_policies(tmp_path, script, preset, monkeypatch):
    """Otherwise panels are empty, or show the policy of another third of the training."""
    line = [script.__file__, "--preset", preset, "--env-id", "HopperStand"]
    monkeypatch.setattr(sys, "argv", line)
    steps = policy_steps(script.parse_args())
    write_run(tmp_path / "a", script.__name__, "HopperStand", rising(1), preset=preset)
    folder = tmp_path / "a/checkpoints"
    folder.mkdir()
    for name in (*(f"policy_{step}.npz" for step in steps), "policy_best.npz", "state_1.npz"):
        (folder / name).touch()
    (group,) = runs.load((tmp_path,))
    assert figure_7.wanted_steps(group, tmp_path / "a") == [steps[0], steps[1], steps[3]]
    (folder / f"policy_{steps[0]}.npz").unlink()
    assert figure_7.wanted_steps(group, tmp_path / "a") == [None, steps[1], steps[3]]


def test_projection_and_density():
    """Otherwise the axis shows how methods differ and not how they spread, or smears the curve."""
    rng, direction = np.random.default_rng(0), np.array([0.6, -0.8, 0.0])
    spread = rng.normal(size=(5000, 1)) * direction + 0.1 * rng.normal(size=(5000, 3))
    wide = 10 * rng.normal(size=(5000, 3)) * [0, 0, 1]
    axis = figure_7.common_projection([spread, spread[:2500] + [0, 0, 100], wide])
    np.testing.assert_allclose(axis, [-0.6, 0.8, 0.0], atol=0.02)
    samples, x = rng.normal(size=10_000), np.linspace(-3, 3, 13)
    width = np.sqrt(1 + (0.8 * 10_000**-0.2) ** 2)
    np.testing.assert_allclose(
        figure_7.kernel_density(samples, x), stats.norm.pdf(x, 0, width), atol=0.015
    )


def test_figure_2(tmp_path):
    """Otherwise the page's first picture cannot be made again, or is too large for it."""
    png, pdf = figure_2.draw(runs.Options(out=tmp_path))
    with Image.open(png) as picture:
        assert picture.size == (2025, 1605)
        assert len(picture.getcolors(256)) > 20
    assert png.stat().st_size < 200_000 and b"/FontFile2" in pdf.read_bytes()


# --- packing


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
@pytest.mark.parametrize(
    "line",
    [
        "--env-id FishSwim --num-seeds 5",
        "--preset cpu --seed 4 --total-timesteps 600000 --clip-eps 0.25 --track --eval-every 30000",
        "--preset cpu --env-id HopperStand --gamma 0.95 --exp-name 'my run; x'",
        "--stage-timesteps 3000000 2000000 --kl-coef 0.0 --clip-eps 0.1 0.2",
    ],
)
def test_the_packed_command_gives_the_run_again(script, line, monkeypatch):
    """Otherwise nobody can repeat a run of `results/`."""
    if "stage" in line and script not in GORL:
        pytest.skip("an argument of GoRL's")
    monkeypatch.setattr(sys, "argv", [script.__file__, *shlex.split(line)])
    args = script.parse_args()
    stored = json.loads(json.dumps(asdict(args))) | {
        "versions": {"script": Path(script.__file__).name}
    }
    command = pack.command_of(stored)
    assert command.startswith(f"python {script.__name__}.py")
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    assert script.parse_args() == replace(args, track=False)  # which is nobody else's business


def test_results_hold_no_paths_of_a_machine():
    """Otherwise a command in `results/` runs on one machine only, and tells what else is there."""
    files = [
        f
        for f in RESULTS.rglob("*")
        if f.suffix in (".json", ".csv", ".md", ".txt", ".tex", ".patch")
    ]
    assert len(files) > 50
    path = re.compile(r"(?<![\w.:/])/(work|tmp|root|home|check|Users|mnt|opt)/")
    assert path.search('"--out /tmp/x/y"') and not path.search("b/tmp/x")
    assert [str(f) for f in files if path.search(f.read_text())] == []


def test_pack(tmp_path, capsys):
    """Otherwise `results/` holds paths, big files, half runs or logs without their origin."""
    run = tmp_path / "runs/CheetahRun__gorl_fm_ppo__1__17"
    write_run(
        run, "gorl_fm_ppo", "CheetahRun", rising(9), preset="cpu", runs_dir=str(tmp_path / "runs")
    )
    policy = f"{tmp_path}/secret/x/checkpoints/policy_798720.npz"
    set_argument("decoder_from", policy)(run)
    about = {"script": "gorl_fm_ppo.py", "git_commit": "0123456", "device": "1 x test"}
    set_argument("versions", about | {"jax": "0.0", "python": "3.0", "six": "1.0"})(run)
    set_argument("stage_timesteps", [1_200_000])(run)
    (run / "checkpoints").mkdir()
    (run / "checkpoints/policy_1198080.npz").write_bytes(b"small")
    (run / "checkpoints/policy_399360.npz").write_bytes(b"0" * 2**21)
    (run / "checkpoints/state_000001198080_03_000000.npz").write_bytes(b"state")
    (run / "train.csv").write_text("seed,step\n1,2\n")
    results = tmp_path / "results"
    results.mkdir()
    pack.pack(run, to=results, name="small/fm", note="what it shows", device="2 CPU cores")
    packed = {str(file.relative_to(results)) for file in results.rglob("*") if file.is_file()}
    names = ("args.json", "eval.csv", "train.csv", "checkpoints/policy_1198080.npz")
    assert packed == {"README.md", *(f"small/fm/{name}" for name in names)}
    assert "left out:" in capsys.readouterr().err
    for name in ("small/fm/args.json", "README.md"):
        assert str(tmp_path) not in (results / name).read_text()
    packed = json.loads((results / "small/fm/args.json").read_text())
    assert set(packed["versions"]) == {*about, "jax", "python"}
    row = (results / "README.md").read_text().splitlines()[-1]
    want = [
        "`small/fm/`",
        "`python gorl_fm_ppo.py --preset cpu --stage-timesteps 1200000 "
        "--decoder-from x/checkpoints/policy_798720.npz`",
        "0123456",
        "2 CPU cores",
        "6 s",
        "what it shows",
    ]
    assert [cell.strip() for cell in row.strip("|").split("|")] == want
    assert len(runs.load((results,))) == 1
    pack.pack(run, to=results, name="other", source="results/small/of")
    found = f"--decoder-from results/small/of/checkpoints/{Path(policy).name}`"
    assert found in (results / "README.md").read_text()
    shutil.rmtree(results / "other")
    before = (results / "README.md").read_text()
    for change in (
        {"name": "small/fm"},
        {"name": "../out"},
        {"name": "b", "note": "a | b"},
        {"to": tmp_path / "no"},
    ):
        with pytest.raises(SystemExit) as error:
            pack.pack(run, **{"to": results, "name": "b"} | change)
        assert error.value.code == 2
    edit("eval.csv", lambda text: text[: text[:-1].rindex("\n") + 1])(run)
    with pytest.raises(SystemExit):
        pack.pack(run, to=results, name="b")
    assert (results / "README.md").read_text() == before and {
        p.name for p in results.iterdir()
    } == {
        "README.md",
        "small",
    }


def test_rows_are_added_to_the_table(tmp_path):
    """Otherwise a row of the README lands outside the table of runs."""
    about = dict.fromkeys(pack.COLUMNS, "x")
    readme = tmp_path / "README.md"
    for _ in range(2):
        pack.add_row(readme, about)
    readme.write_text(
        readme.read_text() + "\nMore.\n\n| other | table |\n| --- | --- |\n| 1 | 2 |\n"
    )
    pack.add_row(readme, about)
    lines = readme.read_text().splitlines()
    assert (
        [line for line in lines if line.startswith("| x")] == lines[4:7]
        and len(lines) == 13
        and lines[2].startswith("| folder")
    )


@pytest.mark.parametrize("folder", [RESULTS, RESULTS / "earlier"], ids=lambda path: path.name)
def test_every_result_has_its_origin(folder):
    """Otherwise a figure of the README rests on a log that nobody can trace."""
    lines = (folder / "README.md").read_text().splitlines()
    start = lines.index("| " + " | ".join(pack.COLUMNS) + " |")
    rows = takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    table = [line.split("|") for line in rows]
    named = {re.sub(r"<[a-z]+>", "*", row[1].strip(" `/")) for row in table}
    for run in runs.find(folder):
        path = run.relative_to(folder)
        of = [name for name in named if path.match(name) and name.count("/") == len(path.parts) - 1]
        assert len(of) == 1, path
    for name in named:
        assert list(folder.glob(name)), name
    for row in table:
        assert all(cell.strip() for cell in row[1:-1]), row


# --- everything at once


DRAWN_WITHOUT_LOGS = ("figure_1", "figure_2")


def test_all_draws_what_it_can(tmp_path, capsys, monkeypatch):
    """Otherwise one missing experiment costs every figure, or is not named."""
    monkeypatch.setenv("MUJOCO_GL", "none-such")
    (tmp_path / "empty").mkdir()
    assert everything.draw(options(tmp_path / "empty"), skip=DRAWN_WITHOUT_LOGS) == []
    out = capsys.readouterr().out
    for item in set(everything.ITEMS) - set(DRAWN_WITHOUT_LOGS):
        assert f"not drawn: {item}: " in out
    assert "MUJOCO_GL=none-such tried" in out
    with monkeypatch.context() as patch:
        patch.setattr("plotting.figure_5.draw", lambda options: 1 / 0)
        everything.draw(options(tmp_path / "empty"), skip=DRAWN_WITHOUT_LOGS)
    assert "not drawn: figure_5: ZeroDivisionError: division by zero" in capsys.readouterr().out
    write_run(tmp_path / "logs/a", "ppo_gaussian", "FishSwim", rising(100), seeds=(1, 2))
    files = everything.draw(options(tmp_path / "logs"), skip=DRAWN_WITHOUT_LOGS)
    assert {file.name for file in files} == {f"figure_4.{e}" for e in ("png", "pdf")} | {
        f"table_1.{e}" for e in ("txt", "md", "tex")
    }
    out = capsys.readouterr().out
    assert (
        "drawn: figure_4, table_1\n" in out
        and "not drawn: aggregate: an aggregate needs two methods" in out
    )
    assert "not drawn: figure_7: no saved policy" in out
    with pytest.raises(SystemExit):
        everything.draw(options(tmp_path / "logs"), skip=("figure_9",))


def test_logs_from_before_an_argument():
    """Otherwise an old run counts as one of today's defaults, and is merged with new seeds."""
    old = json.loads((RESULTS / "earlier/cpu_preset_rewritten/gorl_fm_ppo/args.json").read_text())
    assert "advantage_temperature" not in old
    settings = runs.settings_of(old)
    assert settings["advantage_temperature"] == 0
    assert settings["decoder_lr_ratio"] == 1
    assert "decoder_data" not in settings  # as today
    baseline = json.loads((RESULTS / "earlier/cpu_preset_rewritten/fpo/args.json").read_text())
    assert not set(runs.BEFORE) & set(runs.settings_of(baseline))


def test_the_readmes_table_and_pictures(tmp_path):
    """Otherwise README or Table 1 show numbers that no log has, or a picture is missing."""
    for file in table_1.draw(runs.Options(runs=(RESULTS,), out=tmp_path)):
        assert file.read_text() == (RESULTS / "figures" / file.name).read_text()
    readme = (runs.ROOT / "README.md").read_text()
    table = [x for x in (tmp_path / "table_1.md").read_text().splitlines() if x.startswith("|")]
    assert "\n".join(table) in readme and len(readme.splitlines()) <= 220
    assert len(readme.encode()) <= 14_000
    for page in ("README.md", "results/README.md", "benchmark/README.md", "CONTRIBUTING.md"):
        named = re.findall(r"\]\(([^)#:]+)\)", (runs.ROOT / page).read_text())
        missing = [name for name in named if not (runs.ROOT / page).parent.joinpath(name).exists()]
        assert not missing, f"{page}: {missing}"
