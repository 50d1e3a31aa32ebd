"""How well the paper reproduces: the runs of each cell of its Table 1, and their statistics.

python -m plotting.reproduction --runs results/five_seeds/* --to results/README.md

rewrites the table between two marks in that file, a folder after the other.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plotting import aggregate, runs
from plotting.paper import METHODS, SEEDS, TASKS, TOTAL_TIMESTEPS, reported

MARKS = ("<!-- made by plotting.reproduction -->\n", "<!-- end -->\n")
HEADER = ("task", "method", "the paper", "last return", "by seed", "area")
HEADER += ("P(last above PPO)", "P(area above PPO)", "steps", "log")


@dataclass(frozen=True)
class Logs:
    """Where the logs are."""

    runs: tuple[Path, ...] = (Path("results"),)  # folders; the runs of each are compared


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation over seeds."""
    mean, std = runs.mean_std(values)
    return f"{mean:.1f} ± {std:.1f}" if len(values) > 1 else f"{mean:.1f}"


def above(groups: list[runs.Group], score: Callable[[runs.Group], np.ndarray]) -> dict[str, str]:
    """By label, the probability that a run's score is above one of PPO's, and its interval."""
    scores = {group.label: score(group)[:, None] for group in groups if len(group.curves) > 1}
    _, better = aggregate.statistics(scores, reps=2000) if len(scores) > 1 else ({}, {})
    return {label: "{:.2f} [{:.2f}, {:.2f}]".format(*values) for label, values in better.items()}


def rows(groups: list[runs.Group], root: Path) -> list[tuple[str, ...]]:
    """A row a run of a task and of one folder, in the paper's order; paths relative to `root`."""
    last, area = above(groups, runs.final_returns), above(groups, aggregate.area)
    table = []
    for group in groups:
        told = {k: v for k, v in group.different.items() if k in runs.CONDITIONS}
        task = ", ".join([group.task, *(f"{k} {v}" for k, v in told.items())])
        paper = reported(group.name, group.task)
        returns = runs.final_returns(group)
        folders = sorted({curve.run for curve in group.curves.values()})
        row = (task, group.label, "{:.2f} ± {:.2f}".format(*paper) if paper else "")
        row += (spread(returns), ", ".join(f"{value:.0f}" for value in returns))
        row += (spread(aggregate.area(group)), last.get(group.label, ""), area.get(group.label, ""))
        row += (f"{int(runs.align(group)[0][-1]) / 1e6:.4g}M",)
        logs = ", ".join(f"`{os.path.relpath(folder, root)}/`" for folder in folders)
        table.append((*row, logs))
    return table


def as_markdown(logs: Logs, root: Path) -> str:
    """The table, and what is of the paper's size and what has not been run."""
    table, found = [], {}
    for path in logs.runs:
        chosen = runs.select(runs.Options((path,)))
        for task in dict.fromkeys(group.task for group in chosen):
            table += rows([group for group in chosen if group.task == task], root)
        for group in chosen:
            full = len(group.curves) >= SEEDS and group.reached >= TOTAL_TIMESTEPS
            full = full and not group.settings
            found[group.task, group.name] = found.get((group.task, group.name), False) or full
    lines = ["| " + " | ".join(row) + " |" for row in (HEADER, ["---"] * len(HEADER), *table)]
    cells = [found.get((task, name)) for task in TASKS for name in METHODS.values()]
    count = f"Of the paper's {len(cells)} cells, {cells.count(True)} are here at its size, "
    count += f"{cells.count(False)} at a smaller one."
    return "\n".join([*lines, "", count]) + "\n"


def draw(logs: Logs, to: Path = Path("results/README.md")) -> list[Path]:
    """Writes the table of the runs into a Markdown file, between the marks that it has.

    Args:
        to: The file; logs are named relative to its folder.
    """
    text = to.read_text() if to.is_file() else ""
    if [text.count(mark) for mark in MARKS] != [1, 1] or text.index(MARKS[0]) > text.index(
        MARKS[1]
    ):
        runs.wrong("--to", to, f"a file with the lines {MARKS[0].strip()} and {MARKS[1].strip()}")
    before, _, rest = text.partition(MARKS[0])
    table = as_markdown(logs, to.parent)
    to.write_text(before + MARKS[0] + "\n" + table + "\n" + MARKS[1] + rest.partition(MARKS[1])[2])
    print(table)
    return [to]


if __name__ == "__main__":
    sys.exit(runs.command(draw))
