"""How well the paper reproduces: every cell of its Table 1 beside the longest run of it that there
is.

python -m plotting.reproduction --runs results --to results/README.md

rewrites the table between two marks in that file.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from plotting import pack, runs
from plotting.paper import METHODS, SEEDS, TASKS, TOTAL_TIMESTEPS, reported

MARKS = ("<!-- made by plotting.reproduction -->\n", "<!-- end -->\n")
HEADER = ("task", "method", "the paper", "ours", "seeds", "steps", "device", "command", "log")


@dataclass(frozen=True)
class Logs:
    """Where the logs are."""

    runs: tuple[Path, ...] = (Path("results"),)  # run directories, or folders that hold some


def longest(groups: tuple[runs.Group, ...], method: str, task: str) -> runs.Group | None:
    """The run of a cell: of the paper's preset if there is one, the longest, nearest to its preset.

    Runs of a variant (`--exp-name`), on a frozen decoder, or with other physics are none of the
    cell.
    """
    variants = {"exp_name", "decoder_from", "impl"}
    mine = [
        g for g in groups if (g.method, g.task) == (method, task) and not variants & set(g.settings)
    ]

    def order(g: runs.Group) -> tuple:
        return g.preset == "paper", g.total, -len(g.settings), len(g.curves), str(g.settings)

    return max(mine, key=order, default=None)


def rows(groups: tuple[runs.Group, ...], root: Path) -> list[tuple[str, ...]]:
    """A row a cell of Table 1, in the paper's order; paths are relative to `root`."""
    table = []
    for task in TASKS:
        for method, name in METHODS.items():
            paper = "{:.2f} ± {:.2f}".format(*reported(method, task))
            if (group := longest(groups, method, task)) is None:
                table.append((task, name, paper, "not run yet", "", "", "", "", ""))
                continue
            mean, std = runs.mean_std(returns := runs.final_returns(group))
            folders = sorted({curve.run for curve in group.curves.values()})
            logs = ", ".join(f"`{os.path.relpath(folder, root)}/`" for folder in folders)
            args = [runs.read_args(folder) for folder in folders]
            devices = ", ".join(sorted({str(a["versions"].get("device", "unknown")) for a in args}))
            commands = ", ".join(f"`{pack.command_of(a)}`" for a in args)
            ours = f"{mean:.1f} ± {std:.1f}" if len(returns) > 1 else f"{mean:.1f}"
            steps = f"{int(runs.align(group)[0][-1]) / 1e6:.4g}M"
            table.append(
                (task, name, paper, ours, str(len(returns)), steps, devices, commands, logs)
            )
    return table


def as_markdown(table: list[tuple[str, ...]]) -> str:
    """The table, and a line that counts the cells of the paper's size and those without any run."""
    most = 0.99e-6 * TOTAL_TIMESTEPS  # whole iterations
    full = sum(row[4] != "" and int(row[4]) >= SEEDS and float(row[5][:-1]) > most for row in table)
    lines = ["| " + " | ".join(row) + " |" for row in (HEADER, ["---"] * len(HEADER), *table)]
    none = sum(row[3] == "not run yet" for row in table)
    smaller = len(table) - full - none
    count = f"{full} are of the paper's size, {smaller} smaller, {none} not run."
    return "\n".join([*lines, "", f"Of {len(table)} cells, {count}"]) + "\n"


def draw(logs: Logs, to: Path = Path("results/README.md")) -> list[Path]:
    """Writes the table of every cell of Table 1 into a Markdown file, between the marks that it
    has.

    Args:
        to: The file; logs are named relative to its folder.
    """
    text = to.read_text() if to.is_file() else ""
    if [text.count(mark) for mark in MARKS] != [1, 1] or text.index(MARKS[0]) > text.index(
        MARKS[1]
    ):
        runs.wrong("--to", to, f"a file with the lines {MARKS[0].strip()} and {MARKS[1].strip()}")
    (before, _, rest), groups = text.partition(MARKS[0]), runs.load(logs.runs)
    table = as_markdown(rows(groups, to.parent))
    to.write_text(before + MARKS[0] + "\n" + table + "\n" + MARKS[1] + rest.partition(MARKS[1])[2])
    print(table)
    return [to]


if __name__ == "__main__":
    sys.exit(runs.command(draw))
