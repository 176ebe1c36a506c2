"""Episodes of one task played side by side in this process, with everything kept that labels and checks ask for.

`LiberoVecEnv` is faster, but does not give away the simulator's state. Here each decision also leaves the hand's position, the
fingers and the whole state of the simulator, so that whatever is measured about an episode is measured afterwards.
"""

import multiprocessing

import numpy as np

from simulator.render import default_render
from simulator.suites import max_steps
from simulator.task import TaskSim
from support.quiet import progress_bar


def play(episodes, limit, action_repeat, choose):
    """Play started episodes of one task in lockstep, for at most `limit` decisions each.

    choose(rows, frames) -> action tokens (n, 7), actions (n, 7) of the episodes `rows`, from frames (n, H, W, 3).
    Returns a dict per episode: success (bool); tokens, actions, ee_pos, gripper_states: lists of length T; frames, states
    (`Episode.get_state`): lists of length T + 1, the last is what the last decision led to.
    """
    names = ("tokens", "actions", "ee_pos", "gripper_states", "frames", "states")
    runs = [{"success": False, **{name: [] for name in names}} for _ in episodes]
    rows = list(range(len(episodes)))
    hidden = multiprocessing.parent_process() is not None  # workers share a terminal
    for step in progress_bar(range(limit + 1), desc="playing", unit="decision", leave=False, disable=hidden):
        for i in rows:
            runs[i]["frames"].append(episodes[i].render())
            runs[i]["states"].append(episodes[i].get_state())
        rows = [i for i in rows if not runs[i]["success"]]
        if step == limit or not rows:
            break
        tokens, actions = choose(rows, np.stack([runs[i]["frames"][-1] for i in rows]))
        for k, i in enumerate(rows):
            run, state = runs[i], episodes[i].privileged()
            run["tokens"].append(tokens[k])
            run["actions"].append(actions[k])
            run["ee_pos"].append(state["eef_pos"])
            run["gripper_states"].append(state["gripper_qpos"])
            for _ in range(action_repeat):
                run["success"] = run["success"] or episodes[i].step(actions[k])
    return runs


def runs_by_task(suite, task_ids, episodes_per_task, action_repeat, seed, decide):
    """Yield (TaskSim, limit in decisions, finished runs of `play`) per task, from random placements.

    Not from the test states: what is recorded may be used for training. Episodes whose simulation diverged are left out.
    decide(frames (n, H, W, 3), instruction) -> action tokens (n, 7), actions (n, 7): the policy.
    """
    limit = max_steps(suite) // action_repeat
    for task_id in task_ids:
        sim = TaskSim(suite, task_id, default_render())
        episodes = [sim.episode() for _ in range(episodes_per_task)]
        for i, episode in enumerate(episodes):
            episode.reset(None, np.random.default_rng([seed, task_id, i]))
        runs = play(episodes, limit, action_repeat, lambda _, frames: decide(frames, sim.instruction))
        yield sim, limit, [run for run, episode in zip(runs, episodes, strict=True) if not episode.unstable]
        sim.close()


def as_demonstration(run):
    """A run of `play` in the arrays and conventions of LIBERO's files, for `support.demonstrations.write_demos`."""
    actions = np.array(run["actions"])
    actions[:, 6] = np.where(actions[:, 6] > 0.5, -1.0, 1.0)  # files: -1 open, +1 close
    arrays = {key: np.array(run[key]) for key in ("ee_pos", "gripper_states")}
    if not run["success"]:  # a demonstration's last row has a 1 in both
        arrays |= {key: np.zeros(len(actions), np.uint8) for key in ("rewards", "dones")}
    frames = np.array(run["frames"][: len(actions)])[:, ::-1, ::-1]  # upside down, as rendered
    return {"actions": actions, "agentview_rgb": frames, **arrays}
