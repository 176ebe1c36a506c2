"""Labels on trajectories with known keyframes."""

import numpy as np
import pytest
from rprm_toys import STROKE, pick_and_place

import reward_model
from support.labels import IGNORED, NEGATIVE, POSITIVE, LabelRule, LabelSummary


@pytest.mark.parametrize("hz", [20, 5])
@pytest.mark.parametrize("noise", [0.0, 0.0003])
def test_keyframes_where_the_hand_stops(hz, noise):
    result = reward_model.label_trajectory(
        *pick_and_place(hz, noise, gripper_noise=0.5 * noise), action_repeat=20 // hz
    )
    assert result.problems == [] and result.usable
    np.testing.assert_allclose(np.array(result.milestones) / hz, [2.23, 5.03], atol=0.2)
    # Arrival and grasp, arrival and release; at 5 Hz they are one row. The rest at the start is no keyframe, the end is.
    end = (len(result.labels) - 1) / hz
    expected = [2.0, 2.2, 4.8, 5.0, end] if hz == 20 else [2.0, 4.8, end]
    np.testing.assert_allclose(np.array(result.keyframes) / hz, expected, atol=0.11)


@pytest.mark.parametrize("action_repeat", [1, 4])
def test_window_is_in_seconds(action_repeat):
    hz = 20 // action_repeat
    rule = LabelRule(window=0.7, margin=0.4)
    result = reward_model.label_trajectory(*pick_and_place(hz), action_repeat=action_repeat, rule=rule)
    first, rows = result.keyframes[0], round(0.7 * hz)
    assert (result.labels[first + 1 - rows : first + 1] == POSITIVE).all()  # its own row is the last
    assert result.labels[first - rows] == NEGATIVE
    last = result.keyframes[-2]  # behind the very last one, the end, there is nothing
    ignored = np.flatnonzero(result.labels[last + 1 :] == IGNORED)
    np.testing.assert_array_equal(ignored, np.arange(round(0.4 * hz)))  # the margin behind it
    assert set(np.unique(result.labels)) == {
        POSITIVE,
        NEGATIVE,
        IGNORED,
    }


def test_window_is_never_empty():
    result = reward_model.label_trajectory(
        *pick_and_place(5), action_repeat=4, rule=LabelRule(window=0.0, margin=0.0)
    )
    assert np.flatnonzero(result.labels == POSITIVE).tolist() == result.keyframes


@pytest.mark.parametrize("held", [0.0, 0.045, 0.065])
def test_hysteresis_beats_a_bare_threshold(held):
    """Noise crosses a threshold many times; hysteresis counts two turns, for narrow and for wide objects."""
    _, _, gripper = pick_and_place(20, gripper_noise=0.001, held=held)
    openness = gripper[:, 0] - gripper[:, 1]
    assert len(reward_model.find_milestones(openness, 0.01, 0.0015, 12)) == 2
    closed = openness < held + 0.0005  # a threshold inside the noise of the held object
    assert np.abs(np.diff(closed.astype(int))).sum() > 2


def test_opening_at_the_start_is_no_milestone():
    openness = np.concatenate([np.linspace(0.04, 0.08, 10), np.full(20, 0.08)])  # LIBERO resets it half open
    assert reward_model.find_milestones(openness, 0.01, 0.0015, 12) == []


def test_slip_is_no_milestone():
    """Closing for one or two decisions (5 Hz) and opening again is not significant; staying shut for a second is."""
    for rows, expected in ((1, []), (2, []), (5, [10, 15])):
        openness = np.full(30, STROKE)
        openness[10 : 10 + rows] = 0.05
        assert reward_model.find_milestones(openness, 0.01, 0.006, hold=3) == expected


def test_turning_back_before_standing_still_is_no_milestone():
    """At 20 Hz: fingers that close a good part of the way and open again without a pause."""
    openness = np.concatenate(
        [np.full(10, STROKE), np.linspace(STROKE, 0.05, 4), np.linspace(0.05, STROKE, 4), np.full(9, STROKE)]
    )
    assert reward_model.find_milestones(openness, 0.01, 0.0015, 12) == []
    shut = np.concatenate([openness, np.linspace(STROKE, 0.03, 5), np.full(20, 0.03)])  # and then for good
    assert reward_model.find_milestones(shut, 0.01, 0.0015, 12) == [31]


def test_stops():
    """First minimum of a stop; the last one too where a segment ends in it; none for a stop that was there before."""
    speed = np.array([0.0, 0, 9, 9, 0.5, 0.2, 0.6, 0.4, 0.5, 9, 9, 0.3, 0.6, 0.1, 0.2, 0.2, 9, 0.9])
    assert reward_model.find_keyframes(speed, [], 1.0) == [5, 11, 17]
    assert reward_model.find_keyframes(speed, [14], 1.0) == [5, 11, 13, 17]
    assert reward_model.find_keyframes(speed[:15], [], 1.0) == [5, 11, 14]
    assert (
        reward_model.find_keyframes(np.zeros(5), [], 0.0)
        == reward_model.find_keyframes(np.ones(5), [], 0.2)
        == []
    )


