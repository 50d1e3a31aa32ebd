"""Every number in the tables of both READMEs is what the logs in `results/` give, computed here
anew.
"""

import csv
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from plotting import aggregate, reproduction
from plotting.paper import METHODS, TABLE_1, TASKS
from plotting.runs import BEFORE

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
README, PAGE = ROOT / "README.md", RESULTS / "README.md"
STEMS = {name: stem for stem, name in METHODS.items()}
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e-?\d+)?")


def tables(file):
    """Tables of a Markdown file: by header, rows of cells."""
    found, header = defaultdict(list), None
    for line in file.read_text().splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
        if header is None:
            header = cells
        elif set("".join(cells)) - set("- "):
            found[header].append(cells)
    return found


def numbers(text):
    return [x.rstrip(",") for x in NUMBER.findall(text)]


def is_rounded(text, value):
    """Whether `text` is `value`, rounded to the digits that it shows, of thousands to its zeros."""
    text = text.replace(",", "").lstrip("+")
    digits = len(text.partition(".")[2])
    zeros = len(text) - len(text.rstrip("0")) if digits == 0 and abs(float(text)) >= 1000 else 0
    return abs(float(text) - value) <= 0.5001 * 10.0 ** (zeros - digits)


def check(text, values):
    """All numbers of a text are these, in this order."""
    got = numbers(text)
    assert len(got) == len(values), f"{text}: {len(values)} numbers wanted: {values}"
    for x, value in zip(got, values, strict=True):
        assert is_rounded(x, value), f"{text}: the logs give {value}"


def evaluations(folder):
    """eval.csv of a run: by seed, {step: return}."""
    curves = defaultdict(dict)
    with (folder / "eval.csv").open() as file:
        for row in csv.DictReader(file):
            curves[int(row["seed"])][int(row["step"])] = float(row["return_mean"])
    return curves


def at(folder, step=None):
    """Returns by seed, in order, at a step, or the last of each."""
    curves = evaluations(folder)
    return np.array([curves[seed][step or max(curves[seed])] for seed in sorted(curves)])


def sheet(name):
    return json.loads((RESULTS / "throughput" / f"{name}.json").read_text())


def test_rounding():
    """Otherwise the other tests of this file let wrong numbers pass."""
    assert (
        is_rounded("5,390", 5391.05)
        and not is_rounded("5,390", 5395.2)
        and not is_rounded("5,400", 5339.0)
    )
    assert (
        is_rounded("36,200", 36204.9) and is_rounded("1.9", 1.9127) and not is_rounded("1.9", 1.96)
    )
    assert (
        is_rounded("-4.2", -4.16) and is_rounded("+597.6", 597.63) and not is_rounded("100", 109.0)
    )
    assert numbers("5,540; 5,480") == ["5,540", "5,480"] and numbers("680, 476, 596") == [
        "680",
        "476",
        "596",
    ]
    assert numbers("**653.7 ± 164.2**") == ["653.7", "164.2"] and numbers("2 x 2.995M") == [
        "2",
        "2.995",
    ]
    with pytest.raises(AssertionError):
        check("1, 2", [1.0, 3.0])


# --- returns ---

RETURNS = ("task", "method", "ours", "the paper", "ours - paper", "our seeds x steps")
FOLDERS = {"CheetahRun": "cpu_preset", "FingerSpin": "finger_spin_3m"}  # of the tables in README.md


def table_folder(task, method):
    """The run of a row of README.md's tables. On CheetahRun all but FPO's are later ones."""
    later = {"PPO": "decoder_data/ppo_gaussian", "DPPO": "cpu_preset_dppo/sum"}
    later |= {"GoRL(FM)": "decoder_data/recent_weighted"}
    later |= {"GoRL(DIFF)": "decoder_data/diff_recent_weighted"}
    if task == "CheetahRun" and method in later:
        return RESULTS / later[method]
    return RESULTS / FOLDERS[task] / STEMS[method]


