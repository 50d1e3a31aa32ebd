"""One look for all figures: fonts that stay text, colours that mean the same method everywhere."""

import textwrap
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window: a figure is a file
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plotting import runs
from plotting.paper import METHODS, SEEDS, TOTAL_TIMESTEPS

# Okabe and Ito's colours, told apart by the colour-blind; dashes, for those who print in grey.
COLOURS = {
    "ppo_gaussian": "#555555",
    "fpo": "#E69F00",
    "dppo": "#009E73",
    "gorl_diff_ppo": "#0072B2",
    "gorl_fm_ppo": "#D55E00",
}
DASHES = {"ppo_gaussian": (4, 1.5), "fpo": (1.2, 1.2), "dppo": (4, 1.2, 1.2, 1.2)}
SPARE = ("#CC79A7", "#56B4E9", "#000000", "#B8A800", "#8C564B", "#6A3D9A")  # for other names
WIDTH = 6.75  # inches, the width of a page's text

plt.rcParams.update(
    {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same on every machine
        "font.size": 7.5,
        "axes.titlesize": 8,
        "axes.labelsize": 7.5,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7.5,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#DDDDDD",
        "grid.linewidth": 0.5,
        "axes.axisbelow": True,
        "lines.linewidth": 1.4,
        "pdf.fonttype": 42,  # TrueType: text stays text
        "ps.fonttype": 42,
        "savefig.dpi": 300,
        "figure.constrained_layout.use": True,
    }
)


def method_line(method: str) -> dict:
    """Colour and dashes of one of the paper's methods, by its script's stem."""
    return {"color": COLOURS[method], "dashes": DASHES.get(method, (None, None))}


def line(group: runs.Group) -> dict:
    """Colour and dashes of a group, for `plot`: its method's, but for runs of another name."""
    if group.name != METHODS.get(group.method):
        return {"color": SPARE[group.spare % len(SPARE)], "dashes": (6, 1)}
    look = method_line(group.method)
    if group.label not in ("", group.name):  # beside others of that name
        look["dashes"] = (1 + group.spare % 3, 1)
    return look


def band(axes: Axes, steps: np.ndarray, mean: np.ndarray, std: np.ndarray, **look) -> None:
    """A learning curve: mean (S,) over seeds against steps (S,), and one std around it (NaN: no
    band).
    """
    axes.plot(steps / 1e6, mean, **look)
    axes.fill_between(
        steps / 1e6, mean - std, mean + std, color=look["color"], alpha=0.15, linewidth=0
    )


def panels(count: int, height: float = 1.7) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels of that height (inches), three a row; narrower for one."""
    columns = min(3, count)
    rows, width = -(-count // columns), (0.62 if count == 1 else 1.0) * WIDTH
    size = (width, 0.75 + (1.35 * height if count == 1 else height) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for empty in axes.flat[count:]:
        empty.set_axis_off()
    for panel in axes.flat[:count]:
        panel.set_xlabel("environment steps (M)")
    for panel in axes[:, 0]:
        panel.set_ylabel("return")
    return figure, list(axes.flat[:count])


def grid(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A figure of small panels (rows, columns), as wide as a page."""
    return plt.subplots(rows, columns, figsize=(WIDTH, 0.75 + 0.95 * rows), squeeze=False)


def note(
    groups: Iterable[runs.Group],
    what: str = "Mean and standard deviation over",
    counts: set[int] | None = None,
    paper: int = TOTAL_TIMESTEPS,
) -> str:
    """The caption: what is drawn, of how many seeds and steps, and where the paper has more.

    `counts`: numbers of seeds, if they are not the groups' own.
    """
    groups = list(groups)
    counts = counts or {len(group.curves) for group in groups}
    few, many = min(counts), max(counts)
    text = f"{what} {few if few == many else f'{few} to {many}'} seed{'s' * (many > 1)}"
    text += f", fewer than the paper's {SEEDS}." if few < SEEDS else "."
    reached = sorted({group.reached for group in groups})
    if reached[0] < paper:
        short = " to ".join(
            f"{steps / 1e6:.3g}M" for steps in dict.fromkeys(reached[:: len(reached) - 1 or 1])
        )
        text += f" {short} steps; the paper has {paper / 1e6:g}M."
    if any(group.preset == "cpu" for group in groups):
        text += " Sizes of --preset cpu."
    if any(group.reached != group.total for group in groups):
        text += " Not all runs are finished."
    return text


def finish(figure: Figure, axes: list[Axes], text: str, columns: int = 5) -> None:
    """The note on top and one legend of all panels below, where they cover no data."""
    entries = {}
    for panel in axes:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    longest = max(map(len, entries), default=0)
    columns = min(columns, max(1, int(figure.get_figwidth() / (0.6 + 0.07 * longest))))
    look = {"loc": "outside lower center", "ncols": columns, "handlelength": 2.6}
    if entries:
        figure.legend(entries.values(), entries.keys(), **look)
    wrapped = textwrap.fill(text, int(18 * figure.get_figwidth()))
    figure.suptitle(wrapped, fontsize=6.5, color="#555555")


def save(figure: Figure, out: Path, name: str) -> list[Path]:
    """Writes NAME.png and NAME.pdf into `out`, made if need be, and closes the figure."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{name}.{kind}" for kind in ("png", "pdf")]
    for file in files:
        figure.savefig(file, metadata={"CreationDate": None} if file.suffix == ".pdf" else None)
    plt.close(figure)
    return files
