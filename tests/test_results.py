"""Every number in the tables of the pages, and the main ones in their sentences, is what the logs
in `results/` give, computed here anew.
"""

import csv
import json
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from plotting import aggregate, pack, reproduction
from plotting.paper import METHODS, TABLE_1, TASKS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
FIVE = RESULTS / "five_seeds"
PAGES = ("README.md", "results/README.md", "results/earlier/README.md", "benchmark/README.md")
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
STEMS = {name: stem for stem, name in METHODS.items()}
FOUND = (RESULTS / "numbers.txt").read_text().splitlines()  # what it is, stands in its head
FOUND = dict(line.rsplit(" = ", 1) for line in FOUND if line[0] != "#")


def tables(page):
    """Tables of a Markdown page: by header, rows, which are cells by column."""
    found, header = defaultdict(list), None
    for line in TEXT[page].splitlines():
        cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
        if not line.startswith("|"):
            header = None
        elif header is None:
            found[header := cells] = found[cells]
        elif set("".join(cells)) - set("- "):
            found[header].append(dict(zip(header, cells, strict=True)))
    return found


def numbers(text):
    return [x.rstrip(",") for x in re.findall(r"[-+]?\d[\d,]*\.?\d*(?:e-?\d+)?", text)]


def is_rounded(text, value):
    """Whether `text` is `value`, rounded to the digits that it shows, of thousands to its zeros."""
    text = text.replace(",", "").lstrip("+")
    digits = len(text.partition(".")[2])
    zeros = len(text) - len(text.rstrip("0")) if digits == 0 and abs(float(text)) >= 1000 else 0
    return abs(float(text) - value) <= 0.5001 * 10.0 ** (zeros - digits)


def check(text, wanted):
    """All numbers of a text are these, in this order."""
    got = numbers(text)
    right = len(got) == len(wanted) and all(map(is_rounded, got, wanted))
    assert right, f"{text}: the logs give {list(wanted)}"


def test_rounding():
    """Otherwise the other tests of this file let wrong numbers pass."""
    right = [("5,390", 5391.05), ("36,200", 36204.9), ("1.9", 1.9127), ("+597.6", 597.63)]
    wrong = [("5,390", 5395.2), ("5,400", 5339.0), ("1.9", 1.96), ("100", 109.0), ("-4.2", 4.2)]
    assert all(is_rounded(*pair) for pair in right) and not any(is_rounded(*pair) for pair in wrong)
    assert numbers("5,540; 5,480 **653.7 ± 2.995M**") == ["5,540", "5,480", "653.7", "2.995"]
    for text in ("1, 2", "1, 3, 3", "1"):
        with pytest.raises(AssertionError):
            check(text, [1.0, 3.0])


# --- logs


def folders(text):
    """What a cell names, in `results/` or a folder there; `<word>` is anything."""
    name = re.sub("<[a-z]+>", "*", text.strip("`/"))
    found = [sorted((RESULTS / place).glob(name)) for place in ("", "earlier", "throughput")]
    assert any(found), f"{text} is not there"
    return next(filter(None, found))


@cache
def record(file):
    return json.loads(folders(file)[0].read_text())


@cache
def csv_of(run, file):
    """Rows of a run's CSV file, as numbers."""
    with (folders(run)[0] / file).open() as text:
        return [{k: float(x or "nan") for k, x in row.items()} for row in csv.DictReader(text)]


def curves(run):
    """Evaluations of a run, by seed in order: {step: return}."""
    found = defaultdict(dict)
    for row in csv_of(run, "eval.csv"):
        found[row["seed"]][row["step"]] = row["return_mean"]
    return [curve for _, curve in sorted(found.items())]


def at(run, step=None):
    """Returns by seed at a step, or the last of each."""
    return np.array([curve[max(curve) if step is None else step] for curve in curves(run)])


def spread(returns):
    return [np.mean(returns), np.std(returns, ddof=1)]


def refined(run, kind="return"):
    """After / before of a run's refinements (stages, seeds)."""
    rows = csv_of(run, "refine.csv")
    ratio = np.array([row[f"{kind}_after"] / row[f"{kind}_before"] for row in rows])
    return ratio.reshape(len({row["step"] for row in rows}), -1)


def warmth(columns):
    """Of the refinements on plain pairs, the median of a ratio, and how many there are."""
    places = (RESULTS / "earlier", RESULTS / "cheetah_run_ablations")
    runs = [file.parent for place in places for file in place.rglob("refine.csv")]
    rows = [row for run in runs for row in csv_of(str(run.relative_to(RESULTS)), "refine.csv")]
    rows = [row | {"data": 1000 * row["reward_mean"]} for row in rows]
    above, below = columns.split("/")
    return [np.median([row[above] / row[below] for row in rows]), len(rows)]