def test_tables_of_returns():
    """Otherwise the README claims returns that no run has had, or marks the wrong method as the
    best.
    """
    rows = tables(README)[RETURNS]
    assert {row[0] for row in rows} == set(FOLDERS) and len(rows) == 5 * len(FOLDERS)
    for task, method, ours, paper, difference, size in rows:
        returns = at(folder := table_folder(task, method))
        check(ours, [returns.mean(), returns.std(ddof=1)])
        check(paper, TABLE_1[STEMS[method]][TASKS.index(task)])
        check(difference, [returns.mean() - TABLE_1[STEMS[method]][TASKS.index(task)][0]])
        check(size, [len(returns), max(evaluations(folder)[1]) / 1e6])
    for task in FOLDERS:
        mean = {row[1]: float(numbers(row[2])[0]) for row in rows if row[0] == task}
        assert [row[1] for row in rows if row[0] == task and "**" in row[2]] == [
            max(mean, key=mean.get)
        ]


RUNS = ("script", "wall time (s)", "steps/s, both seeds", "last return, seeds 1 and 2")


def test_table_of_the_finger_spin_runs():
    """Otherwise users plan with times, or believe in seeds, that no run has had."""
    rows = tables(README)[RUNS]
    assert len(rows) == 5
    for script, wall, sps, returns in rows:
        folder = RESULTS / "finger_spin_3m" / Path(script.strip("`")).stem
        check(returns, at(folder))
        with (folder / "eval.csv").open() as file:
            check(wall, [max(float(row["wall_time"]) for row in csv.DictReader(file))])
        with (folder / "train.csv").open() as file:
            assert (
                abs(
                    float(sps.replace(",", ""))
                    - np.median([float(r["sps"]) for r in csv.DictReader(file)])
                )
                < 1
            )


PACKED = ("folder", "command", "commit", "device", "wall time", "what it shows")
PAGE_HEADER = ("task", "method", "the paper", "ours", "seeds", "steps", "device", "command", "log")


def test_the_page_of_all_cells():
    """Otherwise the page hides a cell, a log, or what was changed, or shows what no log has."""
    rows = tables(PAGE)[PAGE_HEADER]
    assert [row[:2] for row in rows] == [
        (task, name) for task in TASKS for name in METHODS.values()
    ]
    commands = {folder: command for folder, command, *_ in tables(PAGE)[PACKED]}
    there, full = defaultdict(dict), 0
    for file in RESULTS.rglob("args.json"):
        args = json.loads(file.read_text())
        script = Path(args.get("versions", {}).get("script", "none")).stem
        if (
            args.get("exp_name") == script
            and not args.get("decoder_from")
            and args["impl"] == "jax"
        ):
            there[args["env_id"], script][file.parent] = args
    for task, method, paper, ours, seeds, steps, device, command, log in rows:
        stem = STEMS[method]
        check(paper, TABLE_1[stem][TASKS.index(task)])
        runs = there[task, stem]
        if ours == "not run yet":
            assert not runs
            continue
        folder = RESULTS / log.strip("`/")
        args, returns = runs[folder], at(folder)
        check(ours, [returns.mean(), returns.std(ddof=1)])
        assert (
            int(seeds) == len(returns) == args["num_seeds"] and device == args["versions"]["device"]
        )
        check(steps, [max(evaluations(folder)[args["seed"]]) / 1e6])
        size = [(a["preset"] == "paper", a["total_timesteps"]) for a in runs.values()]
        assert (args["preset"] == "paper", args["total_timesteps"]) == max(size)
        given = command.strip("`").split()
        assert given[:2] == ["python", f"{stem}.py"] and command == commands.get(log, command)
        for name, value in zip(given[2::2], given[3::2], strict=True):
            argument = name[2:].replace("-", "_")
            assert str((BEFORE | args)[argument]) == value
        full += len(returns) >= 5 and args["total_timesteps"] >= 180_000_000
    none = sum(row[3] == "not run yet" for row in rows)
    smaller = len(rows) - none - full
    words = (
        f"Of {len(rows)} cells, {full} are of the paper's size, {smaller} smaller, {none} not run."
    )
    assert words in PAGE.read_text()


