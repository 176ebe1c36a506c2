"""RPRM: labels on trajectories with known keyframes, metrics against brute force, training on the real tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import reward_model as rm
import train
from support.errors import UserError
from policy import build_tiny
from models.vlm import VLM

FINE = 200  # Hz of the simulated hand
STROKE = 0.08


def pick_and_place(hz, noise=0.0, gripper_noise=0.0, held=0.045, seed=0):
    """A hand that reaches (stops at 2.0 s), closes, carries (stops at 4.8 s), opens, and leaves.

    Returns actions (T, 7), ee_pos (T, 3), gripper_states (T, 2).
    The fingers move at 0.15 m/s, so with `held` = 45 mm they stop 0.23 s after each command.
    """
    rng = np.random.default_rng(seed)
    phases = [  # seconds, peak speed, gripper closed
        (0.4, 0, False), (1.6, 0.25, False), (0.8, 0, True), (2.0, 0.25, True), (0.6, 0, False), (0.8, 0.2, False),
    ]
    position, opening, path, openings, commands = np.zeros(3), STROKE, [], [], []
    for seconds, speed, closed in phases:
        for phase in (np.arange(int(seconds * FINE)) + 0.5) / int(seconds * FINE):
            path.append(position.copy())
            openings.append(opening)
            commands.append(1.0 if closed else -1.0)
            position = position + speed * np.sin(np.pi * phase) * np.array([0.8, 0.6, 0.0]) / FINE
            opening += np.clip((held if closed else STROKE) - opening, -0.15 / FINE, 0.15 / FINE)
    path, openings, commands = (np.array(x)[:: FINE // hz] for x in (path, openings, commands))
    path = path + noise * rng.normal(size=path.shape)
    openings = openings + gripper_noise * rng.normal(size=len(openings))
    actions = np.zeros((len(path), 7))
    actions[:, 6] = commands
    return actions, path, np.stack([openings / 2, -openings / 2], axis=1)


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hz", [20, 5])
@pytest.mark.parametrize("noise", [0.0, 0.0003])
def test_keyframes_where_the_hand_stops(hz, noise):
    result = rm.label_trajectory(*pick_and_place(hz, noise, gripper_noise=0.5 * noise), action_repeat=20 // hz)
    assert result.problems == [] and result.usable
    np.testing.assert_allclose(np.array(result.milestones) / hz, [2.23, 5.03], atol=0.2)
    # Arrival and grasp, arrival and release; at 5 Hz they are one row. The rest at the start is no keyframe.
    expected = [2.0, 2.2, 4.8, 5.0] if hz == 20 else [2.0, 4.8]
    np.testing.assert_allclose(np.array(result.keyframes) / hz, expected, atol=0.11)


@pytest.mark.parametrize("action_repeat", [1, 4])
def test_window_is_in_seconds(action_repeat):
    hz = 20 // action_repeat
    rule = rm.LabelRule(window=0.8, margin=0.4)
    result = rm.label_trajectory(*pick_and_place(hz), action_repeat=action_repeat, rule=rule)
    first, rows = result.keyframes[0], round(0.8 * hz)
    assert (result.labels[first + 1 - rows : first + 1] == rm.POSITIVE).all()  # its own row is the last
    assert result.labels[first - rows] == rm.NEGATIVE
    last = result.keyframes[-1]
    ignored = np.flatnonzero(result.labels[last + 1 :] == rm.IGNORED)
    np.testing.assert_array_equal(ignored, np.arange(round(0.4 * hz)))  # the margin behind it
    assert set(np.unique(result.labels)) == {rm.POSITIVE, rm.NEGATIVE, rm.IGNORED}


def test_window_is_never_empty():
    result = rm.label_trajectory(*pick_and_place(5), action_repeat=4, rule=rm.LabelRule(window=0.0, margin=0.0))
    assert np.flatnonzero(result.labels == rm.POSITIVE).tolist() == result.keyframes


@pytest.mark.parametrize("held", [0.0, 0.045, 0.065])
def test_hysteresis_beats_a_bare_threshold(held):
    """Noise crosses a threshold many times; hysteresis counts two turns, for narrow and for wide objects."""
    _, _, gripper = pick_and_place(20, gripper_noise=0.001, held=held)
    openness = gripper[:, 0] - gripper[:, 1]
    assert len(rm.find_milestones(openness, 0.01, 0.0015, 12)) == 2
    closed = openness < held + 0.0005  # a threshold inside the noise of the held object
    assert np.abs(np.diff(closed.astype(int))).sum() > 2


def test_opening_at_the_start_is_no_milestone():
    openness = np.concatenate([np.linspace(0.04, 0.08, 10), np.full(20, 0.08)])  # LIBERO resets it half open
    assert rm.find_milestones(openness, 0.01, 0.0015, 12) == []


def test_slip_is_no_milestone():
    """Closing for one or two decisions (5 Hz) and opening again is not significant; staying shut for a second is."""
    for rows, expected in ((1, []), (2, []), (5, [10, 15])):
        openness = np.full(30, STROKE)
        openness[10 : 10 + rows] = 0.05
        assert rm.find_milestones(openness, 0.01, 0.006, hold=3) == expected


def test_turning_back_before_standing_still_is_no_milestone():
    """At 20 Hz: fingers that close a good part of the way and open again without a pause."""
    openness = np.concatenate([np.full(10, STROKE), np.linspace(STROKE, 0.05, 4), np.linspace(0.05, STROKE, 4), np.full(9, STROKE)])
    assert rm.find_milestones(openness, 0.01, 0.0015, 12) == []
    shut = np.concatenate([openness, np.linspace(STROKE, 0.03, 5), np.full(20, 0.03)])  # and then for good
    assert rm.find_milestones(shut, 0.01, 0.0015, 12) == [31]


def test_stops():
    """First minimum of a stop; the last one too where a segment ends in it; none for a stop that was there before."""
    speed = np.array([0.0, 0, 9, 9, 0.5, 0.2, 0.6, 0.4, 0.5, 9, 9, 0.3, 0.6, 0.1, 0.2, 0.2, 9, 0.9])
    assert rm.find_keyframes(speed, [], 1.0) == [5, 11, 17]
    assert rm.find_keyframes(speed, [14], 1.0) == [5, 11, 13, 17]
    assert rm.find_keyframes(speed[:15], [], 1.0) == [5, 11, 14]
    assert rm.find_keyframes(np.zeros(5), [], 0.0) == rm.find_keyframes(np.ones(5), [], 0.2) == []


def test_disturbed_demonstrations_use_the_commanded_speed():
    """Clean commands that stop at row 20, executed with pushes: measured, there is no stop; commanded, there is."""
    rng = np.random.default_rng(0)
    actions = np.zeros((40, 7))
    actions[:, 0] = np.where(np.abs(np.arange(40) - 20) < 3, 0.0, 0.8)
    actions[20:, 6], actions[:20, 6] = 1.0, -1.0
    ee_pos = np.cumsum(0.05 * (actions[:, :3] + rng.choice([-0.5, 0.5], (40, 3))), axis=0)
    measured = rm.label_trajectory(actions, ee_pos, None, 4)
    commanded = rm.label_trajectory(actions, ee_pos, None, 4, disturbed=True)
    assert measured.problems == ["gripper_from_command", "no_keyframe"]
    assert commanded.keyframes == [18, 19] and commanded.speed.max() == pytest.approx(0.2)


def test_gripper_command_stands_in():
    actions, path, gripper = pick_and_place(20)
    for missing in (None, np.full_like(gripper, np.nan), gripper[:-1]):
        result = rm.label_trajectory(actions, path, missing)
        assert result.problems == ["gripper_from_command"] and result.usable and len(result.milestones) == 2
    np.testing.assert_allclose(result.openness[[0, 50]], [STROKE, 0.0])  # -1 open, +1 close


def test_bad_trajectories_are_counted_not_dropped():
    actions, path, gripper = pick_and_place(20)
    still, open_hand = np.zeros_like(path), np.tile(gripper[:1], (len(path), 1))
    hole = path.copy()
    hole[7, 1] = np.nan
    steady = np.linspace(0, 1, len(path))[:, None] * np.ones(3)  # constant speed: never near zero
    cases = [
        ((actions, path, gripper), []),
        ((actions[:1], path[:1], gripper[:1]), ["too_short"]),
        ((actions[:0], path[:0], gripper[:0]), ["too_short"]),
        ((actions, hole, gripper), ["not_finite"]),
        ((actions, path[:-2], gripper), ["lengths_differ"]),
        ((np.where(np.arange(7) == 2, np.inf, actions), path, gripper), ["not_finite"]),
        ((actions, still, gripper), ["no_keyframe"]),
        ((actions, steady, gripper), ["no_keyframe"]),
        ((actions, path, open_hand), ["no_gripper_change"]),
    ]
    summary = rm.LabelSummary()
    for arguments, problems in cases:
        result = rm.label_trajectory(*arguments)
        assert result.problems == problems
        assert result.usable == (problems in ([], ["no_gripper_change"]))
        assert len(result.labels) == len(arguments[0])
        summary.add(result)
    text = str(summary)
    assert "\n" not in text and text.startswith("2 of 9 trajectories used")
    for part in ("too_short 2", "not_finite 2", "no_keyframe 2", "no_gripper_change 1"):
        assert part in text


def test_failed_trajectory_gives_hard_negatives():
    """No positives; windows of the last segment turn negative, those of completed segments lose their label."""
    arguments = [np.concatenate([x, np.repeat(x[-1:], 20, axis=0)]) for x in pick_and_place(20)]  # hovers at the end
    won, lost = rm.label_trajectory(*arguments), rm.label_trajectory(*arguments, success=False)
    last = won.milestones[-1]
    positive = won.labels == rm.POSITIVE
    assert lost.usable and not (lost.labels == rm.POSITIVE).any()
    assert positive[:last].any() and (lost.labels[:last][positive[:last]] == rm.IGNORED).all()
    assert positive[last:].any() and (lost.labels[last:][positive[last:]] == rm.NEGATIVE).all()
    np.testing.assert_array_equal(lost.labels[~positive], won.labels[~positive])


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_auroc_and_average_precision_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, labels = rng.integers(0, 8, 40) / 8, rng.random(40) < 0.4  # many ties
        pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]
        assert rm.auroc(scores, labels) == pytest.approx(np.mean(pairs))
        recall, expected = 0.0, 0.0
        for threshold in sorted(set(scores), reverse=True):
            chosen = scores >= threshold
            now = (labels & chosen).sum() / labels.sum()
            expected += (now - recall) * (labels & chosen).sum() / chosen.sum()
            recall = now
        assert rm.average_precision(scores, labels) == pytest.approx(expected)
    assert np.isnan(rm.auroc([0.1, 0.2], [1, 1])) and np.isnan(rm.average_precision([0.1], [0]))


def test_auroc_interval_covers_the_truth():
    """Two Gaussians one apart: AUROC is Phi(1 / sqrt(2)) = 0.7602. About 95 % of the intervals hold it."""
    rng = np.random.default_rng(0)
    labels, covered = np.arange(100) < 40, 0
    for _ in range(400):
        low, high = rm.auroc_interval(rm.auroc(rng.normal(labels * 1.0), labels), 40, 60)
        covered += low < 0.7602 < high
    assert 0.92 < covered / 400 < 0.98
    assert rm.auroc_interval(1.0, 5, 5) == [1.0, 1.0] and np.isnan(rm.auroc_interval(np.nan, 0, 5)).all()


def test_calibration():
    rng = np.random.default_rng(0)
    scores = rng.random(200_000)
    labels = rng.random(200_000) < scores  # calibrated by construction
    good = rm.calibration(scores, labels)
    assert good["ece"] < 0.01 and good["brier"] == pytest.approx(1 / 6, abs=0.01)
    assert rm.calibration(np.full(10, 0.9), np.arange(10) < 3)["ece"] == pytest.approx(0.6)
    assert rm.calibration(np.array([1.0, 0.0, 0.0]), np.array([1, 0, 0])) == {"ece": 0.0, "brier": 0.0}
    assert np.isnan(rm.calibration(np.ones(3), np.ones(3))["ece"])


def test_score_is_the_posterior_at_the_true_rate_of_positives():
    """Two Gaussians, learnt from balanced draws: their log-odds, scored at a prior of 0.1, are calibrated where 0.1 are positive."""
    rng = np.random.default_rng(0)
    labels = rng.random(200_000) < 0.1
    x = rng.normal(np.where(labels, 1.0, -1.0), 1.0)
    logits = torch.from_numpy(np.stack([x, -x], axis=1))  # log N(x; 1, 1) - log N(x; -1, 1) = 2x: what balanced draws teach
    score = rm.score_of(logits, 0.1).numpy()
    assert rm.calibration(score, labels)["ece"] < 0.005 and score.mean() == pytest.approx(0.1, abs=0.005)
    bare = rm.score_of(logits, 0.5).numpy()
    np.testing.assert_allclose(bare, torch.softmax(logits, dim=1)[:, 0].numpy())
    assert rm.calibration(bare, labels)["ece"] > 0.05 and rm.auroc(bare, labels) == pytest.approx(rm.auroc(score, labels))


@pytest.mark.parametrize("prior", [0, 1.0, "often", None])
def test_a_prior_that_is_none_is_named(tiny, prior):
    with pytest.raises(UserError, match="prior"):
        rm.RewardModel(tiny, {"prior": prior})


def test_spearman_of_a_constant_is_nan():
    assert np.isnan(rm.spearman([1, 1, 1], [1, 2, 3]))
    assert rm.spearman([1, 2, 30], [1, 4, 5]) == pytest.approx(1.0)


# ---- shaping ---------------------------------------------------------------------------------------------------------


def test_potential_telescopes():
    """Discounted, the shaping of a terminated episode sums to -weight * phi(s_0); a cut one keeps its last phi."""
    rng, gamma, weight = np.random.default_rng(0), 0.9, 0.5
    phi = rng.random(8)
    for terminated_at_end in (True, False):
        terminated = np.zeros(7, bool)
        terminated[-1] = terminated_at_end
        rewards = rm.shaping_reward(phi[:-1], phi[1:], "potential", weight, gamma, terminated)
        expected = weight * ((not terminated_at_end) * gamma**7 * phi[-1] - phi[0])
        assert (gamma ** np.arange(7) * rewards).sum() == pytest.approx(expected)


def test_shaping_modes():
    scores, following = torch.tensor([[0.2, 0.9]]), torch.tensor([[0.5, 0.7]])
    done = torch.tensor([[False, True]])
    assert rm.shaping_reward(scores, following, "none", 0.3, 0.99, done).tolist() == [[0, 0]]
    torch.testing.assert_close(rm.shaping_reward(scores, following, "sum", 0.3, 0.99, done), 0.3 * scores)
    out = rm.shaping_reward(scores, following, "potential", 1.0, 0.9, done)
    torch.testing.assert_close(out, torch.tensor([[0.9 * 0.5 - 0.2, -0.9]]))
    assert out.dtype == torch.float32
    with pytest.raises(ValueError, match="none, sum, potential"):
        rm.shaping_reward(scores, following, "product", 1.0, 0.9, done)


def test_report_of_made_up_runs(capsys):
    """Two successes and a failure: the loitering arithmetic, the correlations, the table."""
    finishes = {"success": True, "scores": [0.5, 0.6, 0.9], "state_scores": [0.5, 0.6, 0.9, 0.0]}
    finishes["progress"] = [0, 0.3, 0.5, 1]
    slower = {**finishes, "scores": [0.1, 0.6, 0.9]}
    fails = {"success": False, "scores": [0.4] * 60, "state_scores": [0.4] * 61, "progress": [0.0] + [0.2] * 60}
    hovers = {"success": False, "scores": [0.5, 0.6] + [0.9] * 60, "state_scores": [0.5, 0.6] + [0.9] * 61}
    lucky = {"success": True, "scores": [0.9], "state_scores": [0.9, 0.0]}  # hovered, and the object fell in: left out
    numbers = rm.report([finishes, fails, slower], [hovers, lucky], weight=0.1, gamma=0.99, rate=5)
    assert (numbers["episodes"], numbers["successes"], numbers["episode_auroc"]) == (3, 2, 1.0)
    assert numbers["mean_score"]["failure"] == pytest.approx(0.4)
    swapped = [{**run, "scores": run["state_scores"][: len(run["scores"])], "state_scores": [*run["scores"], 0.0]}
               for run in (finishes, fails, slower)]
    other = rm.report(swapped, [hovers, lucky], weight=0.1, gamma=0.99, rate=5)
    assert other["episode_auroc_state_only"] == numbers["episode_auroc"]
    names = ("score_and_next_second", "state_score_and_next_second")
    ours, theirs = numbers["spearman_with_progress"], other["spearman_with_progress"]
    assert [theirs[n] for n in names] == [ours[n] for n in reversed(names)] and len(set(ours.values())) > 1
    assert ours["state_score"] == pytest.approx(1.0)  # 0.5, 0.6, 0.9 while progress is 0, 0.3, 0.5
    assert numbers["spearman_with_progress"]["cumulative_score"] == pytest.approx(1.0)
    none, total, potential = (numbers["loitering"][mode] for mode in rm.MODES)
    assert [none[k] for k in ("pairs", "loiter_wins", "safe_weight", "loiter_return")] == [1, 0, None, 0]
    assert none["success_return"] == pytest.approx(0.99**2)
    assert total["loiter_wins"] == 1 and total["loiter_return"] > total["success_return"]
    # At the safe weight the two returns meet.
    at = rm.report([finishes], [hovers], weight=total["safe_weight"], gamma=0.99, rate=5)["loitering"]["sum"]
    assert at["loiter_return"] == pytest.approx(at["success_return"])
    assert potential["loiter_wins"] == 0 and potential["success_return"] == pytest.approx(0.99**2 - 0.1 * 0.5)
    rm.print_report({"suite": "toy", "task_ids": [0, 1], **numbers})
    assert "2 of 3 episodes succeeded" in capsys.readouterr().out
    empty = rm.without_nan(rm.report([fails], [], 0.1, 0.99, 5))
    assert json.loads(json.dumps(empty, allow_nan=False))["episode_auroc"] is None


# ---- model -----------------------------------------------------------------------------------------------------------

WORDS = ["pick", "up", "the", "red", "green", "block", "and", "place", "it", "in", "basket"]
STATS = {"toy": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}}}


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = build_tiny(
        0, WORDS, image_size=56, patch_size=14, vision_width=32, vision_blocks=2, vision_heads=2, width=64, layers=2,
        heads=2, mlp=128,
    )
    model.norm_stats = STATS
    return model


@pytest.fixture(scope="module")
def examples(tiny):
    """A separable set: positive where the image is bright AND the hand goes up, so both image and action matter."""
    rng = np.random.default_rng(0)
    n = 240
    bright, up = rng.random(n) < 0.7, rng.random(n) < 0.7
    frames = rng.integers(0, 60, (n, 64, 64, 3)) + 180 * bright[:, None, None, None]
    actions = rng.uniform(-0.2, 0.2, (n, 7))
    actions[:, 2] = np.where(up, 0.8, -0.8)
    return rm.Examples(
        [f"pick up the {'red' if i % 2 else 'green'} block" for i in range(n)],
        rm.embed_frames(tiny, frames.astype(np.uint8)).half(),
        torch.from_numpy(tiny.encode_actions(actions, "toy")),
        torch.from_numpy(bright & up).float(),
        torch.arange(n) // 10,
    )


def copy_of(model):
    import copy

    return copy.deepcopy(model)


@pytest.mark.parametrize("whole_vocabulary", [False, True])
def test_training_raises_auroc(tiny, examples, whole_vocabulary):
    model = copy_of(tiny)
    held_out = rm.split(examples, 0.25, seed=0)
    best, history = rm.fit(
        rm.RewardModel(model, {}), examples.select(~held_out), examples.select(held_out), epochs=14, batch_size=32, lr=5e-3, patience=14,
        action_dropout=0.2, whole_vocabulary=whole_vocabulary, seed=0,
    )
    assert best["auroc"] > 0.9 and best["auroc"] > history[0]["auroc"] + 0.1
    assert best["nll"] == min(entry["nll"] for entry in history)  # early stop keeps the best weights ...
    prior = float(examples.labels[~held_out].mean())
    again = rm.measure(rm.RewardModel(model, {"prior": prior}), examples.select(held_out))
    assert again["nll"] == pytest.approx(best["nll"], abs=1e-5)  # ... in the model
    assert best["auroc_state_only"] > 0.6  # bright images are likelier to be positive, whatever the action
    assert rm.RewardModel(model, {}).shares_vision(tiny)  # the vision side is untouched
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, tiny.state_dict()[k])]
    assert changed and all(k.startswith("language_model.") for k in changed)


def test_split_keeps_trajectories_whole(examples):
    held_out = rm.split(examples, 0.25, seed=0)
    inside, outside = set(examples.trajectory[held_out].tolist()), set(examples.trajectory[~held_out].tolist())
    assert not inside & outside and len(inside) == 6
    with pytest.raises(UserError, match="too few"):
        rm.split(examples.select(examples.trajectory == 0), 0.25, seed=0)


def test_score_of_a_batch_equals_single_scores(tiny, examples):
    reward_model = rm.RewardModel(copy_of(tiny), {})
    # spread the scores: random verdict rows give 0.5 +- nothing
    reward_model.model.language_model.lm_head.weight[reward_model.token_ids].mul_(50)
    texts = ["pick up the red block", "place it in the basket and pick up the green block"] * 3
    ids, mask = tiny.tokenize(texts)
    rows = examples.select(torch.arange(6))
    embeddings, tokens = rows.images.float(), rows.actions
    for action_tokens in (tokens, None):
        together = reward_model.score(ids, mask, action_tokens, patch_embeddings=embeddings)
        assert together.shape == (6,) and ((0 <= together) & (together <= 1)).all() and together.std() > 1e-3
        assert not together.requires_grad
        for i in range(6):
            one_ids, one_mask = tiny.tokenize([texts[i]])
            one = None if action_tokens is None else tokens[i : i + 1]
            alone = reward_model.score(one_ids, one_mask, one, patch_embeddings=embeddings[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


def test_score_from_pixels_equals_score_from_embeddings(tiny, examples):
    reward_model = rm.RewardModel(copy_of(tiny), {})
    frames = np.random.default_rng(1).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    pixels = tiny.preprocess(frames)
    ids, mask = tiny.tokenize(["pick up the red block"] * 2)
    tokens = examples.actions[:2]
    a = reward_model.score(ids, mask, tokens, pixel_values=pixels)
    b = reward_model.score(ids, mask, tokens, patch_embeddings=tiny.embed_images(pixels))
    torch.testing.assert_close(a, b)


# ---- files and command line ------------------------------------------------------------------------------------------


def write_demos(path, count, hz=5, broken=(), size=64):
    """Demonstrations in LIBERO's layout: frames whose brightness follows the speed, stored upside down."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "pick up the red block"})
        if hz != 20:
            data.attrs["action_repeat"] = 20 // hz
        for i in range(count):
            actions, ee_pos, gripper = pick_and_place(hz, noise=0.0002, seed=i)
            moving = np.append(np.linalg.norm(np.diff(ee_pos, axis=0), axis=1), 0) * hz
            frames = np.zeros((len(actions), size, size, 3), np.uint8)
            frames[:, size // 2 :] = (40 + 800 * moving).clip(0, 255).astype(np.uint8)[:, None, None, None]
            if i in broken:
                ee_pos[3] = np.nan
            demo = data.create_group(f"demo_{i}")
            demo["actions"] = actions
            demo["obs/ee_pos"], demo["obs/gripper_states"], demo["obs/agentview_rgb"] = ee_pos, gripper, frames


def test_reader_turns_images_upright(tmp_path):
    write_demos(tmp_path / "toy_demo.hdf5", 12, hz=20)
    trajectories = list(rm.read_trajectories(tmp_path))
    assert len(trajectories) == 12 and trajectories[0]["action_repeat"] == 1
    assert [t["name"].split("_")[-1] for t in trajectories] == [str(i) for i in range(12)]  # 2 before 10
    assert trajectories[0]["frames"][30, :32].mean() > 40 > trajectories[0]["frames"][30, 32:].mean() == 0
    assert trajectories[0]["instruction"] == "pick up the red block"


def test_label_command_plots(tmp_path, capsys):
    write_demos(tmp_path / "toy_demo.hdf5", 3, broken=[1])
    rm.main(["label", "--demos", str(tmp_path), "--plot", str(tmp_path / "plots")])
    assert "2 of 3 trajectories used" in capsys.readouterr().out
    files = sorted((tmp_path / "plots").iterdir())
    assert len(files) == 3  # the broken one too: it is what a person wants to look at
    for file in files:
        with Image.open(file) as image:
            image.load()
            assert image.format == "PNG" and image.width > 800 and np.ptp(np.asarray(image.convert("L"))) > 100


def test_plot_of_one_step(tmp_path):
    result = rm.label_trajectory(np.zeros((1, 7)), np.zeros((1, 3)))
    rm.plot_trajectory(tmp_path / "one.png", np.zeros((1, 8, 8, 3), np.uint8), result, "one step")
    with Image.open(tmp_path / "one.png") as image:
        image.verify()


def test_train_and_score_commands(tiny, tmp_path, capsys):
    """Labels -> training -> saved model -> scores, through the command line and the files."""
    copy_of(tiny).save_pretrained(tmp_path / "sft")
    write_demos(tmp_path / "toy_demo.hdf5", 8, broken=[2])
    demos, out = ["--demos", str(tmp_path / "toy_demo.hdf5")], tmp_path / "rprm"
    rm.main([
        "train", *demos, "--suite", "toy", "--policy", str(tmp_path / "sft"), "--out", str(out), "--epochs", "4",
        "--lr", "2e-3", "--batch-size", "16", "--failures", demos[1], "--successes", demos[1], "--limit", "4",
    ])
    printed = capsys.readouterr().out
    assert "17 of 20 trajectories used" in printed and "AUROC" in printed  # --limit is of the demonstrations: 4 + 8 + 8, 3 of them broken
    info = json.loads((out / "rprm.json").read_text())
    assert info["label_rule"]["window"] == 0.6 and 0 <= info["held_out"]["auroc"] <= 1 and info["train_rows"] > 0
    reward_model = rm.RewardModel.from_pretrained(out)
    assert reward_model.info == info and reward_model.shares_vision(tiny)
    assert reward_model.prior == info["prior"] and 0 < info["prior"] < 0.5
    assert not any(p.requires_grad for p in reward_model.model.parameters())

    rm.main(["score", *demos, "--suite", "toy", "--rprm", str(out), "--json", str(tmp_path / "s.json"), "--limit", "1",
             "--plot", str(tmp_path / "plots")])
    (record,) = json.loads((tmp_path / "s.json").read_text())
    assert len(record["scores"]) == len(record["labels"]) and all(0 <= s <= 1 for s in record["scores"])
    assert len(list((tmp_path / "plots").iterdir())) == 1


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["label", "--demos", "nowhere"], "no demonstrations at nowhere"),
        (["label", "--demos", "cut.hdf5"], "cut.hdf5"),
        (["score", "--demos", "toy.hdf5"], "one of --rprm and --vlm"),
        (["score", "--demos", "toy.hdf5", "--rprm", "nowhere"], "rprm.json"),
        (["train", "--demos", "toy.hdf5", "--policy", "./nowhere"], "nowhere"),
        (["label", "--demos", "toy.hdf5", "--window", "-1"], "--window"),
        (["evaluate", "--suite", "libero_moon"], "libero_moon"),
    ],
)
def test_bad_input_is_one_line(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_demos(tmp_path / "toy.hdf5", 1)
    (tmp_path / "cut.hdf5").write_bytes((tmp_path / "toy.hdf5").read_bytes()[:3000])
    with pytest.raises(SystemExit) as stop:
        rm.main(arguments)
    error = capsys.readouterr().err.strip()
    assert stop.value.code != 0 and expected in error and error.startswith("error:") and "\n" not in error


# ---- in the simulator ------------------------------------------------------------------------------------------------


def scripted(episodes, model):
    """A crude expert for libero_object: above the can, down, close, lift, above the basket, let go."""
    held = dict.fromkeys(range(len(episodes)), 0)

    def choose(rows, *_):
        actions = np.zeros((len(rows), 7))
        for k, i in enumerate(rows):
            state = episodes[i].privileged()
            (can, _), (basket, _) = state["objects"]["alphabet_soup_1"], state["objects"]["basket_1"]
            hand = state["eef_pos"]
            if held[i] == 0:  # reach: a funnel, low only where the hand is above the can
                away = np.linalg.norm((can - hand)[:2])
                goal, grip = can + [0, 0, min(0.15, 2 * max(0.0, away - 0.01))], 1.0
                held[i] = int(np.linalg.norm(can - hand) < 0.02)
            elif held[i] < 4:  # close
                goal, grip = hand, 0.0
                held[i] += 1
            else:
                over = np.linalg.norm((basket - hand)[:2]) < 0.03
                high = can[2] > 0.15 or np.linalg.norm((basket - hand)[:2]) < 0.1
                goal, grip = np.append(basket[:2] if high else hand[:2], 0.25), float(over)
            actions[k, :3], actions[k, 6] = np.clip(5 * (goal - hand), -1, 1), grip
        return torch.from_numpy(model.encode_actions(actions, "toy")), actions

    return choose


@pytest.mark.libero
def test_progress_and_loitering_in_the_simulator(tmp_path):
    from simulator.task import TaskSim

    model = build_tiny(0)
    model.norm_stats = STATS
    reward_model, limit = rm.RewardModel(copy_of(model), {}), 70
    sim = TaskSim("libero_object", 0)
    episodes = [sim.episode() for _ in range(2)]
    for i, episode in enumerate(episodes):
        episode.reset(i)
    expert = scripted(episodes, model)
    # The second episode never closes its gripper, so it reaches and fails.
    def choose(rows, *context):
        tokens, actions = expert(rows, *context)
        actions[[k for k, i in enumerate(rows) if i == 1], 6] = 1.0
        return tokens, actions

    won, lost = rm.roll(reward_model, model, sim, episodes, limit, choose)
    assert won["success"] and not lost["success"]
    for run in (won, lost):
        T = len(run["scores"])
        assert len(run["state_scores"]) == len(run["progress"]) == T + 1
        assert all(len(run[key]) == T for key in ("states", "actions", "frames", "ee_pos", "gripper_states"))
        assert all(0 <= score <= 1 for score in run["scores"])
        assert run["progress"][0] == 0 and (np.diff(run["progress"]) >= 0).all()
    assert won["progress"][-1] == 1.0 and won["state_scores"][-1] == 0.0
    assert len(lost["scores"]) == limit and 0.25 < lost["progress"][-1] < 0.6  # reached, never lifted

    rm.record_runs(tmp_path, sim, [won, lost], model.action_repeat)
    for kind, run in (("success", won), ("failure", lost)):
        (read,) = rm.read_trajectories(tmp_path / kind, success=kind == "success")
        assert read["instruction"] == sim.instruction and read["action_repeat"] == 4 and not read["disturbed"]
        np.testing.assert_array_equal(read["frames"], run["frames"])
        tokens = rm.action_tokens_of(model, read["actions"], "toy")
        np.testing.assert_array_equal(tokens, model.encode_actions(np.array(run["actions"]), "toy"))
        result = rm.label(read, rm.LabelRule())
        assert result.usable and (result.labels == rm.POSITIVE).any() == (kind == "success")

    (hover,) = rm.loiter(reward_model, model, sim, [won], limit, "toy")
    start = int(np.argmax(won["scores"]))
    assert hover["scores"][:start] == won["scores"][:start]
    assert hover["success"] or len(hover["scores"]) == limit
    assert hover["scores"][start] == pytest.approx(won["scores"][start], abs=0.2)  # same picture, hovering action
    sim.close()


# ---- a stock VLM -----------------------------------------------------------------------------------------------------

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


@pytest.fixture(params=["Qwen2-VL", "Qwen2.5-VL"])
def qwen(request, tmp_path):
    """A Qwen2-VL or its successor with random weights, in the layout of the hub."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    words = "<unk> 0 1 user assistant The task is to pick up the red green block , it completed ? Answer for yes or no"
    words = [*words.split(), ".", *"next action is Is one of progress unknown".split(), *map(str, range(256))]
    base = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base, unk_token="<unk>", pad_token="<|end|>", eos_token="<|end|>",
        additional_special_tokens=special, chat_template=CHAT,
    )
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    torch.manual_seed(0)
    if request.param == "Qwen2-VL":
        kind, vision = "Qwen2VL", dict(embed_dim=32, hidden_size=32, mlp_ratio=2)
    else:
        kind = "Qwen2_5_VL"
        vision = dict(hidden_size=32, intermediate_size=64, out_hidden_size=32, window_size=56)
        vision["fullatt_block_indexes"] = [0]
    config = getattr(transformers, f"{kind}Config")(
        text_config=dict(
            vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, initializer_range=0.5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        ),
        vision_config=dict(depth=1, num_heads=2, patch_size=14, initializer_range=0.5, **vision),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )
    getattr(transformers, f"{kind}ForConditionalGeneration")(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}).save_pretrained(tmp_path)
    return tmp_path


def test_stock_vlm_scores_frames(qwen):
    vlm = VLM.from_pretrained(qwen)
    frames = np.random.default_rng(0).integers(0, 255, (5, 128, 128, 3), dtype=np.uint8)
    together = vlm.score_frames(frames, "pick up the red block")
    assert together.shape == (5,) and ((0 <= together) & (together <= 1)).all() and together.std() > 1e-4
    alone = [vlm.score_frames(frames[i : i + 1], "pick up the red block")[0] for i in range(5)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    other = vlm.score_frames(frames, "pick up the green block")
    assert np.abs(other - together).max() > 1e-4  # it reads the instruction


def test_stock_vlm_that_is_none(tmp_path):
    with pytest.raises(UserError, match="no vision-language model at"):
        VLM.from_pretrained(tmp_path)


def test_stock_vlm_scores_a_rollout(qwen):
    """What train.py does with it: instructions mixed, both modes, a cut episode's own last frame."""
    vlm = rm.load_reward_model(str(qwen))
    assert isinstance(vlm, VLM)
    rng = np.random.default_rng(0)
    texts = ["pick up the red block", "pick up the green block"]
    seen = [(rng.integers(0, 255, (2, 128, 128, 3), dtype=np.uint8), texts) for _ in range(4)]
    final = rng.integers(0, 255, (128, 128, 3), dtype=np.uint8)
    want = torch.tensor([[vlm.score_frames(frames[n : n + 1], texts[n])[0] for n in range(2)] for frames, _ in seen])
    scores, following = train.score_frames(vlm, seen[:3], seen[3], {}, "sum")
    torch.testing.assert_close(scores, want[:3].float(), rtol=0, atol=1e-5)
    assert scores.std() > 1e-3 and not following.any()
    scores, following = train.score_frames(vlm, seen[:3], seen[3], {(1, 0): final}, "potential")
    torch.testing.assert_close(scores, want[:3].float(), rtol=0, atol=1e-5)
    want[2, 0] = vlm.score_frames(final[None], texts[0])[0]  # follows step 1 of environment 0
    torch.testing.assert_close(following, want[1:].float(), rtol=0, atol=1e-5)


STATISTICS = tuple(np.array(STATS["toy"]["action"][key]) for key in ("q01", "q99", "mask"))


def vlm_examples(vlm, n=200):
    """Positive where the image is bright AND the hand goes up; instructions of two lengths."""
    rng = np.random.default_rng(0)
    bright, up = rng.random(n) < 0.7, rng.random(n) < 0.7
    frames = (rng.integers(0, 60, (n, 64, 64, 3)) + 180 * bright[:, None, None, None]).astype(np.uint8)
    actions = np.zeros((n, 7))
    actions[:, 2] = np.where(up, 0.8, -0.8)
    texts = [f"pick up the {'red' if i % 2 else 'green , green'} block" for i in range(n)]
    return rm.Examples(texts, vlm.images_of(frames), vlm.actions_of(actions), torch.from_numpy(bright & up).float(), torch.arange(n) // 6)


def test_a_vlm_learns_the_labels_by_its_adapter(qwen, tmp_path):
    vlm = VLM.from_pretrained(qwen).to_be_tuned(qwen, STATISTICS, rank=8)
    before = {name: p.clone() for name, p in vlm.model.named_parameters()}
    examples = vlm_examples(vlm)
    held_out = rm.split(examples, 0.25, seed=0)
    best, history = rm.fit(
        vlm, examples.select(~held_out), examples.select(held_out), epochs=12, batch_size=32, micro_batch_size=8, lr=1e-2,
        patience=12, action_dropout=0.2, whole_vocabulary=False, seed=0,
    )
    assert best["auroc"] > 0.9 and best["nll"] < 0.8 * history[0]["nll"]
    changed = [name for name, p in vlm.model.named_parameters() if not torch.equal(p, before[name])]
    assert changed and all("lora_" in name for name in changed) and not any("visual" in name for name in changed)

    # Rows of other lengths beside it change no row, and what was saved judges like what was trained.
    rows, shown = examples.select(torch.arange(6)), torch.tensor([False, True] * 3)
    with torch.no_grad():
        together = vlm.verdicts(rows, shown)
        for i in range(6):
            torch.testing.assert_close(vlm.verdicts(rows.select([i]), shown[i : i + 1])[0], together[i], rtol=0, atol=2e-4)
    vlm.save(tmp_path / "rprm", {"suite": "toy"})
    assert (tmp_path / "rprm" / "adapter_model.safetensors").stat().st_size < 300_000
    again = rm.load_reward_model(str(tmp_path / "rprm"))
    assert isinstance(again, VLM) and again.info["suite"] == "toy" and again.info["vlm"] == str(qwen)
    np.testing.assert_allclose(rm.predict(again, rows), rm.predict(vlm, rows), atol=1e-4)
    assert not any(p.requires_grad for p in again.model.parameters())

    # In the loop: `sum` shows it the actions, `potential` does not.
    frames, texts = rows.images[:2].numpy(), rows.instructions[:2]
    seen, levels = [(frames, texts)] * 3, rows.actions[:2].repeat(3, 1, 1)
    shown, _ = train.score_frames(again, seen, (frames, texts), {}, "sum", levels)
    np.testing.assert_allclose(shown[0], rm.predict(again, rows.select([0, 1])), atol=1e-4)
    alone, _ = train.score_frames(again, seen, (frames, texts), {}, "potential", levels)
    np.testing.assert_allclose(alone[0], rm.predict(again, rows.select([0, 1]), state_only=True), atol=1e-4)
    assert not torch.allclose(shown, alone, atol=1e-3)


@pytest.mark.parametrize("qwen", ["Qwen2.5-VL"], indirect=True)
def test_a_vlm_is_tuned_from_the_command_line(tiny, qwen, tmp_path, capsys):
    copy_of(tiny).save_pretrained(tmp_path / "sft")
    write_demos(tmp_path / "toy_demo.hdf5", 4)
    demos, out = ["--demos", str(tmp_path / "toy_demo.hdf5"), "--suite", "toy"], tmp_path / "rprm"
    rm.main(["train", *demos, "--vlm", str(qwen), "--policy", str(tmp_path / "sft"), "--out", str(out), "--epochs", "1",
             "--lr", "1e-3", "--batch-size", "16"])
    assert "AUROC" in capsys.readouterr().out
    rm.main(["score", *demos, "--rprm", str(out), "--json", str(tmp_path / "s.json"), "--limit", "1"])
    (record,) = json.loads((tmp_path / "s.json").read_text())
    assert len(record["scores"]) == len(record["labels"]) and all(0 <= s <= 1 for s in record["scores"])
    with pytest.raises(SystemExit):
        rm.main(["evaluate", "--rprm", str(out), "--policy", str(tmp_path / "sft")])
    assert "is a tuned VLM" in capsys.readouterr().err
    (out / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no vision-language model at"):
        rm.load_reward_model(str(out))


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.parametrize("qwen", ["Qwen2.5-VL"], indirect=True)
def test_stock_vlm_in_the_loop(qwen, tmp_path):
    """`train.py --reward-model VLM`, with the paper's sum, whose payment is easy to add up."""
    model = build_tiny(0, image_size=32, width=32, layers=2, heads=2, mlp=64)
    model.norm_stats["libero_object"] = {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}}
    model.save_pretrained(tmp_path / "policy")
    flags = f"""--task-ids 0 --model {tmp_path / "policy"} --reward-model {qwen} --out {tmp_path / "run"} --num-envs 2
        --num-workers 1 --num-steps 3 --total-steps 6 --max-episode-steps 8 --eval-every 0 --final-episodes 0
        --video-every 0 --prm-mode sum --prm-weight 0.02"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "train.py", *flags.split()], cwd=Path(rm.__file__).parent, env=environment,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (metrics,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert 0 < metrics["charts/prm_score"] < 1
    paid = metrics["charts/reward"] * 6 - metrics["charts/sparse_return"] * 2
    assert paid == pytest.approx(0.02 * metrics["charts/prm_score"] * 6, rel=1e-3)


def test_reward_model_is_told_from_a_stock_vlm(tmp_path):
    with pytest.raises(UserError, match="holds no rprm.json"):
        rm.load_reward_model(str(tmp_path / "nothing"))
    build_tiny(0, words=["red"]).save_pretrained(tmp_path / "policy")
    with pytest.raises(UserError, match="holds no rprm.json"):  # a policy is no judge
        rm.load_reward_model(str(tmp_path / "policy"))
