"""Packs a finished run directory into `results/`: what figures need, and how it was made.

python -m plotting.pack runs/HopperStand__gorl_fm_ppo__1__1795398135 --note "the headline"
"""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from plotting import policies, runs

COLUMNS = ("folder", "command", "commit", "device", "wall time", "what it shows")
LARGEST = 2**20  # bytes of a policy file that is worth keeping in a repository
PACKAGES = {"jax", "jaxlib", "flax", "optax", "numpy", "mujoco", "mujoco-mjx", "playground"}
VERSIONS = PACKAGES | {"python", "script", "git_commit", "device"}  # of all that args.json lists
# Nobody else's business.
PRIVATE = {"runs_dir": "runs", "resume": None, "track": False, "wandb_entity": None}


def command_of(args: dict[str, Any]) -> str:
    """The command line that gives a run of these arguments, an args.json, with today's script.

    Arguments that are gone since stand in it only if they were not at their defaults.
    """
    script = args["versions"]["script"]
    default = runs.usual_args(
        Path(script).stem, args.get("preset", "paper"), args["total_timesteps"]
    )
    words = ["python", script] + ["--preset", "cpu"] * (args.get("preset") == "cpu")
    stages, total = args.get("stage_timesteps"), args["total_timesteps"]
    usual_stages = stages in (None, runs.default_stages(total))
    follows = "stage_timesteps" if usual_stages else "total_timesteps"
    skip = {*PRIVATE, "preset", "versions", "distributed", follows}
    before = {name: value for name, value in runs.BEFORE.items() if name in default}
    for name, value in (before | args).items():
        usual = runs.items(default.get(name))
        if name in skip or name.startswith("checkpoint") or value is None:
            continue
        if runs.items(value) == usual:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def pack(
    run_dir: Annotated[Path, tyro.conf.Positional],
    to: Path = Path("results"),
    name: str = "",
    note: str = "",
    device: str = "",
    source: str = "",
) -> list[Path]:
    """Copies args.json, CSV files and policies under 1 MB to TO/NAME, and adds it to TO/README.md's
    table.

    Args:
        run_dir: A run directory; it has to be finished and whole.
        to: The folder of results.
        name: The folder in it; default: the run directory's name.
        note: What the run shows, for the table's last column.
        device: What it ran on, for people; default: what args.json says.
        source: Where others find the run that --decoder-from names; default: its directory's name.
    """
    try:
        args, _ = runs.read_run(run_dir)
    except ValueError as error:
        runs.wrong("RUN_DIR", f"{run_dir} ({error})", "a finished run")
    commit = args["versions"].get("git_commit")
    same = ["git", "diff", "--quiet", str(commit).removesuffix("-dirty"), "--"]
    same.append(args["versions"]["script"])
    if not commit or "dirty" in commit:
        print(f"warning: made at commit {commit}: nobody can run that again", file=sys.stderr)
    elif subprocess.run(same, cwd=runs.ROOT, capture_output=True).returncode:
        text = f"warning: the script is not that of {commit}; check its defaults there"
        print(text, file=sys.stderr)
    name = name or run_dir.resolve().name
    folder, readme = to / name, to / "README.md"
    if not to.is_dir():
        runs.wrong("--to", to, "a folder that is there")
    if folder.exists() or not folder.resolve().is_relative_to(to.resolve()):
        runs.wrong("--name", name, f"a folder in {to} that is not there yet")
    args |= {name: value for name, value in PRIVATE.items() if name in args}
    args["versions"] = {k: v for k, v in args["versions"].items() if k in VERSIONS}
    if args.get("decoder_from"):
        policy = Path(args["decoder_from"])  # RUN_DIR/checkpoints/policy_<step>.npz
        of = source or policy.parent.parent.name
        args["decoder_from"] = f"{of}/checkpoints/{policy.name}"
    rows = runs.read_table(run_dir / "eval.csv")
    about = {
        "folder": f"`{name}/`",
        "command": f"`{command_of(args)}`",
        "commit": str(commit),
        "device": device or str(args["versions"].get("device")),
        "wall time": f"{rows['wall_time'].max():.0f} s" if "wall_time" in rows else "unknown",
        "what it shows": note or "a run",
    }
    if bad := [key for key, value in about.items() if "|" in value or "\n" in value]:
        given = {"what it shows": "--note", "folder": "--name"}.get(bad[0], f"--{bad[0]}")
        runs.wrong(
            given, about[bad[0]], "text without | and line breaks, which a table cannot hold"
        )
    aside = to / f"unfinished_{run_dir.resolve().name}"
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "checkpoints").mkdir(parents=True)
    (aside / "args.json").write_text(json.dumps(args, indent=1))
    checkpoints = run_dir / "checkpoints"
    saved = [checkpoints / f"policy_{step}.npz" for step in policies.saved_steps(run_dir)]
    for file in [*sorted(run_dir.glob("*.csv")), *saved]:
        if file in saved and file.stat().st_size > LARGEST:
            print(f"left out: {file}, {file.stat().st_size / LARGEST:.1f} MB", file=sys.stderr)
        else:
            shutil.copy(file, aside / file.relative_to(run_dir))
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside.rename(folder)
    add_row(readme, about)
    return sorted(file for file in folder.rglob("*") if file.is_file())


def add_row(readme: Path, about: dict[str, str]) -> None:
    """Adds a row below the last one of the README's table of runs, which is made if need be."""
    row = "| " + " | ".join(about[column] for column in COLUMNS) + " |"
    head = "| " + " | ".join(COLUMNS) + " |"
    lines = readme.read_text().splitlines() if readme.exists() else ["# Logs of real runs"]
    if head not in lines:
        lines += ["", head, "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    at = lines.index(head)
    while at + 1 < len(lines) and lines[at + 1].startswith("|"):
        at += 1
    lines.insert(at + 1, row)
    (aside := readme.with_suffix(".tmp")).write_text("\n".join(lines) + "\n")
    aside.replace(readme)


if __name__ == "__main__":
    sys.exit(runs.command(pack))
