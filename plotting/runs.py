"""Run directories: what is there, what is whole, what belongs together, what is drawn.

A run is a folder with the `args.json` and `eval.csv` of a script. Runs belong together (a `Group`)
if they were found under the same `--runs` and agree in method, task, preset and every argument that
matters to training; seeds and commits may differ.
"""

import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro

from plotting.paper import METHODS, TASKS

ROOT = Path(__file__).resolve().parent.parent  # where the scripts are

# Arguments that do not change what is learned (or are told apart by other means).
INCIDENTAL = {"env_id", "seed", "num_seeds", "seeds", "preset", "versions", "eval_every"}
INCIDENTAL |= {"eval_envs", "resume", "distributed", "runs_dir"}
INCIDENTAL |= {"track", "wandb_project_name", "wandb_entity"}

# What methods have to share to be compared on a task.
CONDITIONS = ("total_timesteps", "episode_length", "gamma", "num_envs", "unroll_length")
CONDITIONS += ("batch_size", "num_minibatches", "update_epochs", "impl")

# Arguments that scripts of the first version had beside today's, at their defaults: the old logs in
# `results/` have them, too, and are drawn beside new ones.
GONE = {"max_grad_norm": 0.0, "target": "noise", "latent_penalty": "kl"}
GONE |= {"reinit_critic": False, "decoder_from_scratch": False}

# What today's arguments are in logs from before they were there.
BEFORE = {"decoder_data": "recorded", "advantage_temperature": 0.0, "decoder_lr_ratio": 1.0}


@dataclass(frozen=True)
class Options:
    """What every item of `plotting` takes."""

    # folders that hold runs, or run directories, which are drawn as they are, finished or not
    runs: tuple[Path, ...] = (Path("runs"),)
    out: Path = Path("figures")  # where the files go
    # the runs' preset; auto: paper if there are such runs
    preset: Literal["auto", "paper", "cpu"] = "auto"
    # of the runs in folders, those with these arguments: argument=value ...
    where: tuple[str, ...] = ()
    # runs in folders that have not ended, too, as far as all their seeds have come
    unfinished: bool = False

    def __post_init__(self) -> None:
        writable("--out", self.out)
        if bad := [item for item in self.where if "=" not in item]:
            wrong("--where", bad[0], "argument=value, as `drawn` shows them")


def wrong(argument: str, got: Any, takes: str) -> None:
    """Ends the program with one line on stderr and exit status 2."""
    print(f"plotting: {argument}: got {got}; takes {takes}", file=sys.stderr)
    raise SystemExit(2)


def writable(argument: str, folder: Path) -> None:
    """Ends the program unless `folder` can be made or written to: before any work, not after."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        wrong(argument, folder, "a folder that can be made and written to")


class CannotDraw(Exception):
    """The logs do not allow a figure; the message says what is missing."""


class Curve(NamedTuple):
    """A seed's evaluations: steps and mean returns (S,), the run they come from and its commit."""

    steps: np.ndarray
    returns: np.ndarray
    run: Path
    commit: str = "unknown"


