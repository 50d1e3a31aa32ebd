"""Figure 2: the method in one picture, drawn anew. What is trained is coloured.

python -m plotting.figure_2 --out figures
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Line
from PIL import Image

from plotting import runs, style

FIXED, INK = "#777777", "#333333"
ENCODER, DECODER = style.COLOURS["gorl_diff_ppo"], style.COLOURS["gorl_fm_ppo"]
HEIGHT = 5.35  # inches, as all lengths here
COLUMNS, ROWS = (1.08, 3.375, 5.67), (4.26, 1.86)  # middles of the six boxes
WIDE, HIGH = 1.68, 0.98  # of a box
BOXES = {
    (0, 0): (r"encoder  $\pi(\varepsilon\,|\,s)$", "trained", ENCODER),
    (0, 1): (r"decoder  $u = g(s, \varepsilon)$", "frozen", FIXED),
    (0, 2): ("environment", "MuJoCo Playground", FIXED),
    (1, 0): (r"fresh noise  $N(0, I)$", "fixed", FIXED),
    (1, 1): (r"decoder  $u = g(s, \varepsilon)$", "trained", DECODER),
    (1, 2): ("recent actions $u$", "better ones weighted more", FIXED),
}
STAGES = {"decoder: the identity": 60, "decoder refined once": 60}  # million steps
STAGES |= {"refined twice": 30, "refined 3 times": 30}


def bell(mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    """A normal density on GRID."""
    return np.exp(-0.5 * ((GRID - mean) / std) ** 2) / std


GRID = np.linspace(-3.2, 3.2, 400)
PEAKS = bell(-1.2, 0.42) + 0.75 * bell(1.3, 0.42)


def write(axes: Axes, x: float, y: float, text: str, colour: str = INK, **look) -> None:
    """Text around (x, y), unless `look` aligns it otherwise."""
    axes.text(x, y, text, color=colour, **{"ha": "center", "va": "center"} | look)


def heading(axes: Axes, y: float, text: str) -> None:
    """A bold line, flush with the boxes."""
    write(axes, COLUMNS[0] - WIDE / 2, y, text, ha="left", fontsize=8.5, weight="bold")


def rounded(axes: Axes, x: float, y: float, wide: float, high: float, **look) -> None:
    """A rounded rectangle around (x, y)."""
    shape = f"round,pad=0,rounding_size={min(0.07, high / 2)}"
    corner = (x - wide / 2, y - high / 2)
    axes.add_patch(FancyBboxPatch(corner, wide, high, boxstyle=shape, **look))


def arrow(axes: Axes, *points: tuple[float, float], colour: str = INK) -> None:
    """An arrow along the points."""
    look = {"color": colour, "linewidth": 1.1, "joinstyle": "round", "shrinkA": 0, "shrinkB": 0}
    head = "-|>,head_width=2.4,head_length=4.5"
    axes.add_patch(FancyArrowPatch(path=Line(points), arrowstyle=head, **look))


def density(axes: Axes, row: int, column: int, p: np.ndarray, top: float, **look) -> None:
    """A density in a box, `top` inches high."""
    x, y = COLUMNS[column] + 0.22 * GRID, ROWS[row] - 0.26
    axes.plot(x, y + top * p / p.max(), **look)
    axes.fill_between(x, y, y + top * p / p.max(), color=look["color"], alpha=0.14, linewidth=0)


def transport(axes: Axes, row: int, colour: str) -> None:
    """A decoder: quantiles of N(0, I), left, move to those of a density with two peaks."""
    x, y, s = COLUMNS[1], ROWS[row] - 0.02, np.linspace(0, 1, 50)
    quantiles = []
    for side, p in ((-1, bell()), (1, PEAKS)):
        quantiles.append(np.interp(np.arange(1, 26, 2) / 26, np.cumsum(p) / np.sum(p), GRID))
        edge = x + side * (0.4 + 0.24 * p / p.max())
        axes.fill_betweenx(y + 0.1 * GRID, x + side * 0.4, edge, color=colour, alpha=0.3, lw=0)
    for start, end in zip(*quantiles, strict=True):
        curve = start + (end - start) * s**2 * (3 - 2 * s)
        axes.plot(x - 0.38 + 0.76 * s, y + 0.1 * curve, color=colour, linewidth=0.8)


def hopper(axes: Axes) -> None:
    """A one-legged robot."""
    joints = [(0.13, 0.05), (-0.06, 0.05), (0.04, 0.2), (-0.07, 0.35), (-0.02, 0.5)]
    x, y = np.transpose(joints) + [[COLUMNS[2]], [ROWS[0] - 0.26]]
    axes.plot(COLUMNS[2] + np.array([-0.5, 0.5]), [ROWS[0] - 0.26] * 2, color=FIXED, linewidth=0.8)
    for i, thick in enumerate((4, 4, 5, 7)):
        axes.plot(x[i : i + 2], y[i : i + 2], color=FIXED, lw=thick, solid_capstyle="round")
    axes.plot(x[1:-1], y[1:-1], "o", color="white", markersize=1.8)


def panel(axes: Axes, row: int, name: str, over: str, loss: str, source: str, x: float) -> None:
    """A phase: its boxes, `over` the second arrow, the loss around x, what it takes (`source`)."""
    y, edge, right = ROWS[row], ROWS[row] + HIGH / 2, COLUMNS[2]
    rounded(axes, style.WIDTH / 2, y, style.WIDTH - 0.1, 2.08, facecolor="#F4F4F4", linewidth=0)
    heading(axes, y + 0.9, name)
    for column, middle in enumerate(COLUMNS):
        title, below, colour = BOXES[row, column]
        ink = INK if colour == FIXED else colour
        rounded(axes, middle, y, WIDE, HIGH, facecolor="white", edgecolor=colour, linewidth=1.3)
        write(axes, middle, y + 0.36, title, ink, fontsize=8)
        write(axes, middle, y - 0.39, below, ink, fontsize=7)
    for column, text in enumerate((r"$\varepsilon$", over)):
        start, end = COLUMNS[column] + WIDE / 2, COLUMNS[column + 1] - WIDE / 2
        arrow(axes, (start, y), (end, y))
        write(axes, (start + end) / 2, y + 0.05, text, va="bottom")
    for middle in COLUMNS[row:2]:  # fresh noise does not ask for the state
        arrow(axes, (right, edge), (right, edge + 0.16), (middle, edge + 0.16), (middle, edge))
    write(axes, sum(COLUMNS[1:]) / 2, edge + 0.2, "state $s$", va="bottom")
    low, edge, trained, colour = y - 0.79, y - HIGH / 2, COLUMNS[row], BOXES[row, row][2]
    rounded(axes, x, low, 1.2, 0.34, facecolor="white", edgecolor=colour, linewidth=1.1)
    write(axes, x, low - 0.01, loss, colour, linespacing=1.15)
    arrow(axes, (right, edge), (right, low), (x + 0.6, low))
    arrow(axes, (x - 0.6, low), (trained, low), (trained, edge), colour=colour)
    write(axes, (x + 0.6 + right) / 2, low + 0.04, source, va="bottom", fontsize=7)
    write(axes, (x - 0.6 + trained) / 2, low + 0.04, "gradient", colour, va="bottom", fontsize=7)


def schedule(axes: Axes) -> None:
    """The stages as a bar, as long as their steps, and the refinements between them."""
    heading(axes, 0.6, "Four stages of (a), with (b) in between")
    left, y = 0.05, 0.3
    for stage, (note, steps) in enumerate(STAGES.items()):
        wide = (style.WIDTH - 0.1) * steps / sum(STAGES.values())
        middle = left + wide / 2
        rounded(axes, middle, y, wide - 0.03, 0.26, facecolor=ENCODER, alpha=0.16, linewidth=0)
        write(axes, middle, y, f"stage {stage}: {steps}M" + " steps" * (steps > 30))
        write(axes, middle, y - 0.22, note, fontsize=7)
        if stage:
            axes.plot(left, y, "o", color=DECODER, markersize=14)
            write(axes, left, y - 0.01, "b", "white")
        left += wide


def draw(options: runs.Options) -> list[Path]:
    """Draws the two phases and the stages; no logs are read."""
    figure = plt.figure(figsize=(style.WIDTH, HEIGHT))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, style.WIDTH), ylim=(0, HEIGHT))
    axes.set_axis_off()
    name, loss = "(a) Phase 1: PPO on the latent policy", "PPO, with a KL\nto $N(0, I)$"
    panel(axes, 0, name, "action\n$\\tanh(u)$", loss, "reward", COLUMNS[1])
    name, loss = "(b) Phase 2: decoder refinement", "flow matching or\ndiffusion regression"
    panel(axes, 1, name, "learns to\nmatch", loss, "target", sum(COLUMNS[1:]) / 2)
    low, high = ROWS[1] + 1.06, ROWS[0] - 1.06
    for column, text in enumerate(("the encoder restarts as $N(0, I)$", "the new decoder")):
        x = COLUMNS[column]
        arrow(axes, (x, low), (x, high))
        write(axes, x + 0.07, (low + high) / 2, text, ha="left")
    arrow(axes, (COLUMNS[2], high), (COLUMNS[2], low))
    write(axes, COLUMNS[2] - 0.07, (low + high) / 2, "recent rollouts", ha="right")
    for row, column, p, top, look in (
        (0, 0, bell(0.7, 0.6), 0.46, {"color": ENCODER}),
        (0, 0, bell(), 0.28, {"color": FIXED, "linestyle": "--", "linewidth": 1}),
        (1, 0, bell(), 0.46, {"color": FIXED}),
        (1, 2, bell(0, 1.3), 0.22, {"color": FIXED, "linestyle": "--", "linewidth": 1}),
        (1, 2, PEAKS, 0.46, {"color": DECODER}),
    ):
        density(axes, row, column, p, top, **look)
    write(axes, COLUMNS[0] - 0.42, ROWS[0] + 0.02, "$N(0, I)$", FIXED, fontsize=6.5)
    write(axes, COLUMNS[2], ROWS[1] + 0.02, "all", FIXED, fontsize=6.5)
    transport(axes, 0, FIXED)
    transport(axes, 1, DECODER)
    hopper(axes)
    schedule(axes)
    files = style.save(figure, options.out, "figure_2")
    with Image.open(files[0]) as picture:
        small = picture.convert("RGB").quantize(128)
    small.save(files[0], optimize=True, dpi=(300, 300))  # a third of the bytes
    return files


if __name__ == "__main__":
    sys.exit(runs.command(draw))
