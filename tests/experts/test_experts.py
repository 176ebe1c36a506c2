"""experts/: each skill on one real task, and what the experts promise: reactive, clean labels, goals from the BDDL."""

import subprocess
import sys
from pathlib import Path

import h5py
import imageio
import numpy as np
import pytest

import demos
from experts import Expert, covered_tasks, disturb, goal_of
from experts.scene import half_turn, rotation_vector, turn
from simulator.suites import max_steps
from simulator.task import TaskSim
from support import demonstrations

pytestmark = pytest.mark.libero


def play(suite, task_id, init_state):
    """Whether the undisturbed expert solves a test state, by `demos.py --check`'s own count."""
    task, commands = TaskSim(suite, task_id, render="none"), []
    episode = task.episode()
    step = episode.step
    episode.step = lambda command: commands.append(np.array(command)) or step(command)
    won, steps = demos.check_expert(episode, init_state, 4, max_steps(suite))
    assert np.abs(commands).max() <= 1.0 and (won or steps == max_steps(suite))
    if won:
        assert episode.sim.env.check_success()
        assert steps > 4 and not demos.check_expert(episode, init_state, 4, 4)[0]
    task.close()
    return won


def test_a_film_shows_each_decision_and_the_last_picture(tmp_path):
    task = TaskSim("libero_goal", 7, render="light")
    won, steps = demos.check_expert(task.episode(), 0, 4, 10, tmp_path)
    assert (won, steps) == (False, 10)
    frames = imageio.mimread(tmp_path / "task07_state00_failure.mp4")
    assert len(frames) == 3 + 1 + 3  # decisions at 0, 4 and 8, the last picture, and the last one held
    assert np.abs(frames[3].astype(float) - frames[0]).max() > 50  # it moved
    task.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "suite, task_id, init_state, skill",
    [
        ("libero_object", 8, 3, "a box from above, into a basket"),
        ("libero_spatial", 2, 0, "a bowl by its rim, onto a plate"),
        ("libero_goal", 0, 0, "pull a drawer"),
        ("libero_goal", 2, 0, "a bottle, onto a cabinet"),
        ("libero_goal", 5, 0, "push a plate"),
        ("libero_goal", 7, 0, "turn a knob"),
        ("libero_10", 3, 0, "into a drawer, and push it shut"),
        ("libero_10", 4, 0, "two mugs by their rims, onto two plates"),
        ("libero_10", 5, 0, "a book, upright, into a compartment"),
        ("libero_10", 8, 0, "two pots by their handles, side by side"),
        ("libero_10", 9, 0, "a mug by its handle into a microwave, and shut the door"),
        ("libero_90", 63, 0, "stack two bowls in a tray"),
        ("libero_90", 34, 0, "beside another thing"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) and " " in value else None,
)
def test_each_skill_solves_a_task(suite, task_id, init_state, skill):
    assert play(suite, task_id, init_state), skill


def test_the_command_depends_on_the_state_alone():
    """A second expert of the same episode, put into the middle of it, commands the same: no timer, no hidden phase."""
    task = TaskSim("libero_object", 0, render="none")
    episode, other = task.episode(), task.episode()
    episode.reset(0)
    other.reset(0)
    expert, fresh = Expert(episode), Expert(other)
    for decision in range(24):
        command = expert.action()
        if decision % 8 == 7:
            state = episode.get_state()
            for e in (episode, other):  # both recompute what MuJoCo derives from a state
                e.set_state(state)
            command = expert.action()
            np.testing.assert_array_equal(fresh.action(), command)
        for _ in range(4):
            episode.step(command)
    task.close()


def test_goals_are_the_bddl_files_and_all_four_suites_are_covered():
    assert goal_of("libero_goal", 7) == [("turnon", "flat_stove_1")]
    assert ("close", "microwave_1") in goal_of("libero_10", 9)
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
        assert covered_tasks(suite, range(10)) == (list(range(10)), {})
    covered, missing = covered_tasks("libero_90", range(90))
    assert len(covered) == 83 and missing["open a microwave"] == [35]


def test_disturbance_keeps_commands_in_range_and_is_off_at_zero():
    rng = np.random.default_rng(0)
    command = np.array([1.0, -1.0, 0.3, 0, 0, 0, 1.0])
    np.testing.assert_array_equal(disturb(command, rng, 0.0, 0.0), command)
    many = np.stack([disturb(command, rng, 0.5, 0.5) for _ in range(200)])
    assert np.abs(many).max() <= 1.0 and (many[:, 3:6] == 0).all() and 0 < (many[:, 6] == 0).sum() < 100


def test_angles():
    for angle in np.linspace(-3, 3, 13):
        assert abs(half_turn(angle)) <= np.pi / 2 and np.isclose(
            np.sin(2 * half_turn(angle)), np.sin(2 * angle)
        )
        np.testing.assert_allclose(rotation_vector(turn(angle)), [0, 0, angle], atol=1e-6)


def test_labels_anew_from_recorded_states(tmp_path):
    """The same expert gives the recorded labels again, from another process: the states say all that they depend on. The task's
    fixtures stand elsewhere in each episode, and the second demonstration is not planned as the first."""
    task, paths = TaskSim("libero_goal", 4), [tmp_path / "old" / "a.hdf5", tmp_path / "new" / "a.hdf5"]
    assert len(task.moved_bodies)
    recorded, episode = [], task.episode()
    for k in range(2):
        recorded.append(demos.record_episode(episode, np.random.default_rng(k), demos.Args(), 120)[0])
    scribbled = [{**demo, "clean_actions": 0 * demo["clean_actions"]} for demo in recorded]
    demonstrations.write_demos(paths[0], scribbled, 4, task.instruction, **demos.task_attributes(task))
    task.close()

    def relabel(data, out):
        command = [sys.executable, "-m", "experts.relabel", "--data", str(data), "--out", str(out)]
        return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)

    done, count = relabel(tmp_path / "old", tmp_path / "new"), sum(len(demo["actions"]) for demo in recorded)
    assert done.returncode == 0 and f"{count} of {count} labels changed" in done.stdout, done
    with h5py.File(paths[1]) as f:
        for k, demo in enumerate(recorded):
            new, old = f[f"data/demo_{k}/clean_actions"][:], demo["clean_actions"]
            # MuJoCo's poses are those before the last of a step's substeps, 2 ms older than its state; a start is exact.
            error = np.abs(new - old).max(axis=1)
            assert (error < 0.02).mean() > 0.9 and error[0] < 1e-6, error
            assert np.array_equal(f[f"data/demo_{k}/actions"][:], demo["actions"])
    same, nothing = relabel(tmp_path / "old", tmp_path / "old"), relabel(tmp_path / "none", tmp_path / "x")
    with h5py.File(paths[0], "r+") as f:
        del f["data"].attrs["task_id"]
    official = relabel(tmp_path / "old", tmp_path / "y")
    for run, words in (
        (same, "would be lost"),
        (nothing, "no HDF5 files"),
        (official, "not recorded by demos.py"),
    ):
        assert run.returncode == 1 and words in run.stderr and run.stderr.count("error:") == 1, run.stderr
    assert not list((tmp_path / "y").iterdir())