def test_the_page_is_made_anew(tmp_path, capsys):
    """Otherwise its command loses what is written around the table, or leaves the table old."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{''.join(reproduction.MARKS)}after\n")
    reproduction.draw(reproduction.Logs((RESULTS,)), page)
    made, there = page.read_text(), PAGE.read_text()
    assert made.startswith("before\n") and made.endswith(reproduction.MARKS[1] + "after\n")
    strip = [
        [row[:-1] for row in tables(file)[PAGE_HEADER]] for file in (page, PAGE)
    ]  # paths differ
    assert strip[0] == strip[1] and len(strip[0]) == 30
    page.write_text(there.replace(reproduction.MARKS[1], ""))
    with pytest.raises(SystemExit) as error:
        reproduction.draw(reproduction.Logs((RESULTS,)), page)
    assert error.value.code == 2 and "--to: got" in capsys.readouterr().err


BRAX = ("", "0.2M", "0.4M", "0.6M", "0.8M", "1.0M", "1.2M", "seeds at 1.2M")


def test_table_of_braxs_ppo():
    """Otherwise our Gaussian PPO is not compared with what was measured of Brax's."""
    rows = tables(PAGE)[BRAX]
    folders = [[RESULTS / "brax_ppo_cheetah_run" / f"seed_{n}" for n in (1, 2, 3)]]
    folders += [[RESULTS / name / "ppo_gaussian"] for name in ("cpu_preset", "cpu_preset_earlier")]
    for (_, *cells), runs in zip(rows, folders, strict=True):
        curves = [curve for run in runs for _, curve in sorted(evaluations(run).items())]
        assert len(curves) == 3
        for i, cell in enumerate(cells[:6]):  # the evaluation nearest to the step in the header
            steps = [min(curve, key=lambda step: abs(step - 200_000 * (i + 1))) for curve in curves]
            check(cell, [np.mean([curve[step] for curve, step in zip(curves, steps, strict=True)])])
        check(cells[6], [curve[max(curve)] for curve in curves])


REWRITTEN = ("method", "first version", "rewritten")


def test_table_of_the_rewritten_scripts():
    """Otherwise a change of an algorithm hides behind numbers that no run has had."""
    rows = tables(PAGE)[REWRITTEN]
    assert len(rows) == 5
    for method, *cells in rows:
        for cell, folder in zip(cells, ("cpu_preset", "cpu_preset_rewritten"), strict=True):
            check(cell, at(RESULTS / folder / STEMS[method]))


NORMS = ("joint bound, clip range", "return at 0.4M steps")


def test_table_of_gradient_norms():
    """Otherwise a default rests on numbers that no run has had."""
    rows = tables(PAGE)[NORMS]
    folders = (
        "cpu_preset_cheetah_run",
        "cpu_variants/gorl_fm_stage0_clip_0.3",
        "cpu_variants/gorl_fm_stage0_no_norm_bound",
        "cpu_preset/gorl_fm_ppo",
        "cpu_preset/ppo_gaussian",
    )
    for (_, returns), folder in zip(rows, folders, strict=True):
        check(returns, at(RESULTS / folder, 399_360))


SETTINGS = ("changed", "return at 0.2M steps", "return at 0.4M steps", "folder")
LONGER = ("log-probabilities", "last return, seeds 1 to 5", "mean ± std", "mean over evaluations")
NOISE = ("log-probabilities", "start noise only", "the authors'", "as in training")


def test_tables_of_baseline_settings():
    """Otherwise a baseline's defaults rest on numbers that no run has had."""
    rows = tables(PAGE)[SETTINGS]
    assert len(rows) == 15
    for _, *cells, folder in rows:
        for cell, step in zip(cells, (215_040, 414_720), strict=True):
            check(cell, at(RESULTS / folder.strip("`/"), step))
    rows = tables(PAGE)[LONGER]
    for (_, last, spread, area), of in zip(rows, ("sum", "mean"), strict=True):
        run = RESULTS / "cpu_preset_dppo" / of
        returns = at(run)
        check(last, returns)
        check(spread, [returns.mean(), returns.std(ddof=1)])
        check(area, [np.mean([list(curve.values()) for curve in evaluations(run).values()])])
    modes = json.loads((RESULTS / "dppo_settings/evaluation_modes.json").read_text())["returns"]
    rows = tables(PAGE)[NOISE]
    assert len(rows) == len(modes)
    for (_, *cells), mode in zip(rows, modes, strict=True):
        for cell, name in zip(cells, NOISE[1:], strict=True):
            check(cell, mode[name])


COLLAPSE = ("", "1.01M", "2.01M", "3.01M", "4.01M", "5.01M", "5.38M", "6.01M")


