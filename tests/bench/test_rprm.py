"""Checks of a reward model: arithmetic on made-up runs, and true progress in the simulator."""

import json

import numpy as np
import pytest
import torch
from rprm_toys import STATS, copy_of, make_qwen

import reward_model as rm
from bench import rprm
from policy import build_tiny, policy_convention
from scripts.rprm import deciding, label, read_trajectories, write_runs
from simulator.recording import play
from simulator.task import TaskSim
from support.errors import UserError
from support.labels import POSITIVE, LabelRule
from support.metrics import kendall, without_nan


def test_report_of_made_up_runs(capsys):
    """Two successes and a failure: the loitering arithmetic, the correlations, the tables."""
    finishes = {
        "task_id": 0,
        "success": True,
        "scores": [0.5, 0.6, 0.9],
        "state_scores": [0.5, 0.6, 0.9, 0.0],
    }
    finishes |= {"progress": [0, 0.3, 0.5, 1], "dropped": [False] * 4}
    slower = {**finishes, "scores": [0.1, 0.6, 0.9]}
    fails = {
        "task_id": 0,
        "success": False,
        "scores": [0.4] * 60,
        "state_scores": [0.4] * 61,
        "dropped": [False] * 61,
    }
    fails["progress"] = [0.0] + [0.2] * 60
    hovers = {"success": False, "scores": [0.5, 0.6] + [0.9] * 60, "state_scores": [0.5, 0.6] + [0.9] * 61}
    # hovered, and the object fell in: left out
    lucky = {"success": True, "scores": [0.9], "state_scores": [0.9, 0.0]}
    runs, how = [finishes, fails, slower], {"weight": 0.1, "gamma": 0.99, "rate": 5}
    numbers = rprm.report(runs, [60] * 3, [hovers, lucky], **how)
    table = numbers["follows_the_task"]
    assert (numbers["episodes"], numbers["successes"], table["score"]["episode_auroc"]) == (3, 2, 1.0)
    scores_of_successes = np.mean([np.mean(run["scores"]) for run in (finishes, slower)])
    assert table["score"]["difference"] == pytest.approx(scores_of_successes - 0.4)
    swapped = [
        {**run, "scores": run["state_scores"][: len(run["scores"])], "state_scores": [*run["scores"], 0.0]}
        for run in runs
    ]
    other = rprm.report(swapped, [60] * 3, [hovers, lucky], **how)
    assert other["follows_the_task"]["score of the state alone"] == table["score"]
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
    at = rprm.loitering([finishes], [hovers], total["safe_weight"], 0.99)["sum"]
    assert at["loiter_return"] == pytest.approx(at["success_return"])
    assert potential["loiter_wins"] == 0 and potential["success_return"] == pytest.approx(0.99**2 - 0.1 * 0.5)
    means = rprm.means_of_policies(runs, [60] * 3, ["a", "b", "a"])
    rates = {"a": 1.0, "b": 0.5}
    tau = rprm.order_of_policies(means, rates)
    empty = without_nan(rprm.report([fails], [60], [], **how))
    assert (
        json.loads(json.dumps(empty, allow_nan=False))["follows_the_task"]["clock"]["episode_auroc"] is None
    )
    for result in (numbers, empty):
        of_policies = {"kendall_tau": tau, "mean_values": means, "policies": rates}
        rprm.show({"suite": "toy", "rprm": "r", "task_ids": [0, 1], **of_policies, **result})
    shown = capsys.readouterr().out
    assert "2 of 3 episodes succeeded" in shown
    assert f"   50.0%  {means['b']['score']:26.3f}" in shown and "   b\n" in shown


