"""Are LIBERO's 50 test states other placements than those that `reset` draws at random, on which we train?

    python -m bench placements --suite libero_spatial       # no policy acts; two minutes

Each thing of a task stands at 50 places in the test states, and at 50 in as many random placements, after the ten steps that let
it settle; places are seen from above, how things are turned is left out. `spread` is the distance of a thing from the middle of
its places; `nearest` that of a whole placement to the one that is most like it (mean over its things): if test states and random
placements are of one kind, a placement is as near to a test state as to another placement. Medians, since now and then LIBERO
puts two things into each other, and one of them flies away: such placements are counted as `flung`. Objects can be moved,
fixtures (cabinet, stove) are fixed for the length of an episode.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.common import table
from simulator.suites import check_task_ids
from simulator.task import TaskSim
from support.cli import flag
from support.errors import UserError
from support.quiet import progress_bar

FLUNG = 0.1  # metres from the middle of its places, which are a few centimetres wide


@dataclass
class Args:
    suite: str = flag("libero_object", "LIBERO suite")
    task_ids: list[int] | None = flag(None, "tasks", default="all of the suite", min=0)
    placements: int = flag(50, "random placements, and test states (of which there are 50)", min=2)
    seed: int = flag(0, "seed of the random placements", min=0, max=2**32 - 1)
    out: Path = flag(Path("runs/bench-placements.json"), "where the numbers go")


def middle(places):
    """Median place (things, 2) of places (n, things, 2)."""
    return np.median(places, axis=0)


def compare_places(states, placements):
    """{name: number} of places (n, things, 2) in the test states and in random placements, metres; None of no things.

    spread_states, spread_placements, nearest_state, nearest_placement: as above, metres. shift: between the middles of a thing's
    places in both, metres, of the thing where it is largest. flung_states, flung_placements: how many of them.
    """
    if not states.shape[1]:
        return None
    off = {
        name: np.linalg.norm(p - middle(p), axis=-1)
        for name, p in (("states", states), ("placements", placements))
    }
    numbers = {f"spread_{name}": float(np.median(distance)) for name, distance in off.items()}
    numbers |= {f"flung_{name}": int((distance > FLUNG).any(axis=1).sum()) for name, distance in off.items()}
    # (placements, others) of the mean distance over things; as many others both times
    to_states, to_placements = (
        np.linalg.norm(placements[:, None] - others[None], axis=-1).mean(axis=-1)
        for others in (states, placements[: len(states)])
    )
    np.fill_diagonal(to_placements, np.inf)  # itself
    numbers["nearest_state"] = float(np.median(to_states.min(axis=1)))
    numbers["nearest_placement"] = float(np.median(to_placements.min(axis=1)))
    numbers["shift"] = float(np.linalg.norm(middle(states) - middle(placements), axis=-1).max())
    return numbers


def measure(args):
    """Of every task `compare_places` of its objects and of its fixtures, and where each stands in the test states."""
    tasks = []
    for task_id in progress_bar(check_task_ids(args.suite, args.task_ids), desc="placing", unit="task"):
        sim = TaskSim(args.suite, task_id, "none")
        episode, env, rng = sim.episode(), sim.env.env, np.random.default_rng([args.seed, task_id])
        objects, fixtures = sorted(env.objects_dict), sorted(env.fixtures_dict)
        names, split = objects + fixtures, len(objects)

        def places_after(resets):
            places = []
            for state in resets:  # None: a random placement
                episode.reset(state, rng)
                places.append(env.sim.data.body_xpos[[env.obj_body_id[name] for name in names], :2].copy())
            return np.array(places)

        if not sim.num_init_states:
            raise UserError(f"{args.suite} has no initial states of task {task_id}; --task-ids leaves it out")
        states = places_after(range(min(args.placements, sim.num_init_states)))
        placements = places_after([None] * args.placements)
        tasks.append({
            "task_id": task_id,
            "objects": compare_places(states[:, :split], placements[:, :split]),
            "fixtures": compare_places(states[:, split:], placements[:, split:]),
            # metres: where each stands in the test states, and between which extremes
            "places": {name: {"middle": middle(states)[i].tolist(), "range": np.ptp(states[:, i], axis=0).tolist()}
                       for i, name in enumerate(names)},
            "goal": env.parsed_problem["goal_state"],
        })  # fmt: skip
        sim.close()
    return {"suite": args.suite, "placements": args.placements, "seed": args.seed, "tasks": tasks}


def show(r):
    print(
        f"\n{r['suite']}, centimetres: in the test states | in {r['placements']} random placements; "
        "nearest: of a placement to a test state | to another placement"
    )
    pair = lambda numbers, a, b: numbers and f"{100 * numbers[a]:.2f} | {100 * numbers[b]:.2f}"  # noqa: E731
    rows = []
    for task in r["tasks"]:
        objects, fixtures = task["objects"], task["fixtures"]
        row = [task["task_id"], pair(objects, "spread_states", "spread_placements")]
        row += [pair(objects, "nearest_state", "nearest_placement")]
        row += [f"{objects['flung_states']} | {objects['flung_placements']}"]
        rows.append(
            [*row, pair(fixtures, "spread_states", "spread_placements"), fixtures and 100 * fixtures["shift"]]
        )
    table(
        ["task:d", "spread of objects", "nearest", "flung", "of fixtures", "whose middles differ by:.2f"],
        rows,
    )
