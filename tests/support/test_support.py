"""Flags, errors, files, seeds: what every script leans on."""

import errno
import math
import os
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import cli, errors, files, machine, statistics


def flag(value, help_text, **metadata):
    return field(default=value, metadata={"help": help_text, **metadata})


@dataclass
class Args:
    suite: str = flag("libero_object", "task suite", choices=("libero_object", "libero_spatial"))
    num_envs: int = flag(8, "environments", min=1, max=1024)
    lr: float = flag(2e-5, "learning rate", min=0)
    critic_lr: float | None = flag(None, "critic's learning rate", min=0, default="10 x --lr")
    from_scratch: bool = flag(False, "make the start policy, at 100 % of the cost")
    progress: bool = flag(True, "draw bars")
    task_ids: list[int] | None = flag(None, "tasks", min=0, default="all")
    out: Path = flag(Path("runs"), "where results go")
    mode: Literal["sum", "none"] = flag("sum", "reward")
    widths: list[int] = field(default_factory=lambda: [4, 2], metadata={"help": "layer widths"})


def parse(*argv):
    return cli.parse_args(Args, "Train.", list(argv))


def test_defaults_are_those_of_the_dataclass():
    assert parse() == Args()


def test_every_kind_of_flag():
    args = parse(
        "--suite", "libero_spatial", "--num-envs", "3", "--lr", "1e-4", "--critic-lr=0.5", "--from-scratch",
        "--no-progress", "--task-ids", "0,1, 7", "--out", "a b/c", "--mode", "none", "--widths", "1",
    )  # fmt: skip
    assert args == Args("libero_spatial", 3, 1e-4, 0.5, True, False, [0, 1, 7], Path("a b/c"), "none", [1])


def test_help_shows_every_flag_with_its_help_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for part in (
        "Train.", "--num-envs N", "environments (default: 8)", "--critic-lr", "(default: 10 x --lr)", "--no-progress",
        "draw bars (default: on)", "at 100 % of the cost (default: off)", "tasks (default: all)", "(default: 2e-05)",
        "{libero_object,libero_spatial}", "layer widths (default: 4,2)", "(default: runs)",
    ):  # fmt: skip
        assert part in text


@pytest.mark.parametrize("argv, what", [
    (["--num-envs", "0"], "the least is 1"),
    (["--num-envs", "2000"], "the most is 1024"),
    (["--num-envs", "2.5"], "'2.5' is not a whole number"),
    (["--lr", "nan"], "'nan' is not a finite number"),
    (["--lr", "fast"], "'fast' is not a number"),
    (["--lr", "-1"], "the least is 0"),
    (["--suite", "libero"], "libero_spatial"),
    (["--mode", "product"], "--mode"),
    (["--task-ids", "0,,1"], "comma-separated list such as 0,1"),
    (["--task-ids", "0,x"], "'x' is not a whole number"),
    (["--task-ids", "-1"], "the least is 0"),
    (["--nums-envs", "3"], "--nums-envs"),
    (["--num"], "--num"),  # no guessing of abbreviations
    (["stray\nline"], "stray line"),
])  # fmt: skip
def test_wrong_flags_end_in_one_line(argv, what, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and what in err


def test_a_list_of_names_is_asked_for_as_one(capsys):
    @dataclass
    class Names:
        runs: list[str] | None = flag(None, "runs")

    for argv in (["--help"], ["--runs", "a,,b"]):
        with pytest.raises(SystemExit):
            cli.parse_args(Names, "", argv)
    out, err = capsys.readouterr()
    assert "--runs A,B," in out and "is not a comma-separated list such as a,b" in err


FLAGS = "--suite --num-envs --lr --critic-lr --from-scratch --task-ids --out --mode --widths -- -".split()
WORDS = st.one_of(st.sampled_from(FLAGS), st.text(max_size=8), st.floats().map(str), st.integers().map(str))


@settings(max_examples=1500, deadline=None)
@given(st.lists(WORDS, max_size=6))
def test_no_command_line_ends_in_a_traceback(argv):
    try:
        args = parse(*argv)
    except SystemExit as stop:
        assert stop.code in (0, 2)
    else:
        assert 1 <= args.num_envs <= 1024 and 0 <= args.lr < float("inf")


def test_a_field_without_default_is_required(capsys):
    @dataclass
    class Needs:
        checkpoint: Path = field(metadata={"help": "weights"})

    assert cli.parse_args(Needs, "", ["--checkpoint", "x"]).checkpoint == Path("x")
    with pytest.raises(SystemExit):
        cli.parse_args(Needs, "", [])
    assert "--checkpoint" in capsys.readouterr().err


def test_a_combination_that_the_dataclass_refuses_is_a_user_error():
    @dataclass
    class Picky:
        a: int = flag(1, "a")

        def __post_init__(self):
            if self.a == 3:
                raise ValueError("a must not be 3")

    with pytest.raises(errors.UserError, match="a must not be 3"):
        cli.parse_args(Picky, "", ["--a", "3"])


def test_sub_commands(capsys):
    @dataclass
    class Envs:
        workers: int = flag(2, "workers")

    commands = {"train": (Args, "Train at 100 %."), "envs": (Envs, "Time the environments.")}
    assert cli.parse_command(commands, "Bench.", ["envs", "--workers", "3"]) == ("envs", Envs(3))
    for wrong in ([], ["nothing"], ["envs", "--lr", "1"]):
        with pytest.raises(SystemExit) as stop:
            cli.parse_command(commands, "Bench.", wrong)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1


# Errors ---------------------------------------------------------------------------------------------------------------


def guarded(exc, capsys):
    @errors.main_guard
    def main():
        raise exc

    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return stop.value.code, err


def test_main_guard(capsys):
    assert guarded(errors.UserError("no such suite:\n  libero"), capsys) == (
        1,
        "error: no such suite: libero\n",
    )
    assert guarded(KeyboardInterrupt(), capsys)[0] == 130
    full = OSError(errno.ENOSPC, "No space left on device", "/x")
    assert guarded(full, capsys) == (1, "error: No space left on device: /x\n")
    assert errors.main_guard(lambda x: x + 1)(1) == 2

    @errors.main_guard
    def bug():
        return {}["key"]

    with pytest.raises(KeyError):  # a bug keeps its traceback
        bug()


def run_python(code, **options):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        cwd=Path(errors.__file__).parent.parent, **options,
    )  # fmt: skip