def test_table_of_fpo_on_finger_spin():
    """Otherwise a statement on FPO's collapse rests on numbers that no run has had."""
    run = RESULTS / "finger_spin_6m" / "fpo"
    with (run / "train.csv").open() as file:
        train = [{k: float(x) for k, x in row.items()} for row in csv.DictReader(file)]
    ends = [1_013_760, 2_012_160, 3_010_560, 4_008_960, 5_007_360, 5_376_000, 6_005_760]

    def begins(row):
        """All 128 environments begin an episode in this iteration of 120 steps."""
        last = row["step"] // 128
        return (last - 1) // 1000 > (last - 121) // 1000

    kinds = {
        "ratio spread where episodes begin": ("log_ratio_std", begins),
        "ratio spread elsewhere": ("log_ratio_std", lambda row: not begins(row)),
        "clipped fraction": ("clip_fraction", lambda row: True),
        "spread of u": ("u_std", lambda row: True),
    }
    rows = tables(PAGE)[COLLAPSE]
    assert len(rows) == 2 * (1 + len(kinds))
    for name, *cells in rows:
        what, _, seed = name.partition(", seed ")
        curve = evaluations(run)[int(seed)]
        for start, end, cell in zip([0, *ends], ends, cells, strict=False):
            if what == "return":
                check(cell, [curve[max(step for step in curve if step <= end)]])
                continue
            column, counts = kinds[what]
            part = [r for r in train if r["seed"] == int(seed) and start < r["step"] <= end]
            check(cell, [np.median([row[column] for row in part if counts(row)])])
    worst = max(train, key=lambda row: row["grad_norm_actor"])
    assert (worst["seed"], worst["step"]) == (2, 5_391_360)
    assert begins(worst)


WARM = ("", "lower quartile", "median", "upper quartile")


def test_table_of_warm_starts():
    """Otherwise a statement about the method rests on numbers that no run has had."""
    files = [file for file in RESULTS.rglob("refine.csv") if "decoder_data" not in file.parts]
    refinements = [row for file in files for row in csv.DictReader(file.read_text().splitlines())]
    assert f"in the {len(refinements)} refinements" in PAGE.read_text()
    columns = ("return_before", "return_after", "reward_mean")
    before, after, reward = (
        np.array([float(row[name]) for row in refinements]) for name in columns
    )
    want = [after / before, 1000 * reward / before, after / (1000 * reward)]
    for (_, *cells), ratio in zip(tables(PAGE)[WARM], want, strict=True):
        for cell, quantile in zip(cells, (0.25, 0.5, 0.75), strict=True):
            check(cell, [np.quantile(ratio, quantile)])


REFINED = (
    "decoder's data",
    "after / before, stochastic",
    "after / before, deterministic",
    "of 15 that gain",
    "folder",
)
ENDS = (
    "decoder's data",
    "last return, seeds 1 to 5",
    "mean ± std",
    "last return, IQM",
    "area under the curve, IQM",
    "P(ends above PPO)",
)


def test_tables_of_the_decoders_data():
    """Otherwise the decoder's defaults rest on numbers that no run has had."""
    rows = tables(PAGE)[REFINED]
    folders = {name: RESULTS / folder.strip("`/") for name, *_, folder in rows}
    assert len(folders) == 7
    for name, *cells, gain, _ in rows:
        with (folders[name] / "refine.csv").open() as file:
            refine = [{k: float(x) for k, x in row.items()} for row in csv.DictReader(file)]
        assert len(refine) == 15
        for cell, kind in zip(cells, ("return", "deterministic"), strict=True):
            ratio = np.array([row[f"{kind}_after"] / row[f"{kind}_before"] for row in refine])
            check(cell, np.median(ratio.reshape(3, 5), axis=1))  # rows are by stage, then seed
            if kind == "return":
                check(gain, [(ratio > 1).sum()])
    rows = tables(PAGE)[ENDS]
    folders = {"Gaussian PPO": RESULTS / "decoder_data/ppo_gaussian"} | folders
    assert [row[0] for row in rows] == list(folders)
    ends = {name: at(folder) for name, folder in folders.items()}
    areas = {
        name: np.array([np.mean(list(curve.values())) for curve in evaluations(folder).values()])
        for name, folder in folders.items()
    }

    def statistics(values):
        named = {name.replace("Gaussian PPO", aggregate.BASELINE): x for name, x in values.items()}
        return aggregate.statistics({name: x[:, None] for name, x in named.items()}, reps=2000)

    (iqm, better), (area, _) = statistics(ends), statistics(areas)
    for name, last, spread, *intervals in rows:
        key = name.replace("Gaussian PPO", aggregate.BASELINE)
        check(last, ends[name])
        check(spread, [ends[name].mean(), ends[name].std(ddof=1)])
        for cell, values in zip(intervals, (iqm, area, better), strict=True):
            check(cell, values.get(key, ()))


