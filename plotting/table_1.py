"""Table 1: final returns, mean and std over seeds, beside the paper's.

python -m plotting.table_1 --runs runs --out figures
"""

import re
import sys
from pathlib import Path

import numpy as np

from plotting import runs, style
from plotting.paper import METHODS, SEEDS, TASKS, TOTAL_TIMESTEPS, reported

HEADER = ["task", "method", "ours", "the paper", "our seeds x steps"]
FORMATS = {
    "txt": ("*{}*", "{} ± {}"),  # how the best and a mean and its std look
    "md": ("**{}**", "{} ± {}"),
    "tex": ("$\\mathbf{{{}}}$", "{} \\pm {}"),
}


def best(means: dict[str, float]) -> set[str]:
    """The paper's rule for bold: the highest mean of a task, if there is another one."""
    top = max(means.values(), default=0.0)
    return {name for name, mean in means.items() if mean == top} if len(means) > 1 else set()


def tex(text: str) -> str:
    """Text with what LaTeX would take for commands escaped."""
    return re.sub(r"([&%$#_{}])", r"\\\1", text)


def rows(groups: list[runs.Group], kind: str) -> list[list[str]]:
    """The rows in one of FORMATS: of each task with a run, the paper's methods, then the others.

    Ours is each seed's last evaluation, of the last policy: nothing is selected.
    """
    bold, plus_minus = FORMATS[kind]
    table = []

    def pair(value: tuple[float, float] | None, digits: int, marked: bool) -> str:
        if value is None:
            return "-"
        mean, std = (f"{x:.{digits}f}" for x in value)
        text = mean if np.isnan(value[1]) else plus_minus.format(mean, std)
        return bold.format(text) if marked else f"${text}$" if kind == "tex" else text

    for task in dict.fromkeys(group.task for group in groups):
        mine = {group.label: group for group in groups if group.task == task}
        found = {name: runs.mean_std(runs.final_returns(g)) for name, g in mine.items()}
        papers = {name: reported(name, task) for name in METHODS.values() if task in TASKS}
        missing = [name for name in papers if name not in {g.name for g in mine.values()}]
        highest = best({name: float(mean) for name, (mean, _) in found.items()})
        highest_paper = best({name: paper[0] for name, paper in papers.items()})
        order = {name: i for i, name in enumerate(METHODS.values())}
        names = sorted(
            [*mine, *missing], key=lambda n: order.get(mine[n].name if n in mine else n, 9)
        )
        for name in names:
            group, ours = mine.get(name), found.get(name)
            of = group.name if group else name
            paper = papers.get(of)
            row = [task, tex(name) if kind == "tex" else name]
            row += [pair(ours, 1, name in highest), pair(paper, 2, of in highest_paper)]
            size = "no run here"
            if group:
                size = f"{len(group.curves)} x {runs.align(group)[0][-1] / 1e6:.4g}M"
            table.append([*row, size])
    return table


def notes(groups: list[runs.Group]) -> list[str]:
    """What a reader of the table has to know: one sentence each."""
    lines = ["Return of the last policy (not the best), mean ± std (n - 1) over seeds."]
    lines.append("Bold or in asterisks: the highest mean, by chance or not.")
    if min(len(group.curves) for group in groups) < SEEDS:
        lines.append(f"Fewer seeds than the paper's {SEEDS}: see the last column.")
    if min(group.reached for group in groups) < TOTAL_TIMESTEPS:
        lines.append(
            f"The paper has {TOTAL_TIMESTEPS / 1e6:g}M steps: where the last column shows fewer, "
            "a difference says nothing about whether the paper reproduces."
        )
    lines += style.unusual(groups)
    if missing := [task for task in TASKS if task not in {group.task for group in groups}]:
        lines.append(f"Not run: {', '.join(missing)}.")
    return lines


def as_text(groups: list[runs.Group], kind: str) -> str:
    """The whole table as `txt` (best between asterisks), `md` or `tex` (booktabs)."""
    table = rows(groups, kind)
    widths = [max(map(len, column)) for column in zip(HEADER, *table, strict=True)]
    widths = [0 if kind == "md" else width for width in widths]
    lined = [
        [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        for row in (HEADER, *table)
    ]
    if kind == "txt":
        body = ["  ".join(row).rstrip() for row in lined]
        return "\n".join([*body, "", *notes(groups)]) + "\n"
    if kind == "md":
        body = ["| " + " | ".join(row) + " |" for row in lined]
        rule = "| " + " | ".join("---" for _ in HEADER) + " |"
        return "\n".join([body[0], rule, *body[1:], "", *notes(groups)]) + "\n"
    body = [" & ".join(row).rstrip() + r" \\" for row in lined]
    for i in range(len(table) - 1):
        if table[i][0] != table[i + 1][0]:
            body[i + 1] += r" \addlinespace"
    text = tex(" ".join(notes(groups))).replace("±", r"$\pm$")
    body.append(rf"\bottomrule \multicolumn{{5}}{{p{{0.9\linewidth}}}}{{\footnotesize {text}}} \\")
    frame = ["% needs booktabs", r"\begin{tabular}{llrrr}", r"\toprule", body[0], r"\midrule"]
    return "\n".join([*frame, *body[1:], r"\end{tabular}"]) + "\n"


def draw(options: runs.Options) -> list[Path]:
    """Writes Table 1 as text, Markdown and LaTeX (booktabs), and prints the text; of finished runs
    only.
    """
    groups = runs.select(options, lambda group: group.finished)
    options.out.mkdir(parents=True, exist_ok=True)
    files = [options.out / f"table_1.{kind}" for kind in FORMATS]
    for file in files:
        file.write_text(as_text(groups, file.suffix[1:]))
    print("\n" + files[0].read_text())
    return files


if __name__ == "__main__":
    sys.exit(runs.command(draw))