def test_user_error_before_main_is_one_line_too():
    result = run_python("from support import errors; raise errors.UserError('broken')")
    assert (result.returncode, result.stderr) == (1, "error: broken\n")


def test_a_closed_pipe_is_not_an_error():
    code = "from support import errors\n@errors.main_guard\ndef main():\n for i in range(10**6): print(i)\nmain()"
    result = subprocess.run(
        f'set -o pipefail; "{sys.executable}" -c "{code}" | head -1', shell=True, executable="/bin/bash",
        capture_output=True, text=True, timeout=60, cwd=Path(errors.__file__).parent.parent,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (141, "0\n", "")


# Files ----------------------------------------------------------------------------------------------------------------


def test_atomic_write(tmp_path):
    path = tmp_path / "new" / "file.json"
    files.atomic_write(path, "grün")
    assert path.read_text(encoding="utf-8") == "grün"
    files.atomic_write(str(path), b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01" and os.listdir(path.parent) == ["file.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, call):
    path = tmp_path / "checkpoint"
    files.atomic_write(path, "old")

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(errors.UserError, match=r"cannot write .*checkpoint: No space left on device"):
        files.atomic_write(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["checkpoint"]


def test_a_kill_during_the_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint"
    path.write_text("old")
    code = f"import os; from support import files; os.fsync = lambda fd: os.kill(os.getpid(), 9); files.atomic_write({str(path)!r}, 'new')"
    assert run_python(code).returncode == -9
    assert path.read_text() == "old"


def test_unwritable_places_are_user_errors(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "below", tmp_path, Path("/proc/nothing/here")):
        with pytest.raises(errors.UserError, match="cannot write"):
            files.atomic_write(path, "x")
    assert os.listdir(tmp_path) == ["file"]


def test_safe_name_examples():
    assert files.safe_name("pick up the alphabet soup and place it in the basket") == (
        "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
    )
    assert files.safe_name("../../etc/passwd") == "etc_passwd"
    assert files.safe_name("") == files.safe_name("..") == "unnamed"
    assert files.safe_name("a" * 300) != files.safe_name("a" * 301)


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(), max_size=300))
def test_safe_name_is_always_one_plain_file_name(text):
    name = files.safe_name(text)
    assert 0 < len(name) <= 100 and name == os.path.basename(name) and name[0] not in ".-" and name.isascii()
    assert not set(name) & set("/\\\0 \n")


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("successes, n, low, high", [  # R: binom::binom.wilson, or by hand from the formula
    (5, 10, 0.2366, 0.7634),
    (0, 10, 0.0, 0.2775),
    (10, 10, 0.7225, 1.0),
    (451, 500, 0.8728, 0.9251),
    (1, 1, 0.2065, 1.0),
])  # fmt: skip
def test_wilson_interval(successes, n, low, high):
    assert statistics.wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_rate_and_solves_its_equation(case):
    successes, n = case
    low, high = statistics.wilson_interval(successes, n)
    rate = successes / n
    assert 0 <= low <= rate <= high <= 1
    for p in (low, high):  # its ends are where the score test just rejects: (rate - p)^2 = z^2 p (1 - p) / n
        assert (rate - p) ** 2 == pytest.approx(1.959963985**2 * p * (1 - p) / n, abs=1e-9)