def test_what_a_clock_passes_and_what_not():
    """Scores that follow the task, and a clock: both agree with time; films backwards, drops and policies tell them apart."""
    rng = np.random.default_rng(0)

    def run(T, success, drop=None, task_id=0):
        truth = np.linspace(0, 1 if success else 0.6, T + 1)
        dropped = np.zeros(T + 1, bool)
        if drop is not None:
            truth[drop:] -= 0.4
            dropped[drop] = True
        scores = np.clip(truth + 0.01 * rng.normal(size=T + 1), 0, 1)
        return {
            "task_id": task_id,
            "success": success,
            "scores": scores[:T],
            "state_scores": scores,
            "progress": truth,
            "dropped": dropped,
        }

    runs = [
        run(40, True),
        run(50, True),
        run(60, False, 30),
        run(60, False),
        run(55, True, 20),
        run(60, False, 45),
    ]
    table = rprm.follows_the_task(runs, [60] * 6, rate=5)
    score, clock = table["score"], table["clock"]
    assert clock["voc"] == 1.0 == clock["voc_reversed"]
    assert score["voc"] > 0.7 and score["voc_reversed"] == pytest.approx(-score["voc"])
    assert score["drop_auroc"] > 0.95 and clock["drop_auroc"] == 0.5  # a clock never falls
    assert score["error"] < 0.02 < 0.2 < clock["error"]
    assert score["difference"] > 0.1 > 0 > clock["difference"]
    # One task: the same pairs. Of nine, the success with a drop loses one.
    assert score["same_task_auroc"] == pytest.approx(score["episode_auroc"]) == pytest.approx(8 / 9)
    assert clock["same_task_auroc"] == 0.0
    total = table["sum of scores so far"]
    assert total["voc"] > 0.999 < total["voc_reversed"]  # so a sum tells nothing by either
    # Failures of one task and successes of another: nothing is left to compare.
    apart = [run(40, True, task_id=1), run(60, False), run(50, True, task_id=1)]
    row = rprm.follows_the_task(apart, [60] * 3, rate=5)["score"]
    assert row["episode_auroc"] == 1.0 and np.isnan(row["same_task_auroc"])
    policies = ["good", "good", "bad", "bad", "middling", "middling"]
    tables = rprm.means_of_policies(runs, [60] * 6, policies)
    tau = rprm.order_of_policies(tables, {"good": 1, "middling": 0.5, "bad": 0})
    means = [np.mean([np.mean(runs[i]["scores"]) for i in pair]) for pair in ((2, 3), (0, 1), (4, 5))]
    assert [tables[name]["score"] for name in ("bad", "good", "middling")] == pytest.approx(means)
    assert tables["good"]["clock"] == pytest.approx(
        np.mean([(len(runs[i]["scores"]) + 1) / 120 for i in (0, 1)])
    )
    assert tau["score"] == pytest.approx(kendall(means, [0, 1, 0.5]))


