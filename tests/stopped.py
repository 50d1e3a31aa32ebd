"""toy.py's command, which sends itself SIGTERM after so many rows of a table.

python tests/stopped.py decoder 3 gorl_fm_ppo --seed 1
"""

import importlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "fake_playground"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import toy

name = sys.argv.pop(1)
number = int(sys.argv.pop(1))
script = importlib.import_module(sys.argv[1])
write = script.log


def log(args, run_dir, table, **columns):
    global number
    write(args, run_dir, table, **columns)
    if table == name:
        number -= 1
        if number == 0:
            os.kill(os.getpid(), signal.SIGTERM)


script.log = log
toy.main()
