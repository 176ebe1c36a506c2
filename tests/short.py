"""The same command with test episodes of 12 control steps and one worker, where a test is about other things than success:

python tests/short.py SCRIPT FLAGS        python tests/short.py -m MODULE FLAGS
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import support  # noqa: F401  before torch and MuJoCo are: it sets the environment variables that they read once

if {"eval.py", "train.py", "bench"} & set(sys.argv[1:3]):  # the others need none of it
    from support import machine

    machine.cores = lambda: 1  # before it is imported by its name

    from simulator import suites

    suites.MAX_STEPS |= dict.fromkeys(suites.MAX_STEPS, 12)

del sys.argv[0]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