def test_drops():
    heights = np.zeros((20, 2))
    heights[5:10, 0], heights[8:17, 1] = 0.1, 0.2
    placed = np.zeros((20, 2), bool)
    assert np.flatnonzero(rprm.drops(heights, placed, success=False)).tolist() == [10, 17]
    assert np.flatnonzero(rprm.drops(heights, placed, success=True)).tolist() == [
        10
    ]  # the last is the release
    placed[12:, 0] = True  # put down where it belongs, and still for a moment
    assert np.flatnonzero(rprm.drops(heights, placed, success=False)).tolist() == [17]
    nothing = np.zeros((20, 0))  # no object to carry: a drawer
    assert not rprm.drops(nothing, nothing.astype(bool), success=False).any()


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
    model = build_tiny(0)
    model.norm_stats = STATS
    reward_model, limit = rm.RPRM(copy_of(model), {}), 70
    sim = TaskSim("libero_object", 0)
    episodes = [sim.episode() for _ in range(2)]
    for i, episode in enumerate(episodes):
        episode.reset(i)
    expert = scripted(episodes, model)

    # The second episode never closes its gripper, so it reaches and fails.
    def choose(rows, frames):
        assert frames.shape == (len(rows), 256, 256, 3)
        tokens, actions = expert(rows)
        actions[[k for k, i in enumerate(rows) if i == 1], 6] = 1.0
        return tokens, actions

    won, lost = play(episodes, limit, model.action_repeat, choose)
    assert won["success"] and not lost["success"]
    write_runs(tmp_path, sim, [won, lost], model.action_repeat)
    for kind, run in (("success", won), ("failure", lost)):
        (read,) = read_trajectories(tmp_path / kind, success=kind == "success")
        assert read["instruction"] == sim.instruction and read["action_repeat"] == 4 and not read["disturbed"]
        np.testing.assert_array_equal(read["frames"], run["frames"][:-1])
        tokens = reward_model.encode_actions(policy_convention(read["actions"]), "toy")
        np.testing.assert_array_equal(tokens, model.encode_actions(np.array(run["actions"]), "toy"))
        result = label(read, LabelRule())
        assert result.usable and (result.labels == POSITIVE).any() == (kind == "success")

    spare = sim.episode()
    for run in (won, lost):
        T = len(run["tokens"])
        assert len(run["frames"]) == len(run["states"]) == T + 1
        assert all(len(run[key]) == T for key in ("actions", "ee_pos", "gripper_states"))
        rprm.score_run(reward_model, model, run, sim.instruction)
        rprm.follow(spare, run)
        assert len(run["scores"]) == T and len(run["state_scores"]) == len(run["progress"]) == T + 1
        assert all(0 <= score <= 1 for score in run["scores"])
        assert run["progress"][0] == 0 and (np.diff(run["progress"]) >= 0).all()
        assert not run["dropped"].any()
    assert won["progress"][-1] == 1.0 and won["state_scores"][-1] == 0.0
    assert len(lost["scores"]) == limit and 0.25 < lost["progress"][-1] < 0.6  # reached, never lifted

    (hover,) = rprm.loiter(reward_model, model, sim, [won], limit, "toy")
    start = int(np.argmax(won["scores"]))
    assert hover["scores"][:start] == won["scores"][:start]
    assert hover["success"] or len(hover["scores"]) == limit
    # same picture, hovering action
    assert hover["scores"][start] == pytest.approx(won["scores"][start], abs=0.2)
    sim.close()


def put(episode, joint, *values):
    """Write the positions of a joint (one of a drawer, the first three of a free object) and what follows from them."""
    import mujoco  # not at the top: `simulator` has to choose its way to draw first

    model, data = episode.sim.model, episode.data
    address = model.joint(joint).qposadr[0]
    episode._activate()
    data.qpos[address : address + len(values)] = values
    mujoco.mj_forward(model, data)


@pytest.mark.libero
@pytest.mark.parametrize(
    "suite, task_id, kinds",
    [
        ("libero_goal", 0, ["open"]),
        ("libero_goal", 5, ["on"]),
        ("libero_goal", 7, ["turnon"]),
        ("libero_10", 3, ["close", "in"]),
    ],
)
def test_progress_of_every_kind_of_goal(suite, task_id, kinds):
    """A drawer, a knob and a plate are moved by hand: progress is the share of the way, and 1 where LIBERO counts it."""
    sim = TaskSim(suite, task_id, render="none")
    episode = sim.episode()
    episode.reset(0)
    env = sim.env.env
    goals = env.parsed_problem["goal_state"]
    assert [goal[0].lower() for goal in goals] == kinds and not env._check_success()
    progress = rprm.TaskProgress(episode)
    assert progress(episode) == pytest.approx(0.0, abs=0.01)
    hand = episode.privileged()["eef_pos"]
    seen = [0.0]
    # Objects before joints: a drawer takes the place inside along.
    for goal, part in sorted(zip(goals, progress.parts, strict=True), key=lambda pair: -len(pair[0])):
        state = env.object_states_dict[goal[1]]
        if len(goal) == 2:
            owner = (
                env.object_sites_dict[goal[1]]
                if goal[0].lower() in ("open", "close")
                else env.get_object(goal[1])
            )
            (joint,) = owner.joints
            start = float(episode.data.qpos[sim.model.joint(joint).qposadr[0]])
            end = {"open": -0.14, "close": 0.0, "turnon": 0.5}[goal[0].lower()]
            for share in (0.25, 0.5, 0.75):
                put(episode, joint, start + share * (end - start))
                assert part(hand)[1] == pytest.approx(share, abs=0.03) and not env._eval_predicate(goal)
                seen.append(progress(episode))
            put(episode, joint, end + 0.005 * np.sign(end - start))
        else:
            (joint,) = env.get_object(goal[1]).joints
            place = np.array(env.object_states_dict[goal[2]].get_geom_state()["pos"])
            start = np.array(state.get_geom_state()["pos"])
            assert len(part(hand)) == (2 if suite == "libero_goal" else 3)  # a plate is pushed, a bowl lifted
            for share in (0.5, 1.0):
                put(episode, joint, *(start + share * (place - start) * [1, 1, 0] + [0, 0, 0.05 * share]))
                parts = part(hand)
                assert parts[-1] == pytest.approx(share, abs=0.03)
                assert len(parts) == 2 or parts[1] == pytest.approx(share, abs=0.03)
                seen.append(progress(episode))
            put(episode, joint, *place)
        seen.append(progress(episode))
        assert part(hand)[-1] == 1.0
        assert kinds == ["on"] or env._eval_predicate(goal)
    assert (np.diff(seen) >= 0).all() and max(seen) <= 1.0
    best = np.concatenate(progress.best)
    assert (
        progress(episode) == pytest.approx(np.mean([best.mean() for best in progress.best]))
        and best.max() == 1.0
    )
    sim.close()