def test_disturbed_demonstrations_use_the_commanded_speed():
    """Clean commands that stop at row 20, executed with pushes: measured, there is no stop; commanded, there is."""
    rng = np.random.default_rng(0)
    actions = np.zeros((40, 7))
    actions[:, 0] = np.where(np.abs(np.arange(40) - 20) < 3, 0.0, 0.8)
    actions[20:, 6], actions[:20, 6] = 1.0, -1.0
    ee_pos = np.cumsum(0.05 * (actions[:, :3] + rng.choice([-0.5, 0.5], (40, 3))), axis=0)
    measured = reward_model.label_trajectory(actions, ee_pos, None, 4)
    commanded = reward_model.label_trajectory(actions, ee_pos, None, 4, disturbed=True)
    assert measured.problems == ["gripper_from_command"] and measured.keyframes == [39]
    assert commanded.keyframes == [18, 19, 39] and commanded.speed.max() == pytest.approx(0.2)


def test_gripper_command_stands_in():
    actions, path, gripper = pick_and_place(20)
    for missing in (None, np.full_like(gripper, np.nan), gripper[:-1]):
        result = reward_model.label_trajectory(actions, path, missing)
        assert result.problems == ["gripper_from_command"] and result.usable and len(result.milestones) == 2
    np.testing.assert_allclose(result.openness[[0, 50]], [STROKE, 0.0])  # -1 open, +1 close


def test_bad_trajectories_are_counted_not_dropped():
    actions, path, gripper = pick_and_place(20)
    still, open_hand = np.zeros_like(path), np.tile(gripper[:1], (len(path), 1))
    hole = path.copy()
    hole[7, 1] = np.nan
    cases = [
        ((actions, path, gripper), []),
        ((actions[:1], path[:1], gripper[:1]), ["too_short"]),
        ((actions[:0], path[:0], gripper[:0]), ["too_short"]),
        ((actions, hole, gripper), ["not_finite"]),
        ((actions, path[:-2], gripper), ["lengths_differ"]),
        ((np.where(np.arange(7) == 2, np.inf, actions), path, gripper), ["not_finite"]),
        ((actions, still, gripper), ["no_motion"]),
        ((actions, path, open_hand), ["no_gripper_change"]),
    ]
    summary = LabelSummary()
    for arguments, problems in cases:
        result = reward_model.label_trajectory(*arguments)
        assert result.problems == problems
        assert result.usable == (problems in ([], ["no_gripper_change"]))
        assert len(result.labels) == len(arguments[0])
        summary.add(result)
    text = str(summary)
    assert "\n" not in text and text.startswith("2 of 8 trajectories used")
    for part in ("too_short 2", "not_finite 2", "no_motion 1", "no_gripper_change 1"):
        assert part in text


def test_a_success_ends_with_a_keyframe():
    """A push: the hand is as fast as ever when the task is done. What led there is positive, in a failure negative."""
    actions, path = np.zeros((40, 7)), np.linspace(0, 1, 40)[:, None] * np.ones(3)
    won = reward_model.label_trajectory(actions, path, np.full((40, 2), STROKE / 2))
    lost = reward_model.label_trajectory(actions, path, np.full((40, 2), STROKE / 2), success=False)
    assert won.keyframes == [39] and won.usable
    assert (won.labels == np.where(np.arange(40) < 28, NEGATIVE, POSITIVE)).all()  # 0.6 s
    assert lost.keyframes == [] and lost.usable and (lost.labels == NEGATIVE).all()


def test_failed_trajectory_gives_hard_negatives():
    """No positives; windows of the last segment turn negative, those of completed segments lose their label."""
    # hovers at the end
    arguments = [np.concatenate([x, np.repeat(x[-1:], 20, axis=0)]) for x in pick_and_place(20)]
    won, lost = (
        reward_model.label_trajectory(*arguments),
        reward_model.label_trajectory(*arguments, success=False),
    )
    last = won.milestones[-1]
    positive = won.labels == POSITIVE
    assert lost.usable and not (lost.labels == POSITIVE).any()
    assert positive[:last].any() and (lost.labels[:last][positive[:last]] == IGNORED).all()
    assert positive[last:].any() and (lost.labels[last:][positive[last:]] == NEGATIVE).all()
    np.testing.assert_array_equal(lost.labels[~positive], won.labels[~positive])
