"""How well the paper reproduces: the cells of its Table 1 beside the runs of them that there are.

python -m plotting.reproduction --runs results --to results/README.md

rewrites the table between two marks in that file.
"""

import os
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from plotting import runs
from plotting.paper import METHODS, SEEDS, TASKS, TOTAL_TIMESTEPS, reported

MARKS = ("<!-- made by plotting.reproduction -->\n", "<!-- end -->\n")
HEADER = ("task", "method", "the paper", "ours", "seeds", "steps", "log")


@dataclass(frozen=True)
class Logs:
    """Where the logs are."""

    runs: tuple[Path, ...] = (Path("results"),)  # run directories, or folders that hold some


def cells(logs: Logs) -> dict[tuple[str, str], runs.Group]:
    """By (task, method): its run, of the paper's preset if there is one, and else of another.

    A task's methods are compared as in the figures, see `runs.comparable`.
    """
    found = {}
    for preset, task in product(("cpu", "paper"), TASKS):

        def drawable(group: runs.Group, task: str = task) -> bool:
            other = {"decoder_from", "impl"} & set(group.settings)
            return group.task == task and group.name in METHODS.values() and not other

        groups = runs.pool(runs.Options(logs.runs, preset=preset), drawable)
        if groups:
            found |= {(task, group.name): group for group in runs.comparable(groups)}
    return found


def rows(found: dict[tuple[str, str], runs.Group], root: Path) -> list[tuple[str, ...]]:
    """A row a cell of Table 1 that has a run, in the paper's order; paths relative to `root`."""
    table = []
    for task, name in product(TASKS, METHODS.values()):
        if (task, name) in found:
            group = found[task, name]
            mean, std = runs.mean_std(returns := runs.final_returns(group))
            folders = sorted({curve.run for curve in group.curves.values()})
            logs = ", ".join(f"`{os.path.relpath(folder, root)}/`" for folder in folders)
            ours = f"{mean:.1f} ± {std:.1f}" if len(returns) > 1 else f"{mean:.1f}"
            cell = (task, name, "{:.2f} ± {:.2f}".format(*reported(name, task)), ours)
            cell += (str(len(returns)), f"{int(runs.align(group)[0][-1]) / 1e6:.4g}M")
            table.append((*cell, logs))
    return table


def as_markdown(found: dict[tuple[str, str], runs.Group], root: Path) -> str:
    """The table, and what is of the paper's size and what has not been run."""
    table = rows(found, root)
    lines = ["| " + " | ".join(row) + " |" for row in (HEADER, ["---"] * len(HEADER), *table)]
    full = sum(len(g.curves) >= SEEDS and g.reached >= TOTAL_TIMESTEPS for g in found.values())
    count = f"Of the paper's {len(TASKS) * len(METHODS)} cells, {full} are of its size, "
    count += f"{len(found) - full} smaller."
    none = [task for task in TASKS if task not in {task for task, _ in found}]
    if none:
        count += f" Not run: {', '.join(none)}."
    for task in TASKS:
        missing = [name for name in METHODS.values() if (task, name) not in found]
        if missing and task not in none:
            count += f" {task} has not been run with {', '.join(missing)}."
    return "\n".join([*lines, "", count]) + "\n"


def draw(logs: Logs, to: Path = Path("results/README.md")) -> list[Path]:
    """Writes the table of the cells into a Markdown file, between the marks that it has.

    Args:
        to: The file; logs are named relative to its folder.
    """
    text = to.read_text() if to.is_file() else ""
    if [text.count(mark) for mark in MARKS] != [1, 1] or text.index(MARKS[0]) > text.index(
        MARKS[1]
    ):
        runs.wrong("--to", to, f"a file with the lines {MARKS[0].strip()} and {MARKS[1].strip()}")
    before, _, rest = text.partition(MARKS[0])
    table = as_markdown(cells(logs), to.parent)
    to.write_text(before + MARKS[0] + "\n" + table + "\n" + MARKS[1] + rest.partition(MARKS[1])[2])
    print(table)
    return [to]


if __name__ == "__main__":
    sys.exit(runs.command(draw))