def test_a_policy_acts_at_its_checkpoints_temperature_unless_told_otherwise():
    model = build_tiny(0, image_size=32, width=32, layers=2, heads=2, mlp=64)
    model.norm_stats["libero_object"] = {"action": STATS["toy"]["action"]}
    frames = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), dtype=np.uint8)
    own, same, greedy = (
        deciding(model, "libero_object", temperature, 0)(frames, "pick up the milk")[0]
        for temperature in (None, 0.6, 0.0)
    )
    assert np.array_equal(own, same) and not np.array_equal(own, greedy)


def test_a_reward_model_that_reads_other_motions_is_refused(tmp_path):
    """Of the same action tokens, by other statistics than the policy's."""
    model = build_tiny(0, image_size=32, width=32, layers=2, heads=2, mlp=64)
    model.norm_stats["libero_object"] = {"action": STATS["toy"]["action"]}
    model.save_pretrained(tmp_path / "policy")
    model.side_files["rprm.json"] = b"{}"
    model.norm_stats["libero_object"] = {"action": {**STATS["toy"]["action"], "q99": [0.5] * 7}}
    model.save_pretrained(tmp_path / "rprm")
    args = rprm.Args(
        rprm=str(tmp_path / "rprm"), policy=str(tmp_path / "policy"), task_ids=[0], episodes_per_task=1
    )
    with pytest.raises(UserError, match="other action statistics"):
        rprm.measure(args)


@pytest.mark.libero
@pytest.mark.slow
def test_a_vlm_is_measured_too(tmp_path):
    """The whole command, with a stock VLM and two policies that only flail."""
    model = build_tiny(0, image_size=32, width=32, layers=2, heads=2, mlp=64)
    model.norm_stats["libero_object"] = {"action": STATS["toy"]["action"]}
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
    qwen = make_qwen(tmp_path / "qwen")
    policies = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    args = rprm.Args(rprm=str(qwen), policy=policies, task_ids=[0], episodes_per_task=1)
    results = json.loads(json.dumps(rprm.measure(args), allow_nan=False))
    assert results["episodes"] == 2 and len(results["policies"]) == 2
    assert results["temperatures"] == dict.fromkeys(policies.split(","), 0.6)
    clock = results["follows_the_task"]["clock"]
    assert 0 < clock["error"] < 1 and set(results["kendall_tau"]) == set(results["follows_the_task"])
    assert list(results["mean_values"]) == policies.split(",")
    assert set(results["loitering"]) == set(rm.MODES)
    rprm.show(results)
