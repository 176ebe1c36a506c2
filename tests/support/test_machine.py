"""Cores, caches and environment variables, on machines that are described by files."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import machine

ROOT = Path(__file__).resolve().parents[2]


def a_machine(root, cgroup, **files):
    for path, content in {"proc/self/cgroup": cgroup, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    return root


V2 = "sys/fs/cgroup/{}cpu.max"
V1 = "sys/fs/cgroup/cpu/{}cpu.cfs_{}_us"


@pytest.mark.parametrize(
    "cgroup, files, cores",
    [
        ("0::/\n", {V2.format(""): "max 100000\n"}, 64),
        ("0::/\n", {V2.format(""): "200000 100000\n"}, 2),  # docker --cpus 2
        ("0::/\n", {V2.format(""): "150000 100000\n"}, 2),
        ("0::/\n", {V2.format(""): "20000 100000\n"}, 1),
        ("0::/pod/app\n", {V2.format("pod/app/"): "max 100000\n", V2.format("pod/"): "300000 100000\n"}, 3),
        ("0::/of/the/host\n", {V2.format(""): "400000 100000\n"}, 4),  # the group itself is mounted
        ("4:cpu,cpuacct:/docker/1\n0::/\n", {V1.format("", "quota"): "500000\n", V1.format("", "period"): "100000\n"}, 5),
        ("4:cpu:/a\n", {V1.format("a/", "quota"): "100000\n", V1.format("a/", "period"): "50000\n"}, 2),
        ("4:cpu:/a\n", {V1.format("a/", "quota"): "-1\n", V1.format("a/", "period"): "100000\n"}, 64),
        ("4:cpuset:/a\n1:name=systemd:/b:c\n", {}, 64),
    ],
)  # fmt: skip
def test_cores_are_counted_by_affinity_and_quota(tmp_path, monkeypatch, cgroup, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert machine.cores(a_machine(tmp_path, cgroup, **files)) == cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3})
    assert machine.cores(a_machine(tmp_path, cgroup, **files)) == min(2, cores)


def test_cores_without_control_groups(tmp_path):
    assert machine.cores(tmp_path) == len(os.sched_getaffinity(0))
    assert 1 <= machine.cores() <= len(os.sched_getaffinity(0)) and math.isinf(machine._quota(tmp_path))


def test_cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert machine.cache_dir() == tmp_path / "xdg/vla_rl"
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # set, but empty: as if it were not
    assert machine.cache_dir() == tmp_path / "home/.cache/vla_rl"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    fallback = tmp_path / f"vla_rl-{os.getuid()}"
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")  # cannot be written
    assert machine.cache_dir() == fallback
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification: such a path is invalid
    assert machine.cache_dir() == fallback


def variables(**environment):
    """What a process with these variables set (None: unset) has once `support` is imported."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "MUJOCO_GL", "XDG_CACHE_HOME")
    whole = {name: value for name, value in os.environ.items() if name not in names}
    whole |= {name: value for name, value in environment.items() if value is not None}
    code = f"import support, os; print([os.environ.get(n) for n in {names}])"
    return eval(subprocess.check_output([sys.executable, "-c", code], env=whole, cwd=ROOT, text=True))


def test_library_variables_are_set_unless_the_user_did():
    assert variables() == ["10000", None, "egl", None]
    assert variables(GOMP_SPINCOUNT="7", MUJOCO_GL="osmesa") == ["7", None, "osmesa", None]
    assert variables(OMP_WAIT_POLICY="passive") == [None, "passive", "egl", None]
    assert variables(GOMP_SPINCOUNT="", MUJOCO_GL="", XDG_CACHE_HOME="") == ["10000", None, "egl", None]


def test_support_comes_before_torch_in_every_script():
    """Of each script at the top: the first import of ours stands before torch's, so that the variables are set in time."""
    scripts = []
    for script in [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]:
        lines = script.read_text().splitlines()
        first = {name: [i for i, line in enumerate(lines) if line.startswith((f"import {name}", f"from {name}"))]
                 for name in ("torch", "support")}  # fmt: skip
        if any(line.startswith("    main(") for line in lines) and first["torch"]:
            scripts.append(script.name)
            assert first["support"] and first["support"][0] < first["torch"][0], script.name
    assert {"train.py", "eval.py", "sft.py", "rprm.py"} <= set(scripts)  # demos.py needs no torch at the top
