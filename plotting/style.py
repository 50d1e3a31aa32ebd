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
OTHERS = ((6, 1), (2, 1), (1, 1), (8, 2, 2, 2))  # dashes: of those, and of a second run of a name
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
    """Colour and dashes of a group, for `plot`: its method's, and others where it is not alone."""
    if group.name == METHODS.get(group.method):
        look, others = method_line(group.method), group.place - 1
    else:
        look = {"color": SPARE[group.place % len(SPARE)]}
        others = group.place // len(SPARE)
    if others >= 0:
        look["dashes"] = OTHERS[others % len(OTHERS)]
    return look


def plain(label: str) -> str:
    """A label as matplotlib shows it: a dollar begins no formula, an underscore hides nothing."""
    return label.replace("$", r"\$").lstrip("_")


def from_zero(axes: Axes) -> None:
    """Lets the returns' axis begin at 0, or below if returns do."""
    axes.set_ylim(bottom=min(0.0, axes.dataLim.y0))


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


def unusual(groups: Iterable[runs.Group], swept: tuple[str, ...] = ()) -> list[str]:
    """Sentences on the settings that are not the preset's and that no label tells, nor `swept`."""
    found = []
    for group in groups:
        words = {name: f"{name}={value}" for name, value in group.different.items()}
        words = {k: word for k, word in words.items() if word not in group.label and k not in swept}
        shared = [word for name, word in words.items() if name in runs.CONDITIONS]
        own = [word for name, word in words.items() if name not in runs.CONDITIONS]
        if shared:
            found.append(f"{group.task} with {', '.join(shared)}.")
        if own and "exp_name" not in group.settings:
            found.append(f"{group.label or group.name} with {', '.join(own)}.")
    return list(dict.fromkeys(found))


def note(
    groups: Iterable[runs.Group],
    what: str = "Mean and standard deviation over",
    counts: set[int] | None = None,
    paper: int = TOTAL_TIMESTEPS,
    swept: tuple[str, ...] = (),
) -> str:
    """The caption: what is drawn, of how many seeds and steps, and where the paper has more.

    `counts`: numbers of seeds, if they are not the groups' own. `swept`: settings that the figure
    tells.
    """
    groups = list(groups)
    counts = counts or {len(group.curves) for group in groups}
    few, many = min(counts), max(counts)
    text = f"{what} {few if few == many else f'{few} to {many}'} seed{'s' * (many > 1)}"
    if many == 1 and what.startswith("Mean"):
        text = "One seed"
    text += f", fewer than the paper's {SEEDS}." if few < SEEDS else "."
    short, long = (f"{f(g.reached for g in groups) / 1e6:.3g}M" for f in (min, max))
    if min(group.reached for group in groups) < paper:
        text += f" {short}{f' to {long}' * (short != long)} steps; the paper has {paper / 1e6:g}M."
    if any(group.preset == "cpu" for group in groups):
        text += " Sizes of --preset cpu."
    if not all(group.finished for group in groups):
        text += " Not all runs are finished."
    return " ".join([text, *unusual(groups, swept)])


def finish(figure: Figure, axes: list[Axes], text: str, columns: int = 5) -> None:
    """The note on top and one legend of all panels below, where they cover no data."""
    entries = {}
    for panel in axes:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    longest = max(map(len, entries), default=0)
    columns = min(columns, max(1, int(figure.get_figwidth() / (0.55 + 0.055 * longest))))
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