def test_t_interval_over_seeds_that_are_alike_is_none_at_all():
    for values in ([], [90.0], [93.4, 93.4], [0.1 + 0.2, 0.3], [0.0, 0.0, 0.0]):
        assert all(map(math.isnan, statistics.t_interval(values)))
    assert statistics.t_interval([90.0, 90.2]) == pytest.approx((90.1 - 12.7062 * 0.1, 90.1 + 12.7062 * 0.1))
    assert statistics.t_interval([90.0, 94.0], 0, 100) == pytest.approx((92 - 12.7062 * 2, 100))
    assert statistics.t_interval([-90.0, -94.0], -100, 100) == pytest.approx((-100, -92 + 12.7062 * 2))


def test_wilson_interval_without_episodes_and_with_nonsense():
    assert statistics.wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError):
        statistics.wilson_interval(3, 2)


def test_seed_everything():
    import random

    import numpy as np
    import torch

    def draw(seed):
        machine.seed_everything(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(5) == draw(5) and not set(draw(5)) & set(draw(6))


# System libraries and noise -------------------------------------------------------------------------------------------


def test_missing_libraries_name_the_debian_packages(monkeypatch):
    monkeypatch.setattr(machine, "SYSTEM_LIBRARIES", ("libc.so.6", "libNothing.so.1"))
    with pytest.raises(errors.UserError, match=r"no libNothing.so.1 here; .*apt-get install libegl1 libgl1 "):
        machine.require_system_libraries()


def test_help_needs_no_heavy_import():
    result = run_python(
        "import sys; from support import cli, errors, files, machine, quiet; assert not {'torch', 'numpy', 'mujoco'} & set(sys.modules)"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.libero
def test_the_simulator_starts_and_ends_without_a_word(tmp_path):
    code = """
from support import cli, errors, files, machine, quiet, statistics
quiet.silence_third_party()
quiet.silence_third_party()
import mujoco, robosuite
from libero.libero import benchmark
benchmark.get_benchmark("libero_object")()
from robosuite.utils.binding_utils import MjRenderContextOffscreen, MjSim
sim = MjSim.from_xml_string("<mujoco><worldbody><geom size='.1'/></worldbody></mujoco>")
left_open = [MjRenderContextOffscreen(sim, device_id=-1), mujoco.GLContext(64, 64)]
"""
    result = run_python(code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.libero
def test_physics_warnings_are_said_once_and_leave_no_file(tmp_path):
    code = """
from support import cli, errors, files, machine, quiet, statistics
quiet.silence_third_party()
import os, mujoco
os.chdir(%r)
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><body><freejoint/><geom size='.1'/></body></worldbody></mujoco>")
data = mujoco.MjData(model)
for _ in range(3):
    data.qvel[:] = float("nan")
    mujoco.mj_step(model, data)
""" % str(tmp_path)
    result = run_python(code)
    assert result.returncode == 0 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("mujoco: Nan, Inf or huge value")
    assert os.listdir(tmp_path) == []


def test_a_fingerprint_sees_a_change_anywhere(tmp_path):
    """Tensors that learn may lie at the front of a file, behind megabytes that do not change."""
    from support.files import fingerprint

    data, seen = bytearray(3 * 2**20), set()
    for changed in (None, 0, len(data) // 2, len(data) - 1):
        altered = bytearray(data)
        if changed is not None:
            altered[changed] = 1
        (tmp_path / "model.safetensors").write_bytes(altered)
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 4
