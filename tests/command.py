"""Scripts as a user runs them, by command line, and the files that they write."""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TABLES = ("eval", "train", "decoder", "refine")


class Process(subprocess.Popen):
    """A command that runs beside the test, until `finish`."""

    def __init__(self, *command, **environment):
        # Into files: a pipe that nobody reads would stop it once it is full.
        self.files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        inherited = dict(os.environ)
        inherited.pop("TF_CPP_MIN_LOG_LEVEL", None)  # scripts set it themselves
        super().__init__(
            [str(word) for word in command],
            stdout=self.files[0],
            stderr=self.files[1],
            env=inherited | environment,
        )

    def finish(self, timeout=1800):
        """Waits, by default longer than any test takes: status, standard output and errors."""
        try:
            self.wait(timeout)
        finally:
            self.kill()
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read())
            file.close()
        print(texts[0][-2000:], texts[1][:4000])  # pytest shows it if the test fails
        return subprocess.CompletedProcess(self.args, self.returncode, *texts)


def real(script, *arguments):
    return [sys.executable, script.__file__, *arguments]


def toy(script, *arguments):
    """The same on a point mass, which compiles fast."""
    return [sys.executable, HERE / "toy.py", script.__name__, *arguments]


def few_steps(script):
    """Arguments for a sampler that compiles fast."""
    names = {"fpo": "--flow-steps", "dppo": "--denoising-steps"}
    if script.__name__ == "ppo_gaussian":
        return []
    return [names.get(script.__name__, "--decoder-steps"), "2"]


def run(command, **environment):
    return Process(*command, **environment).finish()


def size(path):
    """Of a file, which a run may remove or rename just now."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def table(run_dir, name):
    """A CSV file's rows without the columns that depend on the clock; none if there is no file."""
    path = run_dir / f"{name}.csv"
    if not path.exists():
        return []
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [{k: x for k, x in row.items() if "time" not in k and "sps" not in k} for row in rows]


def states(run_dir):
    return sorted(run_dir.glob("checkpoints/state_*.npz"))


def policies(run_dir):
    return sorted(path.name for path in run_dir.glob("checkpoints/policy_*.npz"))


def arrays(run_dir, name):
    with np.load(run_dir / "checkpoints" / name) as file:
        return dict(file)


def same_run(run_dir, reference):
    """All tables but for the clock, and all policies, bit for bit."""
    for name in TABLES:
        assert table(run_dir, name) == table(reference, name)
    assert policies(run_dir) == policies(reference)
    assert policies(reference)
    for name in policies(reference):
        found = arrays(run_dir, name)
        want = arrays(reference, name)
        assert list(found) == list(want)
        for key in want:
            np.testing.assert_array_equal(found[key], want[key])


def one_line(error, *words):
    """An error message of one line, with all of the words and without a traceback."""
    lines = [line for line in error.splitlines() if ".py: " in line]
    assert len(lines) == 1 and "Traceback" not in error, error
    for word in words:
        assert str(word) in lines[0]
