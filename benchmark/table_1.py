"""Every cell of the paper's Table 1: what is done, what is left, and running it, on one machine or
by Slurm.

    python benchmark/table_1.py --dry-run        # the plan
    python benchmark/table_1.py                  # all cells, one after the other
    sbatch benchmark/table_1.sbatch              # a task of a Slurm array for each cell

A cell is a method on a task, with all its seeds in one process, in RUNS_DIR/<task>/<script>/.
Finished cells are skipped, others go on from their newest checkpoint: start it again after whatever
has stopped it. SIGTERM and Ctrl-C are passed on: the first lets a run write a checkpoint, the
second ends it at once. Arguments behind `--` go to the scripts.
"""

import fcntl
import importlib
import shlex
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plotting import runs  # noqa: E402
from plotting.paper import METHODS, SEEDS, TASKS  # noqa: E402

# What is worth most comes first, should the time end.
FIRST = ("gorl_fm_ppo", "ppo_gaussian", "gorl_diff_ppo", "fpo", "dppo")
ORDER = ("HopperStand", "CheetahRun", "WalkerWalk", "FingerSpin", "FingerTurnHard", "FishSwim")
STOPS = (signal.SIGTERM, signal.SIGINT)
assert set(FIRST) == set(METHODS) and set(ORDER) == set(TASKS)


@dataclass(frozen=True)
class Args:
    """All cells of Table 1, or one of them."""

    cell: int | None = None  # only this one, counted from 0 as --dry-run shows it
    num_seeds: int = SEEDS  # seeds of a cell, together in one process
    tasks: tuple[str, ...] = ORDER  # the rows of the plan
    methods: tuple[str, ...] = FIRST  # scripts, without .py
    runs_dir: Path = Path("runs/table_1")  # where the runs go
    dry_run: bool = False  # print the plan and do nothing


def wrong(argument: str, got: object, takes: str) -> None:
    """Ends the program with one line on stderr and exit status 2."""
    print(f"table_1.py: {argument}: got {got}; takes {takes}", file=sys.stderr)
    raise SystemExit(2)


def newest(folder: Path) -> Path | None:
    """The newest run in a cell's folder that can go on; None if there is none."""
    found = [file.parent for file in folder.glob("*/args.json")]
    return max(found, key=lambda run: run.stat().st_mtime, default=None)


def finished(run: Path) -> bool:
    try:
        args, _ = runs.read_run(run)
    except ValueError:
        return False
    return (run / f"checkpoints/policy_{runs.last_step(args)}.npz").exists()


def checked(argv: list[str]) -> Any:
    """The arguments of a command line; ends the program, with the script's message, if wrong."""
    sys.argv = argv
    return importlib.import_module(Path(argv[0]).stem).parse_args()


def going_on(script: str, run: Path, wanted: Any) -> list[str]:
    """The command line by which a run goes on, if it has just the arguments that are wanted."""
    try:
        args = importlib.import_module(script).load_args(run)
    except Exception as error:  # a fork's script may do anything
        wrong("--runs-dir", f"{run} ({error})", f"runs of {script}.py as it is here")
    tracking = ("track", "wandb_project_name", "wandb_entity")
    for name, value in asdict(wanted).items():
        if value != getattr(args, name) and name not in ("runs_dir", "resume", *tracking):
            takes = f"that of {run}, which goes on: {getattr(args, name)}"
            wrong(f"--{name.replace('_', '-')}", value, takes)
    argv = [f"{script}.py", "--resume", str(run)]
    if wanted.track:
        argv += ["--track", "--wandb-project-name", wanted.wandb_project_name]
    if wanted.track and wanted.wandb_entity:
        argv += ["--wandb-entity", wanted.wandb_entity]
    return argv


def start(argv: list[str], lock: int, caught: list[int], running: list[subprocess.Popen]) -> int:
    """Runs a cell to its end: its status as a shell has it. The child holds the lock, too."""
    # A session of its own: or Ctrl-C would reach it twice, from the terminal and from here.
    script = [sys.executable, str(ROOT / argv[0]), *argv[1:]]
    running[:] = [subprocess.Popen(script, pass_fds=[lock], start_new_session=True)]
    for number in caught:  # since main() has looked
        running[0].send_signal(number)
    status = running[0].wait()
    return status if status >= 0 else 128 - status


def main() -> int:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, rest = tyro.cli(Args, args=sys.argv[1:at], description=__doc__), sys.argv[at + 1 :]
    for name, known in (("tasks", ORDER), ("methods", FIRST)):
        if unknown := [x for x in getattr(args, name) if x not in known]:
            wrong(f"--{name}", unknown[0], f"some of {' '.join(known)}")
    cells = [(task, script) for task in args.tasks for script in args.methods]
    if args.cell is not None and not 0 <= args.cell < len(cells):
        wrong("--cell", args.cell, f"a number from 0 to {len(cells) - 1}")
    states, plan = Counter(), []
    for i, (task, script) in enumerate(cells):
        if args.cell in (None, i):
            folder = args.runs_dir / task / script
            given = ["--env-id", task, "--num-seeds", str(args.num_seeds), *rest]
            argv = [f"{script}.py", *given, "--runs-dir", str(folder)]
            wanted = checked(argv)
            run = newest(folder)
            if run is not None:  # if finished, too: a run of other sizes is not the cell
                argv = going_on(script, run, wanted)
            state = "start" if run is None else "finished" if finished(run) else "go on"
            states[state] += 1
            print(f"{i:2}  {state:8}  {task:14}  python {shlex.join(argv)}", flush=True)
            plan += [(i, argv)] * (state != "finished")
    numbers = {"start": "{} to start", "go on": "{} to go on", "finished": "{} finished"}
    print(", ".join(numbers[state].format(n) for state, n in states.items()))
    caught, running, failed = [], [], []

    def stop(number: int, _: Any) -> None:
        caught.append(number)
        for child in running:
            child.send_signal(number)

    for number in STOPS:
        signal.signal(number, stop)
    for i, argv in plan if not args.dry_run else ():
        folder = args.runs_dir / cells[i][0] / cells[i][1]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                print(
                    f"cell {i} is being worked on by another process; left to it", file=sys.stderr
                )
                continue
            status = start(argv, lock.fileno(), caught, running)
        if (
            caught or status - 128 in STOPS
        ):  # a script that was still starting has a status of its own
            return 128 + caught[0] if caught else status
        if status:
            print(f"cell {i} failed with status {status}; the others go on", file=sys.stderr)
            failed.append(i)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