PEAKS = ("method", "mean reward, seeds 1 to 3", "actions in the gap", "dip of the density")


def test_table_of_figure_1():
    """Otherwise the page says more of the two peaks than was computed."""
    record = json.loads((RESULTS / "figures/figure_1.json").read_text())
    rows = tables(PAGE)[PEAKS]
    assert len(rows) == 5
    for name, *cells in rows:
        for cell, key in zip(cells, ("mean_reward", "between_peaks", "dip"), strict=True):
            check(cell, [seed[key] for seed in record[name]])


STAGE_0 = ("clip range of stage 0", "return at 0.2M steps", "return at 0.4M steps", "folder")


def test_table_of_stage_0():
    """Otherwise stage 0's clip range rests on numbers that no run has had."""
    rows = tables(PAGE)[STAGE_0]
    assert len(rows) == 4
    for *_, early, late, folder in rows:
        run = RESULTS / folder.strip("`/")
        check(early, at(run, 215_040))
        check(late, at(run, 414_720 if run.name == "ppo_gaussian" else 399_360))


RECENT = (
    "pairs",
    "return after / before each refinement, seed 1",
    "seed 2",
    "last return, seeds 1 and 2",
)


def test_table_of_recent_pairs():
    """Otherwise an advice on the decoder's data rests on numbers that no run has had."""
    folders = ["cheetah_run_ablations/beta_1e-3", "cheetah_run_recent_pairs/gorl_fm_ppo"]
    for (pairs, *cells), folder in zip(tables(PAGE)[RECENT], folders, strict=True):
        refinements = [*csv.DictReader((RESULTS / folder / "refine.csv").read_text().splitlines())]
        check(pairs, [round(float(refinements[0]["pairs"]), -4)])
        for cell, seed in zip(cells[:2], "12", strict=True):
            rows = [row for row in refinements if row["seed"] == seed]
            check(cell, [float(row["return_after"]) / float(row["return_before"]) for row in rows])
        check(cells[2], at(RESULTS / folder))


DISCOUNTS = (
    "method",
    "discount",
    "last return, seeds 1 and 2",
    "mean over evaluations",
    "best evaluation",
)


def test_table_of_discounts():
    """Otherwise an advice on the discount rests on numbers that no run has had."""
    folders = {"0.995": "finger_spin_3m", "0.95": "finger_spin_3m_gamma_0.95"}
    rows = tables(PAGE)[DISCOUNTS]
    assert len(rows) == 4
    for method, discount, *cells in rows:
        run = RESULTS / folders[discount] / STEMS[method]
        assert json.loads((run / "args.json").read_text())["gamma"] == float(discount)
        curves = [list(curve.values()) for _, curve in sorted(evaluations(run).items())]
        for cell, of in zip(cells, (lambda x: x[-1], np.mean, max), strict=True):
            check(cell, [of(curve) for curve in curves])


STAGES = ("decoder of stage", "steps behind it", "return at 0 steps", "return at 1M steps")


def test_table_of_frozen_decoders():
    """Otherwise Figure 6's discussion is of other numbers than its curves."""
    folder, rows = RESULTS / "cheetah_run_ablations", tables(PAGE)[STAGES]
    with (folder / "beta_1e-3/refine.csv").open() as file:
        refined = sorted({int(row["step"]) for row in csv.DictReader(file)})
    for stage, (name, behind, first, last) in enumerate(rows):
        run = folder / f"decoder_{stage}"
        assert json.loads((run / "args.json").read_text())["decoder_from"].endswith(
            f"beta_1e-3:{stage}"
        )
        assert numbers(name) == [str(stage)]
        check(behind, [([0, *refined][stage]) / 1e6])
        check(first, [curve[0] for _, curve in sorted(evaluations(run).items())])
        check(last, at(run))
    assert len(rows) == 4