@dataclass(frozen=True)
class Group:
    """Runs of one setting, seed by seed."""

    method: str  # the script's stem
    task: str
    preset: str
    settings: dict[str, Any]  # arguments that differ from the preset's
    total: int  # environment steps of a seed, as asked for
    end: int  # that in whole iterations, where a finished run ends
    curves: dict[int, Curve] = field(default_factory=dict)  # by seed
    source: str = ""  # the folder of --runs that they were found in
    label: str = ""  # what `select` calls it beside others
    place: int = 0  # its label's among those of its name, or of all names that are not the paper's

    def __str__(self) -> str:
        different = "".join(f", {name}={value}" for name, value in self.different.items())
        folders = ", ".join(sorted({str(curve.run) for curve in self.curves.values()}))
        seeds = f"seeds {', '.join(map(str, sorted(self.curves)))}, {self.reached / 1e6:.3g}M steps"
        seeds += f" of {self.total / 1e6:g}M" * (not self.finished)
        commits = sorted({curve.commit for curve in self.curves.values()})
        folders += f"; commits {', '.join(commits)}" * (len(commits) > 1)
        return f"{self.label or self.name}, {self.task}{different}: {seeds} ({folders})"

    @property
    def name(self) -> str:
        """The paper's name of its method or its script's, and its `--exp-name` if it has one."""
        name = METHODS.get(self.method, self.method)
        own = str(self.settings.get("exp_name", "")).removeprefix(f"{self.method}_")
        return f"{name}, {own}" if own else name

    @property
    def known(self) -> bool:
        """Whether its script is here, whose defaults tell which of its arguments are settings."""
        return bool(preset_args(self.method, self.preset))

    @property
    def different(self) -> dict[str, str]:
        """Its settings but for those that its label and its steps tell."""
        told = {"exp_name", "total_timesteps"} if self.known else set(self.settings)
        return {name: shown(value) for name, value in self.settings.items() if name not in told}

    @property
    def finished(self) -> bool:
        return self.reached == self.total

    @property
    def named(self) -> bool:
        """Whether its run directories are what `--runs` names."""
        return self.source == ""

    @property
    def reached(self) -> int:
        """Steps that every seed has come to: the total, once all are finished."""
        last = min(int(curve.steps[-1]) for curve in self.curves.values())
        return self.total if last == self.end else last


def shown(value: Any) -> str:
    """A setting as it is written behind `--where`: a list's items with commas between."""
    return ",".join(map(shown, value)) if isinstance(value, list | tuple) else str(value)


def script_of(stem: str) -> ModuleType | None:
    """The training script of that name beside `plotting/`, imported; None if there is none."""
    if stem != Path(stem).name or not (ROOT / f"{stem}.py").is_file():
        return None
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(stem)


@cache
def preset_args(stem: str, preset: str) -> dict[str, Any]:
    """What a script's preset sets each argument to; nothing for a script that is not here or lacks
    `Args`.
    """
    try:
        if (script := script_of(stem)) is None:
            return {}
        args = script.Args()
        changes = getattr(script, "CPU_PRESET", {}) if preset == "cpu" else {}
        return asdict(replace(args, **changes)) | (
            {"preset": preset} if hasattr(args, "preset") else {}
        )
    except Exception as error:  # a fork's script may do anything
        print(f"{stem}.py: its arguments could not be read ({type(error).__name__}: {error})")
        return {}


