"""Table 1: final returns, mean and std over seeds, beside the paper's.

python -m plotting.table_1 --runs results runs --out figures
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from plotting import runs
from plotting.paper import METHODS, SEEDS, TASKS, TOTAL_TIMESTEPS, reported

FORMATS = {
    "txt": ("*{}*", "{} ± {}"),  # how the best and a mean and its std look
    "md": ("**{}**", "{} ± {}"),
    "tex": ("$\\mathbf{{{}}}$", "{} \\pm {}"),
}


def cells(groups: dict[tuple[str, str], runs.Group]) -> dict[tuple[str, str], dict]:
    """By (method, task): our mean and std over seeds, the number of seeds, the step.

    Ours is each seed's last evaluation, of the last policy: nothing is selected.
    """
    found = {}
    for (method, task), group in groups.items():
        mean, std = runs.mean_std(returns := runs.final_returns(group))
        step = int(runs.align(group)[0][-1])
        found[method, task] = {
            "ours": (float(mean), float(std)),
            "seeds": len(returns),
            "steps": step,
        }
    return found


def best(means: dict[str, float]) -> set[str]:
    """The paper's rule for bold: the highest mean of a task, if there is another one."""
    return (
        {m for m, mean in means.items() if mean == max(means.values())} if len(means) > 1 else set()
    )


def rows(found: dict[tuple[str, str], dict], kind: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table in one of FORMATS: a row a method of each task with a run."""
    bold, plus_minus = FORMATS[kind]
    methods = [*METHODS, *sorted({m for m, _ in found} - set(METHODS))]
    order = [*TASKS, *sorted({t for _, t in found} - set(TASKS))]
    table = []

    def pair(value: tuple[float, float] | None, digits: int, marked: bool) -> str:
        if value is None:
            return "-"
        mean, std = (f"{x:.{digits}f}" for x in value)
        text = mean if np.isnan(value[1]) else plus_minus.format(mean, std)
        return bold.format(text) if marked else f"${text}$" if kind == "tex" else text

    for task in (t for t in order if any((m, t) in found for m in methods)):
        ours = best({m: found[m, task]["ours"][0] for m in methods if (m, task) in found})
        papers = best({m: paper[0] for m in methods if (paper := reported(m, task))})
        for method in methods:
            cell, paper, name = (
                found.get((method, task)),
                reported(method, task),
                METHODS.get(method, method),
            )
            row = [task, name.replace("_", "\\_") if kind == "tex" else name]
            row += [
                pair(cell and cell["ours"], 1, method in ours),
                pair(paper, 2, method in papers),
            ]
            row += [f"{cell['ours'][0] - paper[0]:+.1f}" if cell and paper else "-"]
            row += [f"{cell['seeds']} x {cell['steps'] / 1e6:.4g}M" if cell else "not run"]
            if cell or paper:
                table.append(row)
    return ["task", "method", "ours", "the paper", "ours - paper", "our seeds x steps"], table


def notes(found: dict[tuple[str, str], dict], preset: str) -> list[str]:
    """What a reader of the table has to know: one sentence each."""
    lines = ["Final return of the evaluation policy (the last, not the best), "]
    lines[0] += "mean and std (n - 1) over seeds."
    if min(cell["seeds"] for cell in found.values()) < SEEDS:
        lines.append(f"Fewer seeds than the paper's {SEEDS}: see the last column.")
    if min(cell["steps"] for cell in found.values()) < 0.99 * TOTAL_TIMESTEPS:
        lines.append(
            f"The paper's runs have {TOTAL_TIMESTEPS / 1e6:g}M steps, ours are of --preset "
            f"{preset}: where the last column shows fewer, the difference says nothing about "
            "whether the paper reproduces."
        )
    if missing := [task for task in TASKS if not any(t == task for _, t in found)]:
        lines.append(f"Not run: {', '.join(missing)}.")
    return lines


def as_text(found: dict[tuple[str, str], dict], preset: str, kind: str) -> str:
    """The whole table as `txt` (best between asterisks), `md` or `tex` (booktabs)."""
    header, table = rows(found, kind)
    widths = [max(map(len, column)) for column in zip(header, *table, strict=True)]
    lined = [
        [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        for row in (header, *table)
    ]
    if kind == "txt":
        body = ["  ".join(row).rstrip() for row in lined]
        return "\n".join([*body, "", *notes(found, preset)]) + "\n"
    if kind == "md":
        body = ["| " + " | ".join(row) + " |" for row in lined]
        rule = "| " + " | ".join("-" * max(width, 3) for width in widths) + " |"
        return "\n".join([body[0], rule, *body[1:], "", *notes(found, preset)]) + "\n"
    body = [" & ".join(row).rstrip() + r" \\" for row in lined]
    for i in range(len(table) - 1):
        if table[i][0] != table[i + 1][0]:
            body[i + 1] += r" \addlinespace"
    text = " ".join(notes(found, preset)).replace("--", "-{}-")
    body.append(rf"\bottomrule \multicolumn{{6}}{{p{{0.9\linewidth}}}}{{\footnotesize {text}}} \\")
    frame = [
        "% needs booktabs",
        r"\begin{tabular}{llrrrr}",
        r"\toprule",
        body[0],
        r"\midrule",
        *body[1:],
    ]
    return "\n".join([*frame, r"\end{tabular}"]) + "\n"


def draw(options: runs.Options) -> list[Path]:
    """Writes Table 1 as text, Markdown and LaTeX (booktabs), and prints the text; of finished runs
    only.
    """
    groups, preset = runs.select(replace(options, unfinished=False))
    found = cells(groups)
    options.out.mkdir(parents=True, exist_ok=True)
    files = [options.out / f"table_1.{kind}" for kind in FORMATS]
    for file in files:
        file.write_text(as_text(found, preset, file.suffix[1:]))
    print("\n" + files[0].read_text())
    return files


if __name__ == "__main__":
    sys.exit(runs.command(draw))