# --- speed ---


def test_table_of_the_throughput_sheets():
    """Otherwise users plan with speeds that were not measured."""
    sheets = [sheet("cpu_cheetah_run"), sheet("cpu_hopper_stand")]
    want = [
        lambda s: [s["physics"]["sps"]],
        lambda s: [s["rollout"]["sps"]],
        lambda s: [s["iteration"]["sps"]],
        lambda s: [s["rollout"]["seconds"], s["update"]["seconds"]],
        lambda s: [s["evaluate"]["seconds"]],
        lambda s: [s["decoder_seconds_per_million_samples_and_epoch"]],
        lambda s: [
            s["compile_seconds"]["cold"]["start_up"],
            s["compile_seconds"]["warm"]["start_up"],
        ],
    ]
    for (_, *cells), values in zip(
        tables(README)["", "CheetahRun", "HopperStand"], want, strict=True
    ):
        for cell, data in zip(cells, sheets, strict=True):
            check(cell, values(data))


def test_table_of_comparisons():
    """Otherwise a claim to be faster is not what was measured."""
    rows = tables(README)["", "ours", "theirs", "ratio"]
    first, again = (
        sheet("cpu_public_gorl_cheetah_run"),
        sheet("cpu_public_gorl_latent_and_decoders"),
    )
    for row, parts in zip(
        rows[:4],
        ([first["ppo"], again["ppo"]], [first["fpo"]], [first["dppo"]], [again["latent_ppo"]]),
        strict=True,
    ):
        for cell, name in zip(row[1:3], ("ours", "theirs"), strict=True):
            check(cell, [part["sps"][name] for part in parts])
        check(row[3], [part["theirs_over_ours"]["median"] for part in parts])
    for row, name in zip(
        rows[4:6], ("cpu_versus_public_gorl_pinned", "cpu_versus_brax"), strict=True
    ):
        data = sheet(name)
        for cell, which in zip(row[1:3], "AB", strict=True):
            check(cell, [run["sps"] for run in data["runs"] if run["run"] == which])
        check(row[3], [1 / pair for pair in data["b_over_a"]["sps"]["pairs"]])
    parts = [again["decoder_fm"], again["decoder_diffusion"]]
    for cell, name in zip(rows[6][1:3], ("ours", "theirs"), strict=True):
        check(cell, [1000 * np.median(part["seconds"][name]) for part in parts])
    check(rows[6][3], [part["theirs_over_ours"]["median"] for part in parts])


def test_table_of_jax_versions():
    """Otherwise the pins rest on numbers that were not measured."""
    (header, rows), *others = (x for x in tables(README).items() if "JAX 0.10.2" in "".join(x[0]))
    assert not others
    for env_id, *cells in rows:
        for cell, name in zip(cells, header[1:], strict=True):
            python, jax = re.search(r"Python ([\d.]+), JAX ([\d.]+)", name).groups()
            runs = [
                r
                for r in sheet("cpu_jax_versions")["runs"]
                if (r["python"], r["jax"]) == (python, jax)
            ]
            check(cell, [np.median([r["sps"] for r in runs if r["env_id"] == env_id])])


def test_no_table_is_forgotten():
    """Otherwise a new table of numbers is never compared with its logs."""
    checked = {RETURNS, RUNS, ("", "CheetahRun", "HopperStand"), ("", "ours", "theirs", "ratio")}
    words = {("file", "a row for each seed and …"), ("script", "method")}
    words |= {("command", "what it draws", "what it needs")}
    versions = {header for header in tables(README) if "JAX 0.10.2" in "".join(header)}
    assert set(tables(README)) == checked | words | versions
    checked = {PAGE_HEADER, PACKED, BRAX, NORMS, WARM, STAGES, DISCOUNTS, RECENT, REWRITTEN}
    checked |= {SETTINGS, LONGER, NOISE, COLLAPSE, REFINED, ENDS, STAGE_0, PEAKS}
    assert set(tables(PAGE)) == checked | {("the paper", "seen at this size")}
