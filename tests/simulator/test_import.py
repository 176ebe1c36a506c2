"""What importing the simulator says on machines that are set up in another way: the true cause, in one line, or nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.libero

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import logging, os
from simulator import render
if os.environ.get("DRAW"):
    render.check_egl()
import robosuite
files = [h for h in logging.getLogger("robosuite_logs").handlers if isinstance(h, logging.FileHandler)]
print("fine", os.environ.get("CUDA_VISIBLE_DEVICES"), len(files))
"""


def started(**variables):
    """(exit code, stdout, stderr) of a process that imports the simulator; a variable that is None is not set."""
    environment = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
    result = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    return result.returncode, result.stdout.strip(), result.stderr.strip()


@pytest.mark.parametrize(
    "variables",
    [
        {"CUDA_VISIBLE_DEVICES": "1", "MUJOCO_EGL_DEVICE_ID": "0", "DRAW": "1"},  # the second of several GPUs
        {"CUDA_VISIBLE_DEVICES": "GPU-1a2b", "MUJOCO_EGL_DEVICE_ID": None},
        {
            "CUDA_VISIBLE_DEVICES": None,
            "MUJOCO_EGL_DEVICE_ID": "",
            "MUJOCO_GL": "",
            "XDG_CACHE_HOME": "",
            "DRAW": "1",
        },
        {"CUDA_VISIBLE_DEVICES": None, "HOME": None},
    ],
)
def test_it_starts_and_leaves_what_others_read(variables):
    visible = variables["CUDA_VISIBLE_DEVICES"]
    assert started(**variables) == (0, f"fine {visible} 0", "")  # no log file, which could be another user's


def a_package(directory, name, content):
    (directory / name).mkdir()
    (directory / name / "__init__.py").write_text(content)
    return str(directory)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("libero", "", "No module named 'libero.libero'"),  # another package of that name
        (
            "numpy",
            "raise ImportError('numpy.core.multiarray failed to import')",
            "numpy.core.multiarray failed",
        ),
        ("robosuite", "raise RuntimeError('cannot cache function: no locator')", "cannot cache function"),
    ],
)
def test_what_is_not_egl_is_not_called_egl(tmp_path, name, content, words):
    code, out, err = started(PYTHONPATH=a_package(tmp_path, name, content))
    assert code == 1 and out == "" and err.count("\n") == 0
    assert err.startswith("error: cannot import robosuite and LIBERO") and words in err and "EGL" not in err


@pytest.mark.parametrize("module", ["experts", "experts.relabel", "envs", "models.tiny", "scripts.rprm"])
def test_whoever_imports_robosuite_first_does_it_without_a_word(module):
    code = f"import sys, {module}, simulator.task; assert simulator.MUJOCO_WAS_UNUSED"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("command", ["demos.py --check", "-m experts.relabel --data x --out y"])
def test_experts_without_a_simulator_are_one_line(tmp_path, command):
    path = a_package(tmp_path, "robosuite", "raise ImportError('no such file')")
    how = dict(cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    run = subprocess.run([sys.executable, *command.split()], **how)
    assert run.returncode == 1 and run.stderr.strip().count("\n") == 0, run.stderr
    assert run.stderr.startswith("error: cannot import robosuite and LIBERO")


@pytest.mark.parametrize("number", ["99", "-1", "first"])
def test_a_wrong_device_number_has_its_own_line(number):
    code, out, err = started(MUJOCO_EGL_DEVICE_ID=number, CUDA_VISIBLE_DEVICES="0", DRAW="1")
    assert code == 1 and out == "" and err.count("\n") == 0
    assert err.startswith(f"error: MUJOCO_EGL_DEVICE_ID={number}: ") and "apt-get" not in err


def test_numba_cache_moves_where_sources_cannot_be_written(tmp_path):
    code = """
from support import machine
machine.can_write = lambda directory: "__pycache__" not in directory
import os, simulator
print(os.environ["NUMBA_CACHE_DIR"])
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    out = subprocess.check_output(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, timeout=300
    )
    assert out.strip() == str(tmp_path / "vla_rl/numba")