def default_stages(total: int) -> list[int]:
    """GoRL's four stages, 2 : 2 : 1 : 1 (App. E.4), of a total."""
    return [end - start for start, end in pairwise(total * n // 6 for n in (0, 2, 4, 5, 6))]


def usual_args(stem: str, preset: str, total: int) -> dict[str, Any]:
    """A preset's arguments, with the stages that a total has by default; nothing for an unknown
    script.
    """
    default = preset_args(stem, preset)
    if not default:
        return {}
    return GONE | default | {"stage_timesteps": default_stages(total), "exp_name": stem}


def after_refinements(group: Group) -> dict[int, list[float]]:
    """By step, the seeds' deterministic returns right after a refinement and the encoder's reset,
    as far as the logs have them.
    """
    found: dict[int, list[float]] = {}
    for seed, curve in group.curves.items():
        if (curve.run / "refine.csv").is_file():
            table = read_table(curve.run / "refine.csv")
            for i in (
                np.flatnonzero(table["seed"] == seed) if "deterministic_after" in table else ()
            ):
                found.setdefault(int(table["step"][i]), []).append(table["deterministic_after"][i])
    return found


def refinements(group: Group) -> list[int]:
    """Steps at which a GoRL run's decoder is refined; none for another method."""
    if "stage_timesteps" not in preset_args(group.method, "paper"):
        return []
    return list(accumulate(group.settings.get("stage_timesteps", default_stages(group.total))))[:-1]


def settings_of(args: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an args.json that differ from its preset's and matter to training; all that
    matter, of a script that is not here.

    Of `--decoder-from` only the decoder's stage: each seed may have a decoder of its own.
    """
    stem = Path(args["versions"]["script"]).stem
    default = usual_args(stem, args.get("preset", "paper"), args["total_timesteps"])
    different = {}
    before = {name: value for name, value in BEFORE.items() if name in default}
    for name, value in (before | args).items():
        usual = default.get(name)
        if isinstance(value, list) and len(value) == 1 and not isinstance(usual, list | tuple):
            value = value[0]  # the first version wrote a single number for all stages as a list
        incidental = name in INCIDENTAL or name.startswith("checkpoint")
        if name == "exp_name":
            incidental, usual = value == stem, None
        if not incidental and (not default or items(value) != items(usual)):
            different[name] = value
    if "decoder_from" in different:
        different["decoder_from"] = decoder_of(str(different["decoder_from"]))
    return different


def decoder_of(named: str) -> int | str:
    """The stage of the decoder that `--decoder-from` names, or what it says of it.

    It names a policy file, saved at the end of a stage; which one, the args.json of its run tells.
    Without that it is the file's name. The first version's argument was RUN_DIR:STAGE.
    """
    if named.rpartition(":")[2].isdigit():
        return int(named.rpartition(":")[2])
    file = Path(named)
    for run in (file.parent.parent, ROOT / file.parent.parent):
        try:
            args = read_args(run)
        except ValueError:
            continue
        stages = args.get("stage_timesteps") or default_stages(args["total_timesteps"])
        ends = [f"policy_{whole_iterations(args, end)}" for end in accumulate(stages)]
        if file.stem in ends:
            return ends.index(file.stem)
    return file.stem


def read_args(run: Path) -> dict[str, Any]:
    """A run's args.json; ValueError if it is not one."""
    try:
        args = json.loads((run / "args.json").read_text())
        if not isinstance(args, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise ValueError(f"args.json is damaged or missing ({error})") from None
    sizes = {"total_timesteps", "num_envs", "batch_size", "num_minibatches", "unroll_length"}
    if missing := ({"env_id", "seed", "versions"} | sizes) - set(args):
        raise ValueError(f"args.json lacks {', '.join(sorted(missing))}")
    versions = args["versions"] if isinstance(args["versions"], dict) else {}
    texts = [args["env_id"], args.get("preset", ""), versions.get("script")]
    if not all(isinstance(text, str) for text in texts):
        text = "args.json is damaged or of an old version: env_id, preset or versions/script"
        raise ValueError(text)
    numbers = [*(args[name] for name in sizes), args.get("num_seeds", 1)]
    stages = args.get("stage_timesteps") or []
    numbers += stages if isinstance(stages, list) else [None]
    if not all(type(n) is int and n > 0 for n in numbers) or type(args["seed"]) is not int:
        raise ValueError("args.json is damaged: its sizes and seeds are not numbers above 0")
    return args


def read_table(file: Path) -> dict[str, np.ndarray]:
    """A CSV file of a run, a column (rows,) a name; ValueError if it has a bad or missing row."""
    try:
        text = file.read_text()
        header, *rows = text[: text.rfind("\n") + 1].splitlines() or [""]  # whole lines
        table = np.loadtxt(rows, delimiter=",", ndmin=2) if rows else np.empty((0, 0))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{file.name} is damaged or missing ({reason})") from None
    names = header.split(",")
    if table.size == 0 or table.shape[1] != len(names):
        raise ValueError(f"{file.name} has no rows, or a header for other columns")
    return dict(zip(names, table.T, strict=True))


def whole_iterations(args: dict[str, Any], steps: int) -> int:
    """Steps, rounded to whole iterations of a run of these arguments, as the scripts do."""
    size = args["batch_size"] * args["num_minibatches"] * args["unroll_length"]
    return (2 * steps + size) // (2 * size) * size


def last_step(args: dict[str, Any]) -> int:
    """Where a run of these arguments ends."""
    return whole_iterations(args, args["total_timesteps"])


def read_run(run: Path, unfinished: bool = False) -> tuple[dict[str, Any], dict[int, Curve]]:
    """Arguments and every seed's curve; ValueError if anything is missing, damaged, unfinished."""
    args = read_args(run)
    table = read_table(run / "eval.csv")
    if missing := {"seed", "step", "return_mean"} - set(table):
        raise ValueError(f"eval.csv lacks {', '.join(sorted(missing))}")
    curves = {}
    for seed in range(args["seed"], args["seed"] + args.get("num_seeds", 1)):
        mine = table["seed"] == seed
        steps, returns = table["step"][mine], table["return_mean"][mine]
        if len(steps) == 0:
            raise ValueError(f"eval.csv has no row of seed {seed}")
        if not np.isfinite([steps, returns]).all() or (np.diff(steps) <= 0).any():
            raise ValueError(
                f"eval.csv, seed {seed}: returns that are not finite, or steps out of order"
            )
        if steps[-1] > last_step(args) or (steps[-1] < last_step(args) and not unfinished):
            raise ValueError(
                f"seed {seed} is not finished: at step {steps[-1]:.0f} of {last_step(args)}; "
                "--unfinished draws it"
            )
        curves[seed] = Curve(steps, returns, run, str(args["versions"].get("git_commit")))
    return args, curves


def find(path: Path) -> list[Path]:
    """Run directories in or under a folder, also behind links: those with a time in their name
    first, the newest before the others, then by name. A missing folder ends the program, status 2.

    Folders called `earlier` are not entered.
    """
    found, seen = set(), set()
    if not path.is_dir() and (path,) != Options.runs:
        wrong("--runs", path, "run directories, or folders that hold some")
    for folder, folders, files in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        if "earlier" in folders:
            folders.remove("earlier")
        if {"args.json", "eval.csv"} & set(files):
            found.add(Path(folder))

    def order(run: Path) -> tuple[int, Path]:
        time = re.search(r"__(\d{9,})(-\d+)?$", run.name)
        return -int(time[1]) if time else 0, run

    return sorted(found, key=order)


@cache
def load(paths: tuple[Path, ...], unfinished: bool = False) -> tuple[Group, ...]:
    """All groups in these folders. What is not whole is skipped, named in a line; a seed counts
    once.
    """
    whole, skipped = [], []
    for path in paths:
        for run in find(path):
            source = "" if run == path else str(path)
            try:
                args, curves = read_run(run, unfinished or run == path)
                whole.append((source, args, curves, settings_of(args)))
            except ValueError as error:
                skipped.append(f"{run} ({error})")
    # A finished run counts before an unfinished one of the same seed.
    whole.sort(key=lambda x: min(curve.steps[-1] for curve in x[2].values()) < last_step(x[1]))
    groups: dict[tuple, Group] = {}
    for source, args, curves, settings in whole:
        method, preset = Path(args["versions"]["script"]).stem, args.get("preset", "none")
        task, total = args["env_id"], args["total_timesteps"]
        key = (method, task, preset, total, json.dumps(settings, sort_keys=True), source)
        group = Group(method, task, preset, settings, total, last_step(args), curves, source)
        if not source and (not group.finished or set(curves) & set(groups.get(key, group).curves)):
            key += (str(next(iter(curves.values())).run),)  # named: as it is, not merged
        group = groups.setdefault(key, replace(group, curves={}))
        for seed, curve in curves.items():
            first = group.curves.setdefault(seed, curve)
            if first is not curve:
                same = all(map(np.array_equal, first[:2], curve[:2]))
                why = "a copy of" if same else "there is already"
                skipped.append(f"seed {seed} of {curve.run} ({why} {first.run})")
    if skipped:
        print(f"skipped: {'; '.join(skipped)}")
    return tuple(groups[key] for key in sorted(groups, key=str))


def items(value: Any) -> list[Any]:
    """A setting as a list of numbers, where they are some: 0.1, "1e-1", [0.1] and "0.1" are the
    same.
    """
    if not isinstance(value, list | tuple):
        value = str(value).split(",")

    def number(item: Any) -> Any:
        try:
            return float(item)
        except (TypeError, ValueError):
            return str(item).lower()

    return [number(item) for item in value]


def asked(options: Options, groups: tuple[Group, ...]) -> dict[str, str]:
    """`--where` by argument; one that no script of the groups has ends the program."""
    pairs = (item.partition("=") for item in options.where)
    where = {name.strip("-").replace("-", "_"): value for name, _, value in pairs}
    known = set().union(*({*preset_args(g.method, "paper"), *g.settings} for g in groups))
    unknown = sorted(set(where) - (known - INCIDENTAL))
    if groups and unknown:
        takes = "an argument that matters to training, of a script that was run"
        wrong("--where", unknown[0], takes)
    if len(where) < len(options.where):
        wrong("--where", " ".join(options.where), "each argument once")
    return where


def value_of(group: Group, name: str) -> Any:
    """An argument of a group; None if its script has none of that name."""
    return group.settings.get(name, usual_args(group.method, group.preset, group.total).get(name))


def fits(group: Group, where: dict[str, str]) -> bool:
    """Whether a group's arguments are those of `--where`, as far as its script has them."""
    script = preset_args(group.method, group.preset)
    for name, value in where.items():
        has = name in script or name in group.settings or name in GONE
        if has and items(value_of(group, name)) != items(value):
            return False
    return True


def pool(options: Options, drawable: Callable[[Group], bool] = lambda group: True) -> list[Group]:
    """Of the groups that a figure can draw, the named ones, and in folders those of `--where` and
    of the asked preset: by default the paper's, where a folder has runs of it for the task.
    """
    every = load(options.runs, options.unfinished)
    where, groups = asked(options, every), [group for group in every if drawable(group)]
    found = [group for group in groups if group.named or fits(group, where)]
    papers = {(group.source, group.task) for group in found if group.preset == "paper"}

    def of_preset(group: Group) -> bool:
        if options.preset == "auto":
            return group.preset == "paper" or (group.source, group.task) not in papers
        return group.preset == options.preset

    return [group for group in found if group.named or of_preset(group)]


def without(group: Group, name: str) -> str:
    """A group's source, preset, length and settings but for this one and the `--exp-name`."""
    rest = {key: value for key, value in group.settings.items() if key not in (name, "exp_name")}
    return json.dumps([group.source, group.preset, group.total, rest], sort_keys=True)


def plainness(group: Group) -> tuple:
    """Sorts the longest first, then those with the fewest settings, then with the most seeds."""
    return -group.total, len(group.settings), -len(group.curves), str(group.settings)


def comparable(groups: list[Group]) -> list[Group]:
    """Of groups of one source and task one for each name, all under the same CONDITIONS.

    Of several conditions: the longest runs, then the most names, then the fewest settings.
    """
    under: dict[str, dict[str, Group]] = {}
    for group in sorted(groups, key=plainness):
        condition = {name: items(value_of(group, name)) for name in CONDITIONS}
        key = json.dumps(condition | {"total_timesteps": group.total}, sort_keys=True)
        under.setdefault(key, {}).setdefault(group.name, group)

    def order(alike: dict[str, Group]) -> tuple:
        some = next(iter(alike.values()))
        return some.total, len(alike), -sum(len(group.settings) for group in alike.values())

    return list(max(under.values(), key=order).values())


def select(options: Options, drawable: Callable[[Group], bool] = lambda group: True) -> list[Group]:
    """The groups to draw, labelled, in the paper's order; says in a line how many are left out.

    Run directories that `--runs` names are drawn as they are. Of the runs in a folder, those that
    can be compared, see `comparable`; runs on a frozen decoder (Figure 6) only if `--where` asks.
    CannotDraw if there is none.
    """
    every = load(options.runs, options.unfinished)
    frozen = "decoder_from" in asked(options, every)

    def usual(group: Group) -> bool:
        return drawable(group) and (group.named or ("decoder_from" in group.settings) == frozen)

    chosen, by_task = [], {}
    for group in pool(options, usual):
        if group.named:
            chosen.append(group)
        else:
            by_task.setdefault((group.source, group.task), []).append(group)
    for groups in by_task.values():
        chosen += comparable(groups)
    if not chosen:
        asks = " ".join([f"--preset {options.preset}", *options.where])
        there = ", ".join(sorted({f"{group.name} on {group.task}" for group in every})) or "no run"
        raise CannotDraw(f"no run that can be drawn ({asks}); there: {there}")
    order = {name: i for i, name in enumerate((*METHODS, *TASKS))}
    chosen.sort(key=lambda g: (order.get(g.method, 99), g.method, "exp_name" in g.settings))
    chosen.sort(key=lambda g: (order.get(g.task, 99), g.task))
    chosen = labelled(chosen)
    hint = "--where or --preset asks for others, --runs RUN_DIR draws a run as it is"
    report(chosen, every, hint)
    return chosen


def labelled(groups: list[Group]) -> list[Group]:
    """The groups with labels that tell those of a task apart: by name, then folder, then settings
    that differ, then run.
    """
    done = []
    for group in groups:
        alike = [g for g in groups if g.name == group.name]
        label = group.name
        if len({g.source for g in alike}) > 1:
            label += f", {group.source or 'named'}"
        alike = [g for g in alike if g.source == group.source]
        if len(alike) > len({g.task for g in alike}):
            known = sorted({name for g in alike for name in g.settings})
            differs = [n for n in known if len({shown(value_of(g, n)) for g in alike}) > 1]
            label += "".join(f", {name}={shown(value_of(group, name))}" for name in differs)
            if len({g.preset for g in alike}) > 1:
                label += f", preset {group.preset}"
        done.append(replace(group, label=label))
    labels = [(group.task, group.label) for group in done]
    for i, group in enumerate(done):
        if labels.count((group.task, group.label)) > 1:
            run = next(iter(group.curves.values())).run
            done[i] = replace(group, label=f"{group.label}, {run.name}")
    kinds: dict[str, list[str]] = {}
    for group in done:
        kind = kinds.setdefault(group.name if group.name in METHODS.values() else "", [])
        if group.label not in kind:
            kind.append(group.label)
    places = {label: place for kind in kinds.values() for place, label in enumerate(kind)}
    return [replace(group, place=places[group.label]) for group in done]


def report(drawn: list[Group], every: tuple[Group, ...], hint: str) -> None:
    """Prints a line for each group that is drawn, and one for all others."""
    for group in drawn:
        print(f"drawn: {group}")
    if rest := len(every) - len(drawn):
        print(f"left out: {rest} other setting{'s' * (rest > 1)} ({hint})")


def align(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """A group's curves on one grid: steps (S,) and returns (K, S) by seed, linear between
    evaluations.

    The grid is every step at which a seed was evaluated, from where all have begun to where the
    first ends.
    """
    curves = [group.curves[seed] for seed in sorted(group.curves)]
    low, high = max(c.steps[0] for c in curves), min(c.steps[-1] for c in curves)
    steps = np.unique(np.concatenate([c.steps for c in curves]))
    steps = steps[(steps >= low) & (steps <= high)]
    return steps, np.stack([np.interp(steps, c.steps, c.returns) for c in curves])


def final_returns(group: Group) -> np.ndarray:
    """Every seed's return at the last step that all have (K,), in the order of their seeds."""
    return align(group)[1][:, -1]


def mean_std(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over seeds (the first axis), n - 1 in the variance; NaN for one
    seed.
    """
    std = returns.std(0, ddof=1) if len(returns) > 1 else np.full(returns.shape[1:], np.nan)
    return returns.mean(0), std


def command(draw: Callable[..., list[Path]]) -> int:
    """A module's command line: arguments from its `draw`, exit status 1 if the logs do not allow
    it.
    """
    try:
        for file in tyro.cli(draw, config=(tyro.conf.OmitArgPrefixes,)):
            print(f"wrote {file}")
    except CannotDraw as error:
        print(f"cannot draw: {error}", file=sys.stderr)
        return 1
    return 0
