"""Is a reward model right about progress, and safe to optimise? A policy is rolled out in the simulator, which knows.

    python -m bench rprm --rprm checkpoints/libero_object/rprm --policy checkpoints/libero_object/policy
    python -m bench rprm --policy runs/a/policy,runs/b/policy,runs/c/policy      # also orders policies (Kendall's tau)
    python -m bench rprm --rprm Qwen/Qwen2.5-VL-3B-Instruct --device cuda        # a VLM, tuned or stock

Three tables:

1. Does the score follow the task? What other papers report, each with a row for a *clock*, score = time, which passes some
   of them without looking:

       episode AUROC   a success has the higher mean score than a failure
       same task       than a failure of the same task: which tasks are easy does not count
       difference      mean score of successes - mean score of failures
       VOC, VOC-       rank correlation of the score with time, in successes, and in their films played backwards, where a
                       value should fall (-1) and a clock still rises (+1)
       error           mean |score - true progress|
       drop AUROC      after an object was dropped, the score fell by more than at other times
       tau             Kendall's, between mean scores and success rates over the policies given, whose means follow

2. Rank correlation with true progress (`TaskProgress`), and with what the next second brings.
3. Loitering: an agent that hovers where the score is highest, against one that finishes. It is what an agent that maximises a
   sum of scores is tempted to do.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models.vlm import VLM
from policy import OpenVLA
from reward_model import CONTROL_HZ, MODES, read_reward_model, shaping_reward
from scripts.rprm import deciding
from simulator.recording import play, runs_by_task
from simulator.suites import check_task_ids
from support.cli import flag
from support.errors import UserError
from support.metrics import auroc, auroc_interval, auroc_within, kendall, mean, spearman, without_nan
from support.quiet import progress_bar


@dataclass
class Args:
    suite: str = flag("libero_object", "LIBERO suite to roll out on")
    rprm: str | None = flag(None, "RPRM, tuned VLM, or a stock VLM's name", default="checkpoints/SUITE/rprm")
    policy: str | None = flag(None, "policy that acts, or several: A,B,C", default="checkpoints/SUITE/policy")
    task_ids: list[int] | None = flag(None, "tasks, such as 0,1", min=0, default="all of the suite")
    episodes_per_task: int = flag(5, "episodes per task and policy, from random placements", min=1)
    temperature: float | None = flag(
        None,
        "sampling temperature of the policy; higher gives more failures",
        default="the checkpoint's",
        min=0.0,
    )
    weight: float = flag(0.1, "--prm-weight of the RL run to check", min=0.0)
    gamma: float = flag(0.99, "discount per decision", min=0.0, max=1.0)
    device: str = flag("cpu", "where the models run", choices=("cpu", "cuda"))
    seed: int = flag(
        2, "seed of placements and sampling; not one that data was recorded with", min=0, max=2**32 - 1
    )
    out: Path = flag(Path("runs/bench-rprm.json"), "file for the numbers")


# --------------------------------------------------------------------------------------------------------------------
# What the simulator knows
# --------------------------------------------------------------------------------------------------------------------

HELD = 0.03  # metres above its rest from which an object counts as lifted
SETTLED = 5  # decisions within which an object that was put down counts as in its place


class TaskProgress:
    """True progress of a task in [0, 1]: the mean over its goals (LIBERO's BDDL, joined by And) of parts in [0, 1], each
    relative to the start of the episode and at its best so far: a hand that has let go of the object has not lost the task.

        On, In                            reach (hand to object), lift (5 cm is all of it), carry (object to its place, seen
                                          from above). A place on the table itself can be reached by pushing: no lift.
        Open, Close, Turnon, Turnoff      reach (hand to what the joint moves), turn (the joint from its start to the
                                          nearest position that the goal accepts)

    Call it with each state of the episode in turn; `episode` is then in that state.
    """

    def __init__(self, episode):
        self.env = episode.sim.env.env
        goals = self.env.parsed_problem["goal_state"]  # e.g. [["in", "butter_1", "basket_1_contain_region"]]
        kinds = {2: ("open", "close", "turnon", "turnoff"), 3: ("on", "in")}
        if unknown := [goal for goal in goals if goal[0].lower() not in kinds.get(len(goal), ())]:
            sim = episode.sim
            raise UserError(f"{sim.suite} task {sim.task_id}: progress of the goal {unknown[0]} is not known")
        hand = episode.privileged()["eef_pos"]
        self.parts = [
            self._joint(goal, hand) if len(goal) == 2 else self._place(goal, hand) for goal in goals
        ]
        self.best = [np.zeros(len(part(hand))) for part in self.parts]

    def __call__(self, episode):
        hand = episode.privileged()["eef_pos"]
        self.best = [np.maximum(best, part(hand)) for best, part in zip(self.best, self.parts, strict=True)]
        return float(np.mean([best.mean() for best in self.best]))

    def _place(self, goal, hand):
        """Progress of (on | in) object place, a function of the hand's position -> (2,) or (3,)."""
        thing, place = (self.env.object_states_dict[name] for name in goal[1:])
        position = lambda state: np.array(state.get_geom_state()["pos"])  # noqa: E731
        start, target = position(thing), position(place)
        reach0, carry0 = np.linalg.norm(start - hand), np.linalg.norm((start - target)[:2])
        # A region of the table belongs to no object.
        on_table = place.object_state_type == "site" and self.env.get_object(place.parent_name) is None

        def part(hand):
            now, target = position(thing), position(place)  # a drawer takes its inside along
            reach = 1 - np.linalg.norm(now - hand) / reach0
            carry = 1 - np.linalg.norm((now - target)[:2]) / max(carry0, 1e-6)
            lift = (now[2] - start[2]) / 0.05
            return np.clip([reach, carry] if on_table else [reach, lift, carry], 0, 1)

        return part

    def _joint(self, goal, hand):
        """Progress of (open | close | turnon | turnoff) thing, a function of the hand's position -> (2,)."""
        model, data = self.env.sim.model._model, lambda: self.env.sim.data._data
        state = self.env.object_states_dict[goal[1]]
        is_site = state.object_state_type == "site"
        owner = self.env.get_object(state.parent_name if is_site else state.object_name)
        names = (self.env.object_sites_dict[goal[1]] if is_site else owner).joints
        method = {"open": "is_open", "close": "is_close", "turnon": "turn_on", "turnoff": "turn_off"}[
            goal[0].lower()
        ]
        accepts = getattr(owner, method)  # of one joint's position
        joints = []
        for joint in (model.joint(name) for name in names):
            q0 = float(data().qpos[joint.qposadr[0]])
            allowed = [q for q in np.linspace(*joint.range, 201) if accepts(q)]
            if allowed:
                nearest = min(allowed, key=lambda q: abs(q - q0))
                joints.append((joint.qposadr[0], q0, q0 if accepts(q0) else nearest, joint.bodyid[0]))
        # One joint is enough to be open or on; all must be closed or off.
        combine = max if goal[0].lower() in ("open", "turnon") else min
        body = joints[0][3]
        reach0 = np.linalg.norm(data().xipos[body] - hand)

        def part(hand):
            turns = []
            for address, q0, target, _ in joints:
                q = float(data().qpos[address])
                turns.append(1.0 if accepts(q) else 1 - abs(q - target) / max(abs(q0 - target), 1e-6))
            reach = 1 - np.linalg.norm(data().xipos[body] - hand) / reach0
            return np.clip([reach, combine(turns)], 0, 1)

        return part


def follow(episode, run):
    """Add to a run of `play` what the simulator knows about it. Its states are set again in `episode`, one by one.

    progress (T + 1,), 1 after a success; dropped (T + 1,) bool: an object of a goal that was lifted has just fallen.
    """
    env = episode.sim.env.env
    goals = {goal[1]: goal for goal in env.parsed_problem["goal_state"] if len(goal) == 3}
    episode.set_state(run["states"][0])
    progress = TaskProgress(episode)
    heights, placed = [], []
    run["progress"] = []
    for state in run["states"]:
        episode.set_state(state)
        run["progress"].append(progress(episode))
        heights.append([env.object_states_dict[name].get_geom_state()["pos"][2] for name in goals])
        placed.append([env._eval_predicate(goal) for goal in goals.values()])
    if run["success"]:
        run["progress"][-1] = 1.0
    run["dropped"] = drops(np.array(heights), np.array(placed, bool), run["success"])


def drops(heights, placed, success):
    """(T + 1,) bool: the first state in which an object that was lifted is down again, and not in its place soon after.

    heights (T + 1, objects) in metres; placed (T + 1, objects) bool: is it where the goal wants it? The release that a success
    ends with is none.
    """
    dropped = np.zeros(len(heights), bool)
    for height, there in zip(heights.T, placed.T, strict=True):
        lifted = height > height[0] + HELD
        for t in np.flatnonzero(lifted[:-1] & ~lifted[1:]) + 1:
            dropped[t] |= not there[t : t + SETTLED].any()
    if success:
        dropped[max(0, len(heights) - 3) :] = False
    return dropped


# --------------------------------------------------------------------------------------------------------------------
# What the reward model makes of it
# --------------------------------------------------------------------------------------------------------------------


def score_run(reward_model, model, run, instruction):
    """Add scores (T,), of each action in its context, and state_scores (T + 1,), of the state alone, 0 after a success,
    which is the potential after termination. model: the OpenVLA that acted."""
    T = len(run["tokens"])
    tokens = torch.stack(list(run["tokens"]))  # (T, 7)
    actions = model.action_tokenizer.ascending_bins(tokens) if isinstance(reward_model, VLM) else tokens
    frames = np.stack(run["frames"])
    run["scores"] = reward_model.score_frames(frames[:T], [instruction] * T, actions).tolist()
    run["state_scores"] = reward_model.score_frames(frames, [instruction] * (T + 1)).tolist()
    if run["success"]:
        run["state_scores"][-1] = 0.0


def shaped_return(run, mode, weight, gamma):
    """Discounted return of a scored run under sparse + shaping reward."""
    T = len(run["scores"])
    scores = np.array(run["state_scores"][:T] if mode == "potential" else run["scores"])
    terminated = np.zeros(T, bool)
    terminated[-1] = run["success"]
    next_scores = np.array(run["state_scores"][1:])
    rewards = 1.0 * terminated + shaping_reward(scores, next_scores, mode, weight, gamma, terminated)
    return float((gamma ** np.arange(T) * rewards).sum())


def loiter(reward_model, model, sim, runs, limit, suite):
    """For each successful run, the same agent hovering from its best-scored step on until the limit -> list of runs.

    It holds its position and its gripper. This is what an agent that maximises `sum` is tempted to do.
    """
    starts = [int(np.argmax(run["scores"])) for run in runs]
    episodes, actions = [], []
    for run, t in zip(runs, starts, strict=True):
        episodes.append(sim.episode())
        episodes[-1].set_state(run["states"][t])
        actions.append(np.array([0, 0, 0, 0, 0, 0, float(run["actions"][t][6] > 0.5)]))
    actions = np.array(actions)
    tokens = torch.from_numpy(model.encode_actions(actions, model.unnorm_key_for(suite)))
    hover = lambda rows, _: (tokens[rows], actions[rows])  # noqa: E731
    tails = play(episodes, limit - min(starts), model.action_repeat, hover)
    result = []
    for run, t, tail in zip(runs, starts, tails, strict=True):
        score_run(reward_model, model, tail, sim.instruction)
        keep = limit - t  # episodes that were left later have less time to hover
        scores, state_scores = tail["scores"][:keep], tail["state_scores"][: keep + 1]
        ended = tail["success"] and len(tail["scores"]) <= keep  # the object fell into place by itself
        joined = {
            "scores": run["scores"][:t] + scores,
            "state_scores": run["state_scores"][:t] + state_scores,
        }
        result.append({"success": ended, **joined})
    return result


# --------------------------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------------------------


def values_of(run, limit):
    """{row of the first table: its value of each decision (T,)}."""
    T = len(run["scores"])
    clock = np.arange(1, T + 1) / limit
    return {
        "score": np.array(run["scores"]),
        "score of the state alone": np.array(run["state_scores"][:T]),
        "sum of scores so far": np.cumsum(run["scores"]) / limit,
        "clock": clock,
    }


def backwards(name, values):
    """What the row `name` would give for the film played backwards: what looks at single pictures gives the same scores in
    the other order; a clock and a sum go on counting."""
    if name == "clock":
        return values
    steps = np.diff(values, prepend=0.0)[::-1] if name.startswith("sum") else values[::-1]
    return np.cumsum(steps) if name.startswith("sum") else steps


def follows_the_task(runs, limits, rate):
    """The first table: {row: {column: number}}. limits: of each run, in decisions. rate: decisions per second."""
    succeeded, tasks = (np.array([run[key] for run in runs]) for key in ("success", "task_id"))
    rows = {}
    horizon = max(1, round(rate))  # a second
    all_values = [values_of(run, limit) for run, limit in zip(runs, limits, strict=True)]
    for name in all_values[0]:
        films = [values[name] for values in all_values]
        means = np.array([film.mean() for film in films])
        separation = auroc(means, succeeded)
        won = [film for film, run in zip(films, runs, strict=True) if run["success"]]
        falls, is_drop = [], []
        for film, run in zip(films, runs, strict=True):
            dropped = np.asarray(run["dropped"])
            for t in range(len(film) - horizon):
                falls.append(round(film[t] - film[t + horizon], 9))  # equal steps of a clock are equal
                is_drop.append(dropped[t + 1 : t + horizon + 1].any())
        errors = [
            np.abs(film - np.array(run["progress"][: len(film)])).mean()
            for film, run in zip(films, runs, strict=True)
        ]
        rows[name] = {
            "episode_auroc": separation,
            "episode_auroc_95": auroc_interval(separation, int(succeeded.sum()), int((~succeeded).sum())),
            "same_task_auroc": auroc_within(means, succeeded, tasks),
            "difference": mean([mean(means[succeeded]) - mean(means[~succeeded])]),
            "voc": mean([spearman(film, np.arange(len(film))) for film in won]),
            "voc_reversed": mean([spearman(backwards(name, film), np.arange(len(film))) for film in won]),
            "error": mean(errors),
            "drop_auroc": auroc(falls, is_drop),
        }
    return rows


def means_of_policies(runs, limits, policies):
    """{policy: {row of the first table: its mean over the policy's episodes}}. policies: of each run, its name."""
    means = {}
    for name in dict.fromkeys(policies):
        films = [
            values_of(run, limit) for run, limit, by in zip(runs, limits, policies, strict=True) if by == name
        ]
        means[name] = {row: float(np.mean([film[row].mean() for film in films])) for row in films[0]}
    return means


def order_of_policies(means, rates):
    """{row: Kendall's tau between the policies' means, of `means_of_policies`, and their success rates {policy: rate}}."""
    return {
        row: kendall([mean[row] for mean in means.values()], [rates[name] for name in means])
        for row in next(iter(means.values()))
    }


def progress_correlations(runs, rate):
    """The second table, over successes: {name: mean rank correlation}."""
    names = (
        "cumulative_score",
        "time_alone",
        "score_and_next_second",
        "state_score",
        "state_score_and_next_second",
    )
    correlations = {name: [] for name in names}
    for run in (run for run in runs if run["success"]):
        scores, state_scores, progress = (
            np.array(run[name]) for name in ("scores", "state_scores", "progress")
        )
        T = len(scores)
        gain = progress[np.minimum(np.arange(T) + max(1, round(rate)), T)] - progress[:-1]
        values = np.cumsum(scores), np.arange(T), scores, state_scores[:T], state_scores[:T]
        for name, value, truth in zip(
            names, values, (progress[1:], progress[1:], gain, progress[:-1], gain), strict=True
        ):
            correlations[name].append(spearman(value, truth))
    return {name: mean(found) for name, found in correlations.items()}


def loitering(won, hovers, weight, gamma):
    """The third table: {mode: numbers} of successful runs and their hovering twins, in order."""
    # some objects fall into place
    pairs = [pair for pair in zip(won, hovers, strict=True) if not pair[1]["success"]]
    table = {}
    for mode in MODES:
        sparse = [shaped_return(run, "none", 0.0, gamma) for run, _ in pairs]
        success = [
            shaped_return(run, mode, 1.0, gamma) - s for (run, _), s in zip(pairs, sparse, strict=True)
        ]
        hovering = [shaped_return(hover, mode, 1.0, gamma) for _, hover in pairs]
        # A return is linear in the weight: hovering wins where weight x (its gain in shaping) exceeds the sparse reward
        gains = [h - s for h, s in zip(hovering, success, strict=True)]
        table[mode] = {
            "success_return": mean(s + weight * x for s, x in zip(sparse, success, strict=True)),
            "loiter_return": mean(weight * h for h in hovering),
            "loiter_wins": sum(weight * gain > s for gain, s in zip(gains, sparse, strict=True)),
            "pairs": len(pairs),
            # below this weight no loiterer wins; None: none wins at any weight
            "safe_weight": min(
                (s / gain for gain, s in zip(gains, sparse, strict=True) if gain > 0), default=None
            ),
        }
    return table


def report(runs, limits, hovers, weight, gamma, rate):
    """All numbers of scored runs and the hovering twins of the successful ones, in order; NaN: nothing was seen."""
    won = [run for run in runs if run["success"]]
    return {
        "episodes": len(runs),
        "successes": len(won),
        "drops": int(sum(np.sum(run["dropped"]) for run in runs)),
        "follows_the_task": follows_the_task(runs, limits, rate),
        "spearman_with_progress": progress_correlations(runs, rate),
        "weight": weight,
        "gamma": gamma,
        "loitering": loitering(won, hovers, weight, gamma),
    }


def measure(args):
    """Roll the policies out, and measure the reward model on what they did."""
    task_ids = check_task_ids(args.suite, args.task_ids)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    rprm = args.rprm or f"checkpoints/{args.suite}/rprm"
    reward_model = read_reward_model(rprm, device=args.device)
    names = (args.policy or f"checkpoints/{args.suite}/policy").split(",")
    runs, limits, policies, hovers, repeats, temperatures = [], [], [], [], set(), {}
    for name in names:
        model = OpenVLA.from_pretrained(name, device=args.device)
        ours, theirs = (m.action_statistics(model.unnorm_key_for(args.suite)) for m in (model, reward_model))
        if theirs is not None and not all(map(np.array_equal, ours, theirs)):
            raise UserError(
                f"{rprm} has other action statistics than {name}, so it would read other motions than are made"
            )
        repeats.add(model.action_repeat)
        if len(repeats) > 1:
            raise UserError(f"--policy {args.policy}: policies of different action_repeat share no tables")
        temperatures[name] = model.temperature_or_own(args.temperature)
        decide = deciding(model, args.suite, args.temperature, args.seed)
        played = runs_by_task(
            args.suite, task_ids, args.episodes_per_task, model.action_repeat, args.seed, decide
        )
        for sim, limit, done in progress_bar(played, total=len(task_ids), desc="rolling out", unit="task"):
            spare = sim.episode()
            for run in done:
                score_run(reward_model, model, run, sim.instruction)
                follow(spare, run)
                run["task_id"] = sim.task_id
                run["frames"] = None  # 200 kB each
            won = [run for run in done if run["success"]]
            hovers += loiter(reward_model, model, sim, won, limit, args.suite) if won else []
            runs, limits, policies = runs + done, limits + [limit] * len(done), policies + [name] * len(done)
    results = {
        "suite": args.suite,
        "task_ids": task_ids,
        "rprm": rprm,
        "temperatures": temperatures,
        "seed": args.seed,
    }
    results |= report(runs, limits, hovers, args.weight, args.gamma, CONTROL_HZ / model.action_repeat)
    results["policies"] = {
        name: mean(float(run["success"]) for run, by in zip(runs, policies, strict=True) if by == name)
        for name in names
    }
    results["mean_values"] = means_of_policies(runs, limits, policies)
    results["kendall_tau"] = order_of_policies(results["mean_values"], results["policies"])
    return without_nan(results)


def show(results):
    """Three tables on the terminal; nan where no episode of the kind was seen."""
    number = lambda value: math.nan if value is None else value  # noqa: E731
    tasks = ",".join(map(str, results["task_ids"]))
    print(
        f"{results['rprm']} on {results['suite']}, tasks {tasks}: {results['successes']} of {results['episodes']} episodes "
        f"succeeded, {results['drops']} drops\n\n"
        f"{'':26s}{'episode AUROC (95 %)':>24s}{'same task':>11s}{'difference':>12s}{'VOC':>8s}{'VOC-':>8s}{'error':>8s}{'drop AUROC':>12s}{'tau':>7s}"
    )
    for name, row in results["follows_the_task"].items():
        low, high = map(number, row["episode_auroc_95"])
        separation = f"{number(row['episode_auroc']):.3f} ({low:.2f} to {high:.2f})"
        same = number(row["same_task_auroc"])
        cells = [number(row[key]) for key in ("difference", "voc", "voc_reversed", "error", "drop_auroc")]
        tau = number(results["kendall_tau"][name])
        print(
            f"{name:26s}{separation:>24s}{same:11.3f}{cells[0]:12.3f}{cells[1]:8.3f}{cells[2]:8.3f}{cells[3]:8.3f}{cells[4]:12.3f}{tau:7.2f}"
        )
    if len(results["mean_values"]) > 1:
        rows = list(results["follows_the_task"])
        print(f"\n{'success':>8s}  " + "".join(f"{row:>26s}" for row in rows) + "   mean of the episodes of")
        for name, means in results["mean_values"].items():
            cells = "".join(f"{means[row]:26.3f}" for row in rows)
            print(f"{100 * results['policies'][name]:7.1f}%  {cells}   {name}")
    s = {name: number(value) for name, value in results["spearman_with_progress"].items()}
    print(
        f"\nrank correlation with true progress: sum of scores {s['cumulative_score']:.3f}, time alone {s['time_alone']:.3f}, "
        f"score of the state alone {s['state_score']:.3f}\n"
        f"  with the next second's progress: score {s['score_and_next_second']:.3f}, of the state alone "
        f"{s['state_score_and_next_second']:.3f}\n"
        f"\nloitering, weight {results['weight']:g}, gamma {results['gamma']:g}\n"
        f"  {'mode':<10}{'return of success':>19}{'of hovering':>13}{'hovering wins':>15}{'safe weight':>13}"
    )
    for mode, row in results["loitering"].items():
        safe = (
            f"< {row['safe_weight']:.4f}"
            if row["safe_weight"] is not None
            else "any"
            if row["pairs"]
            else "nan"
        )
        wins = f"{row['loiter_wins']} of {row['pairs']}"
        success, hovering = number(row["success_return"]), number(row["loiter_return"])
        print(f"  {mode:<10}{success:>19.3f}{hovering:>13.3f}{wins:>15}{safe:>13}")
