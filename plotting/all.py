"""Every figure and the table, as far as the logs allow.

python -m plotting.all --runs runs --out figures
"""

import sys
from importlib import import_module
from pathlib import Path

from plotting import render, runs

ITEMS = ("figure_4", "table_1", "aggregate", "figure_5", "figure_6", "figure_7", "figure_2")
ITEMS += ("figure_3", "figure_1")


def draw(options: runs.Options, skip: tuple[str, ...] = ()) -> list[Path]:
    """Draws what the logs allow and names what it cannot draw, and why.

    Args:
        skip: Items to leave out: figure_1 trains small policies for minutes, figure_7 asks every
            saved one.
    """
    if unknown := set(skip) - set(ITEMS):
        runs.wrong("--skip", " ".join(sorted(unknown)), " ".join(ITEMS))
    try:
        render.pick_backend()  # before anything imports mujoco
        blind = None
    except runs.CannotDraw as error:
        blind = error
    written, undrawn = [], {}
    for item in ITEMS:
        if item in skip:
            continue
        print(f"\n--- {item}")
        try:
            if item == "figure_3" and blind:
                raise blind
            written += import_module(f"plotting.{item}").draw(options)
        except Exception as error:  # whatever it is, the other items come
            kind = "" if isinstance(error, runs.CannotDraw) else f"{type(error).__name__}: "
            undrawn[item] = f"{kind}{error}"
            print(f"cannot draw: {undrawn[item]}")
    print(f"\ndrawn: {', '.join(dict.fromkeys(file.stem for file in written)) or 'nothing'}")
    for item, error in undrawn.items():
        print(f"not drawn: {item}: {error}")
    return written


if __name__ == "__main__":
    sys.exit(runs.command(draw))
