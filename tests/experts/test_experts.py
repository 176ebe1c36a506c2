"""experts/: each skill on one real task, and what the experts promise: reactive, clean labels, goals from the BDDL."""

import numpy as np
import pytest

from experts import Expert, covered_tasks, disturb, goal_of
from experts.scene import half_turn, rotation_vector, turn
from simulator.suites import max_steps
from simulator.task import TaskSim

pytestmark = pytest.mark.libero


def play(suite, task_id, init_state):
    """Whether the undisturbed expert solves a test state."""
    task = TaskSim(suite, task_id, render="none")
    episode = task.episode()
    episode.reset(init_state)
    expert = Expert(episode)
    won = False
    for step in range(max_steps(suite)):
        if step % 4 == 0:
            command = expert.action()
            assert command.shape == (7,) and np.abs(command).max() <= 1.0
        if won := episode.step(command):
            break
    task.close()
    return won


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
