"""Brax without its physics, whose import takes seconds: toys need its running statistics only."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
ELSEWHERE = [path for path in sys.path if Path(path).resolve() != HERE]
__path__ = list(PathFinder.find_spec("brax", ELSEWHERE).submodule_search_locations)