def fast(runs):
    """Refinements of policies above 700, the limit, and how many of them cost more than a tenth."""
    rows = [row for run in runs.split("+") for row in csv_of(run, "refine.csv")]
    ratios = [r["return_after"] / r["return_before"] for r in rows if r["return_before"] > 700]
    return [len(ratios), 700, sum(ratio < 0.9 for ratio in ratios)]


def against_ppo(run):
    """Last returns, and PPO's of the same folder."""
    return at(run), at(str(Path(run).parent / "ppo_gaussian"))


def costs(run, stage):
    """The least and the most that this refinement takes from a seed, in percent."""
    ratio = refined(run)[stage - 1]
    return [100 * (1 - ratio.max()), 100 * (1 - ratio.min())]


def at_starts(run):
    """Of a baseline's iterations with a KL above 1, those whose batch has the start of episodes."""
    size, steps, length = 15_360, 120, 1000  # --preset cpu: of 128 environments, all in step
    rows = [(row["step"] / size * steps, row["approx_kl"] > 1) for row in csv_of(run, "train.csv")]
    rows = [exploded for end, exploded in rows if (end - 1) // length > (end - 1 - steps) // length]
    return [sum(rows), len(rows)]


def two(names):
    """Last returns of two runs or trials, by seed."""
    for name in names.split("+"):
        yield np.array(record(name)["last_return"]) if name.endswith(".json") else at(name)


def versus(names):
    """Pairs of seeds in which the first is above the second, and the exact p."""
    one, other = two(names)
    return [np.greater.outer(one, other).sum(), mannwhitneyu(one, other, method="exact").pvalue]


def by_seed(names):
    """The least and the most by which a seed of the first ends above the same of the second."""
    one, other = two(names)
    return [(one - other).min(), (one - other).max()]


def drop(file):
    """By seed of a trial, the most that an evaluation is below an earlier one."""
    returns = np.array([*record(file)["return_by_step"].values()])
    return (np.maximum.accumulate(returns) - returns).max(axis=0)


def dips(file):
    """Of Figure 7's densities, how many there are, and the largest dip."""
    found = [policy["dip"] for policy in record(file)["policies"]]
    return [len(found), max(found)]


@cache
def better():
    """By run of the table of decoders, the probability to end above PPO, and its interval."""
    runs = [row["folder"].strip("`/") for row in tables(PAGES[1])[DECODER]]
    named = {aggregate.BASELINE if "ppo_ga" in run else run: at(run)[:, None] for run in runs}
    return aggregate.statistics(named, reps=2000)[1]


KINDS = {
    "": at,
    "mean": lambda *of: [at(*of).mean()],
    "spread": lambda run: spread(at(run)),
    "area": lambda run: [np.mean(list(curve.values())) for curve in curves(run)],
    "refined": lambda run: np.median(refined(run), axis=1),
    "mode": lambda run: np.median(refined(run, "deterministic"), axis=1),
    "gains": lambda run: [(refined(run) > 1).sum()],
    "mode_gains": lambda run: [(refined(run, "deterministic") > 1).sum()],
    "det_before": lambda run: [row["deterministic_before"] for row in csv_of(run, "refine.csv")],
    "det_after": lambda run: [row["deterministic_after"] for row in csv_of(run, "refine.csv")],
    "better": lambda run: better()[run],
    "warmth": warmth,
    "exploded": lambda run: [sum(row["approx_kl"] > 1 for row in csv_of(run, "train.csv"))],
    "fast": fast,
    "pairs": lambda run: [np.greater.outer(*against_ppo(run)).sum()],
    "p": lambda run: [mannwhitneyu(*against_ppo(run), method="exact").pvalue],
    "std": lambda run: spread(at(run))[1:],
    "costs": costs,
    "at_starts": at_starts,
    "dips": dips,
    "drop": drop,
    "versus": versus,
    "by_seed": by_seed,
    "trial": lambda file: spread(record(file)["last_return"]),
}


def dig(found, keys):
    """What is at KEY.KEY in a JSON file; * is each item, ~ a space."""
    for i, key in enumerate(keys):
        if key == "*":
            return [dig(item, keys[i + 1 :]) for item in found]
        found = found[int(key) if isinstance(found, list) else key.replace("~", " ")]
    return found


def values(text):
    """The numbers that the words of a text name, as the head of results/numbers.txt has it."""
    found = []
    for word in text.split():
        factor, sign, word = re.fullmatch(r"(?:([\d.e]+)([*/]))?(.+)", word).groups()
        kind, _, run = word.rpartition(":")
        run, _, step = run.partition("@")
        run, _, seed = run.partition("#")
        if kind.endswith(".json"):
            part = np.ravel([dig(record(kind), keys.split(".")) for keys in run.split("+")])
            part = part if "*" in run else [np.median(part)]
        elif re.fullmatch(r"[\d.]+", word):
            part = [float(word)]
        elif kind in KINDS:
            part = KINDS[kind](run, *map(int, [step] if step else []))
        else:
            part = [row[kind] for row in csv_of(run, "train.csv") if row["step"] == int(step)]
        part = [part[int(seed) - 1]] if seed else part
        found += [float(factor) / x if sign == "/" else float(factor or 1) * x for x in part]
    return found


# --- tables

WORDS = {("the paper", "seen at this size"), ("script", "method")}  # nothing measured
WORDS |= {
    ("name", "task", "steps", "discount", "further arguments"),
    ("", "the paper", "`--preset cpu`"),
}
WORDS |= {("file", "a row for each seed and …"), ("command", "what it draws", "what it needs")}
RETURNS = ("task", "method", "ours", "the paper", "our seeds x steps")
CELLS = reproduction.HEADER
LOGS = ("folder", "command", "commit", "device", "wall time", "what it shows")
DECODER = ("the decoder's data", "after / before", "gains of 15", "last return")
DECODER += ("P(ends above PPO)", "folder")
SETTINGS = ("changed", "return at 0.2M steps", "return at 0.4M steps", "folder")
REFINED = ("run", "after / before, stochastic", "after / before, deterministic")
REFINED += ("gains, stochastic", "gains, deterministic", "folder")
TRIALS = ("trial", "seeds", "last return", "by seed", "explosions", "above 700", "log")
NAMES = {
    "run",
    "method",
    "trial",
    *LOGS[:4],
    LOGS[5],
    "log",
    "changed",
    "the decoder's data",
    *CELLS[6:8],
}
COUNTS = {DECODER: 8, SETTINGS: 5}


def exp_name(row):
    """The `--exp-name` of a row's runs: GoRL(FM), letter is gorl_fm_ppo_letter."""
    name, *variant = row["method"].split(", ")
    return "_".join([STEMS[name], *variant])


def five_seeds(row):
    """The run of a row of README.md's table."""
    return FIVE / re.sub("(?<=.)(?=[A-Z])", "_", row["task"]).lower() / exp_name(row)


def of_returns(row):
    stem, folder = STEMS.get(row["method"]), five_seeds(row)
    found = {"the paper": TABLE_1[stem][TASKS.index(row["task"])] if stem else ()}
    if not folder.is_dir():
        assert (row["ours"], row["our seeds x steps"]) == ("-", "no run here")
        return found
    ours, seeds = at(run := str(folder.relative_to(RESULTS))), curves(run)
    size = [len(seeds), max(seeds[0]) / 1e6]
    return found | {"ours": spread(ours), "our seeds x steps": size}


def of_cell(row):
    stem, run = STEMS.get(row["method"]), row["log"].strip("`/")
    args = record(f"{run}/args.json")
    assert args["env_id"] in row["task"] and args["exp_name"] == exp_name(row)
    paper = TABLE_1[stem][TASKS.index(args["env_id"])] if stem else ()
    area = [np.trapezoid([*c.values()], [*c]) / max(c) for c in curves(run)]
    found = {"the paper": paper, "last return": spread(at(run)), "by seed": at(run)}
    found |= {"task": [args["gamma"]] if "gamma" in row["task"] else (), "area": spread(area)}
    return found | {"steps": [max(curves(run)[0]) / 1e6]}


def of_log(row):
    """Its command is what its runs give, but with words beside it; <word> is each run's."""
    commits, walls = set(), set()
    name = re.sub("<([a-z]+)>", r"(?P<\1>[^/]+)", row["folder"].strip("`/"))
    for run in (run for run in folders(row["folder"]) if (run / "args.json").exists()):
        args = json.loads((run / "args.json").read_text())
        command = row["command"].strip("`")
        for word, x in re.search(f"{name}$", str(run)).groupdict().items():
            command = command.replace(f"<{word}>", x)
        if re.fullmatch("`[^`]+`", row["command"]):
            assert sorted(command.split()) == sorted(pack.command_of(args).split())
        commits.add(args["versions"].get("git_commit", row["commit"]))
        rows = csv_of(str(run.relative_to(RESULTS)), "eval.csv")
        walls.add(max(x["wall_time"] for x in rows))
    assert not commits or row["commit"] == ", ".join(sorted(commits))
    return {"wall time": sorted({min(walls), max(walls)}) if walls else ()}


def of_decoder(row):
    kinds = zip(DECODER[1:5], ("refined", "gains", "spread", "better"), strict=True)
    run = row["folder"].strip("`/")
    return {x: values(f"{kind}:{run}") if row[x] else () for x, kind in kinds}


def of_refined(row):
    kinds = zip(REFINED[1:5], ("refined", "mode", "gains", "mode_gains"), strict=True)
    return {name: values(f"{kind}:{row['folder'].strip('`/')}") for name, kind in kinds}


def of_trial(row):
    trial = record(row["log"].strip("`"))
    found = {"seeds": [min(trial["seeds"]), max(trial["seeds"])], "by seed": trial["last_return"]}
    found |= {"last return": spread(trial["last_return"])}
    found |= {"explosions": [sum(trial["iterations_with_kl_above_1"])]}
    if "refinements" not in trial:
        return found
    rows = [r for r in trial["refinements"] if r["return_before"] > 700]
    broken = sum(r["return_after"] < 0.9 * r["return_before"] for r in rows)
    return found | {"above 700": [broken, len(rows)]}


def of_settings(row):
    return {SETTINGS[1]: at(row["folder"], 215_040), SETTINGS[2]: at(row["folder"], 414_720)}


ROWS = {RETURNS: of_returns, LOGS: of_log, CELLS: of_cell, DECODER: of_decoder}
ROWS |= {SETTINGS: of_settings, REFINED: of_refined, TRIALS: of_trial}


@pytest.mark.parametrize("page, header", [(page, x) for page in PAGES for x in tables(page)])
def test_table(page, header):
    """Otherwise a page shows what no run gave, or a new table is never compared with its logs."""
    for row in tables(page)[header] if header not in WORDS else ():
        if header not in ROWS:
            assert f"| {' | '.join(row.values())} |" in FOUND, "a row that nothing is known of"
            continue
        found = ROWS[header](row)
        for column in set(header) - NAMES:
            check(row[column], found.get(column, ()))


def test_no_row_is_gone():
    """Otherwise a page can drop what speaks against a method, or a run that nobody finds then."""
    assert {x: sum(len(tables(page)[x]) for page in PAGES) for x in COUNTS} == COUNTS
    named = [run for row in tables(PAGES[2])[LOGS] for run in folders(row["folder"])]
    assert sorted(named) == sorted(f.parent for f in (RESULTS / "earlier").rglob("args.json"))
    trials = [folders(row["log"])[0] for row in tables(PAGES[1])[TRIALS]]
    assert sorted(trials) == sorted((RESULTS / "trials").rglob("*.json"))
    rows = tables("README.md")[RETURNS]
    assert rows
    for task in {row["task"] for row in rows}:
        mine = [row for row in rows if row["task"] == task]
        runs = {file.parent for file in five_seeds(mine[0]).parent.glob("*/args.json")}
        assert runs <= {five_seeds(row) for row in mine}
        for column in ("ours", "the paper"):  # the best is bold
            cells = [row[column] for row in mine if row[column] != "-"]
            best = max(cells, key=lambda cell: float(numbers(cell)[0]), default=None)
            assert [x for x in cells if "**" in x] == [best] * (len(cells) > 1)


def test_the_first_run():
    """Otherwise a newcomer's first screen is not what the page says."""
    (curve,), page = curves("quickstart"), TEXT["README.md"]
    step = max(curve)
    assert f"step {step:,.0f}, stage 3: return [{curve[step]:.1f}]" in page
    assert pack.command_of(record("quickstart/args.json")) in page


def test_the_page_is_made_anew(tmp_path, capsys):
    """Otherwise its command loses what is written around the table, or leaves the table old."""
    page, there = tmp_path / "page.md", TEXT[PAGES[1]]
    page.write_text(f"before\n{''.join(reproduction.MARKS)}after\n")
    logs = reproduction.Logs(tuple(sorted(FIVE.iterdir())))
    reproduction.draw(logs, page)
    made = page.read_text()
    assert made.startswith("before\n") and made.endswith(reproduction.MARKS[1] + "after\n")
    blocks = [re.search("<!-- made.*<!-- end", text, re.DOTALL)[0] for text in (made, there)]
    blocks = [re.sub("`[^` ]*/`", "", block) for block in blocks]  # paths differ
    assert blocks[0] == blocks[1]
    page.write_text(there.replace(reproduction.MARKS[1], ""))
    with pytest.raises(SystemExit) as error:
        reproduction.draw(logs, page)
    assert error.value.code == 2 and "--to: got" in capsys.readouterr().err


@pytest.mark.parametrize("words", FOUND)
def test_line(words):
    """Otherwise a finding rests on numbers that no run has had."""
    assert any(words in " ".join(TEXT[page].split()) for page in PAGES)
    check(words.split(" | ", 1)[1] if words.startswith("| ") else words, values(FOUND[words]))
