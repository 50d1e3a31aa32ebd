"""Table 1: final returns, mean and std over seeds, beside the paper's.

python -m plotting.table_1 --runs results runs --out figures
"""

import sys
from pathlib import Path

import numpy as np

from plotting import runs
from plotting.paper import METHODS, SEEDS, TASKS, TOTAL_TIMESTEPS, reported

FORMATS = {
    "txt": ("*{}*", "{} ± {}"),  # how the best and a mean and its std look
    "md": ("**{}**", "{} ± {}"),
    "tex": ("\\textbf{{{}}}", "${} \\pm {}$"),
}


def cells(groups: dict[tuple[str, str], runs.Group]) -> dict[tuple[str, str], dict]:
    """By (method, task): our mean and std, the paper's, their difference, number of seeds, steps.

    Ours is each seed's last evaluation, of the last policy: nothing is selected.
    """
    found = {}
    for (method, task), group in groups.items():
        returns = runs.final_returns(group)
        paper, (mean, std) = reported(method, task), runs.mean_std(returns)
        step = runs.align(group)[0][-1]
        found[method, task] = {
            "ours": (float(mean), float(std)),
            "paper": paper,
            "difference": float(mean) - paper[0] if paper else None,
            "seeds": len(returns),
            "steps": int(step),
        }
    return found


def best(means: dict[str, float]) -> set[str]:
    """The paper's rule for bold: the highest mean of a task, if there is another to be higher than."""
    return {m for m, mean in means.items() if mean == max(means.values())} if len(means) > 1 else set()


def rows(found: dict[tuple[str, str], dict], kind: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table in one of FORMATS: four rows a method, a column a task."""
    bold, plus_minus = FORMATS[kind]
    methods = [*METHODS, *sorted({m for m, _ in found} - set(METHODS))]
    tasks = [*TASKS, *sorted({t for _, t in found} - set(TASKS))]
    ours = {t: best({m: found[m, t]["ours"][0] for m in methods if (m, t) in found}) for t in tasks}
    papers = {t: best({m: p[0] for m in methods if (p := reported(m, t))}) for t in tasks}

    def pair(value: tuple[float, float] | None, digits: int, marked: bool) -> str:
        if value is None:
            return "-"
        mean, std = (f"{x:.{digits}f}" for x in value)
        text = plus_minus.format(mean, std) if not np.isnan(value[1]) else mean
        return bold.format(text) if marked else text

    table = []
    for method in methods:
        mine = [found.get((method, task), {}) for task in tasks]
        name = METHODS.get(method, method)
        name = name.replace("_", "\\_") if kind == "tex" else name
        table += [
            [
                name,
                "ours",
                *(pair(c.get("ours"), 1, method in ours[t]) for c, t in zip(mine, tasks, strict=True)),
            ],
            ["", "paper", *(pair(reported(method, t), 2, method in papers[t]) for t in tasks)],
            [
                "",
                "ours - paper",
                *("-" if c.get("difference") is None else f"{c['difference']:+.1f}" for c in mine),
            ],
            ["", "seeds x steps", *(f"{c['seeds']} x {c['steps'] / 1e6:.4g}M" if c else "-" for c in mine)],
        ]
    return ["", "", *tasks], table


def notes(found: dict[tuple[str, str], dict], preset: str) -> list[str]:
    """What a reader of the table has to know: one sentence each."""
    lines = [
        "Final return of the evaluation policy (the last, not the best), mean and std (n - 1) over seeds."
    ]
    if min(c["seeds"] for c in found.values()) < SEEDS:
        lines.append(f"Fewer seeds than the paper's {SEEDS}: see 'seeds x steps'.")
    if min(c["steps"] for c in found.values()) < 0.99 * TOTAL_TIMESTEPS:
        lines.append(
            f"Ours are runs with --preset {preset}, the paper's have {TOTAL_TIMESTEPS / 1e6:g}M steps: where "
            "'seeds x steps' shows fewer, the difference says nothing about whether the paper reproduces."
        )
    return lines


def as_text(found: dict[tuple[str, str], dict], preset: str, kind: str) -> str:
    """The whole table as `txt` (best between asterisks), `md` or `tex` (booktabs)."""
    header, table = rows(found, kind)
    widths = [max(map(len, column)) for column in zip(header, *table, strict=True)]
    lined = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, *table)]
    if kind == "txt":
        body = ["  ".join(row).rstrip() for row in lined]
        return "\n".join([*body, "", *notes(found, preset)]) + "\n"
    if kind == "md":
        body = ["| " + " | ".join(row) + " |" for row in lined]
        rule = "| " + " | ".join("-" * max(width, 3) for width in widths) + " |"
        return "\n".join([body[0], rule, *body[1:], "", *notes(found, preset)]) + "\n"
    body = [" & ".join(row).rstrip() + r" \\" for row in lined]
    body = [line + r" \addlinespace" * (i % 4 == 0 < i < len(table)) for i, line in enumerate(body)]
    comments = [f"% {note}" for note in notes(found, preset)]
    columns = "ll" + "r" * (len(header) - 2)
    frame = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule"]
    return "\n".join([*comments, *frame, r"\end{tabular}"]) + "\n"


def draw(options: runs.Options) -> list[Path]:
    """Writes Table 1 as text, Markdown and LaTeX (booktabs), and prints the text."""
    groups, preset = runs.select(options)
    found = cells(groups)
    options.out.mkdir(parents=True, exist_ok=True)
    files = [options.out / f"table_1.{kind}" for kind in FORMATS]
    for file in files:
        file.write_text(as_text(found, preset, file.suffix[1:]))
    print("\n" + files[0].read_text())
    return files


if __name__ == "__main__":
    sys.exit(runs.command(draw))
