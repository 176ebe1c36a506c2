"""Compiled tasks on disk: a loaded task is the built one, and no state of the cache does more than cost time."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from simulator import compact, compiled
from simulator.task import TaskSim

import mujoco  # isort: skip  after the simulator

pytestmark = [pytest.mark.libero, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SUITE, TASK = "libero_10", 9  # a microwave: fixtures, a hinge, glass


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of its own, empty at first, for this module."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory))
        yield directory / "vla_rl/tasks"


def played(render="light"):
    """(qpos and qvel after each of 100 random actions, every tenth picture) of a new TaskSim."""
    task = TaskSim(SUITE, TASK, render=render)
    episode = task.episode()
    episode.reset(0)
    states, pictures = [], []
    for number, action in enumerate(np.random.default_rng(0).uniform(-1, 1, (100, 7))):
        episode.step(action)
        states.append(np.concatenate([episode.data.qpos, episode.data.qvel]))
        if number % 10 == 0 and render != "none":
            pictures.append(episode.render())
    task.close()
    return np.array(states), np.array(pictures)


@pytest.fixture(scope="module")
def built(cache):
    """`played` of a task that was compiled, as it is the first in this cache."""
    assert not cache.exists()
    return played()


@pytest.fixture
def compiles(monkeypatch):
    """A list that grows with each model that MuJoCo compiles."""
    calls, original = [], mujoco.MjModel.from_xml_string

    def counted(xml):
        calls.append(1)
        return original(xml)

    monkeypatch.setattr(compiled.mujoco.MjModel, "from_xml_string", counted)
    return calls


def test_a_loaded_task_equals_a_built_one(cache, built, compiles):
    states, pictures = played()
    assert compiles == []
    np.testing.assert_array_equal(states, built[0])
    np.testing.assert_array_equal(pictures, built[1])
    assert sum(file.stat().st_size for file in cache.iterdir()) < 12e6  # measured: 7 to 10 MB for each task
    states, _ = played("none")  # needs less of the same files
    np.testing.assert_array_equal(states, built[0])
    assert compiles == []


def test_a_damaged_file_is_built_again(cache, built, compiles):
    files = {file: file.read_bytes() for file in cache.iterdir()}
    assert len(files) == 2
    rng = np.random.default_rng(0)
    for file, good in files.items():
        damages = [
            b"",
            good[:-1],
            good[:40],
            *(_flipped(good, bit) for bit in rng.integers(0, 8 * len(good), 20)),
        ]
        for bad in damages:
            file.write_bytes(bad)
            assert compiled._read(file) is None
    states, pictures = played()
    assert compiles == [1]
    np.testing.assert_array_equal(states, built[0])
    np.testing.assert_array_equal(pictures, built[1])
    assert {file: file.read_bytes() for file in files} == files


def _flipped(data, bit):
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def test_where_nothing_can_be_written_a_task_is_compiled(built, compiles, monkeypatch):
    monkeypatch.setattr(compiled, "cache_dir", lambda: Path("/proc/none"))
    states, _ = played("none")
    assert compiles == [1]
    np.testing.assert_array_equal(states, built[0])


def test_processes_that_start_together_compile_once(tmp_path):
    code = """
import json, sys
from simulator import compiled
original, calls = compiled.mujoco.MjModel.from_xml_string, []
def counted(xml):
    calls.append(1)
    return original(xml)
compiled.mujoco.MjModel.from_xml_string = counted
from simulator.task import TaskSim
print("ready", flush=True)
sys.stdin.readline()
task = TaskSim("libero_object", 4, render="none")
print(json.dumps(len(calls)))
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    compile_counts = [process.communicate("go\n", timeout=300)[0] for process in processes]
    assert sorted(map(json.loads, compile_counts)) == [0, 0, 1]


def test_a_lock_that_is_never_given_back_costs_patience_only(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "PATIENCE", 0.2)
    held = compiled._lock(tmp_path / "lock")
    began = time.monotonic()
    assert held is not None and compiled._lock(tmp_path / "lock") is None
    assert 0.1 < time.monotonic() - began < 5.0
    os.close(held)
    assert compiled._lock(tmp_path / "lock") is not None
    assert compiled._lock(Path("/proc/none/lock")) is None


def test_the_name_of_a_compiled_task_follows_all_that_it_depends_on(tmp_path, monkeypatch):
    asset = tmp_path / "mesh.obj"
    asset.write_text("v 0 0 0")
    xml = f'<mujoco><asset><mesh file="{asset}"/></asset></mujoco>'
    names = [
        compiled._digest(xml, "bddl"),
        compiled._digest(xml + " ", "bddl"),
        compiled._digest(xml, "another"),
    ]
    asset.write_text("v 0 0 1.0")
    names.append(compiled._digest(xml, "bddl"))
    os.utime(asset, ns=(0, 0))
    names.append(compiled._digest(xml, "bddl"))
    monkeypatch.setattr(compiled, "_code", lambda: b"another version of MuJoCo, or of our own code")
    names.append(compiled._digest(xml, "bddl"))
    assert len(set(names)) == len(names)


def test_files_that_nobody_reads_are_deleted(tmp_path):
    old, new = tmp_path / "old-physics", tmp_path / "new-physics"
    for file in (old, new):
        compiled._write(file, b"model")
    os.utime(old, (0, 0))
    assert compiled._read(new) == b"model"
    compiled._write(tmp_path / "third-physics", b"model")
    assert not old.exists() and new.exists()


# ---- compact models ------------------------------------------------------------------------------------------------


XML = """
<mujoco>
  <asset>
    <texture name="checks" type="2d" builtin="checker" width="64" height="64" rgb1="1 0 0" rgb2="0 1 0"/>
    <material name="checks" texture="checks"/>
    <mesh name="seen" vertex="0 0 0 1 0 0 0 1 0 0 0 1 1 1 1"/>
    <mesh name="hit" vertex="0 0 0 .1 0 0 0 .1 0 0 0 .1"/>
    <mesh name="seen_too" vertex="0 0 0 2 0 0 0 1 0 0 0 1"/>
  </asset>
  <worldbody>
    <camera name="agentview" pos="0 -2 1" xyaxes="1 0 0 0 0 1"/>
    <geom type="plane" size="1 1 .1" material="checks"/>
    <geom type="mesh" mesh="seen" contype="0" conaffinity="0" material="checks"/>
    <body pos="0 0 1"><freejoint/><geom type="mesh" mesh="hit"/><geom type="mesh" mesh="seen_too" contype="0" conaffinity="0" mass="0"/></body>
  </worldbody>
</mujoco>
"""


def test_physics_model_keeps_what_can_be_hit():
    whole = mujoco.MjModel.from_xml_string(XML)
    small = compact.physics_model(whole)
    assert small.mesh_vertnum.tolist() == [0, 4, 0] and small.ntexdata == 0
    np.testing.assert_array_equal(small.mesh_vert, whole.mesh_vert[whole.mesh_vertadr[1] :][:4])
    data, expected = mujoco.MjData(small), mujoco.MjData(whole)
    data.qvel[3:] = expected.qvel[3:] = 1.0, 2.0, 3.0
    for _ in range(1000):  # falls, tumbles, comes to rest
        mujoco.mj_step(small, data)
        mujoco.mj_step(whole, expected)
        np.testing.assert_array_equal(data.qpos, expected.qpos)
    assert expected.ncon > 0


def test_a_model_that_is_rebuilt_without_changes_is_the_same():
    whole = mujoco.MjModel.from_xml_string(XML)
    np.testing.assert_array_equal(compact.model_bytes(compact.rebuilt(whole, {})), compact.model_bytes(whole))
