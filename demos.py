"""Demonstrations: recordings of the scripted experts (experts/).

Imitation needs data, and LIBERO's demonstrations live on a hub. The experts stand in for the human. Noise disturbs what is
*executed*, so that the data hold recoveries; the label of a row stays the clean command for the state that was reached (DART,
arXiv 1703.09327). Start states are LIBERO's random placements, never the 50 test states. With `--policy` a trained policy acts
for stretches of an episode and the expert, who still labels every state, for the others (DAgger, arXiv 1011.0686): where that
policy strays to, the next one has seen what to do.

The files have LIBERO's own layout (support/demonstrations.py). One row is one decision; `action_repeat` says how many control
steps it lasts.

    python demos.py --suite libero_object --num-demos 50 --out data
    python demos.py --suite libero_object --policy runs/sft --num-demos 50 --out data-of-sft    # where runs/sft strays to
    python demos.py --suite libero_object --check           # success of the undisturbed expert on the test states
"""

import dataclasses

from support.cli import flag, parse_args


@dataclasses.dataclass
class Args:
    suite: str = flag("libero_object", "LIBERO suite, or a LIBERO-PRO variant of one")
    task_ids: list[int] | None = flag(None, "comma-separated task ids", default="all tasks", min=0)
    num_demos: int = flag(60, "successful demonstrations to record per task", min=1)
    out: str = flag(
        "data",
        "directory; files go to <out>/<suite>/<task>_demo.hdf5 (with --policy <task>_policy_demo.hdf5)",
    )
    action_repeat: int = flag(
        4, "control steps per recorded decision (openvla-tiny acts every 4)", min=1, max=100
    )
    noise: float = flag(
        0.25, "std of the disturbance of executed translation commands; labels stay clean", min=0
    )
    kick: float = flag(
        0.08, "probability per decision of a large random push, a recovery to learn from", min=0, max=1
    )
    policy: str | None = flag(
        None, "policy that acts for stretches of each episode, while the expert labels", default="none"
    )
    resolution: int = flag(
        256, "stored image side in pixels (official LIBERO files: 128)", choices=(64, 128, 256)
    )
    render: str | None = flag(
        None,
        "simplified or exact meshes",
        choices=["light", "exact"],
        default="exact where a GPU renders, else light",
    )
    num_workers: int = flag(0, "processes; 0 = one per core", min=0)
    seed: int = flag(0, "seed of placements and disturbances", min=0, max=2**32 - 1)
    check: bool = flag(False, "record nothing; report the undisturbed expert on the test states")
    episodes_per_task: int = flag(
        50, "with --check: test states 0 to N-1 of each task, as far as it has them", min=1, max=50
    )
    video: int = flag(0, "with --check: test states of each task to film, into <out>/<suite>/videos", min=0)


if __name__ == "__main__":
    args = parse_args(
        Args, "Record scripted demonstrations in LIBERO's HDF5 layout, or check the scripted experts."
    )

import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from support.demonstrations import OBSERVATIONS, demo_path, merge_parts, write_demos
from support.episodes import write_episode_film
from support.errors import UserError, main_guard
from support.files import read_json
from support.machine import cores
from support.pool import run_jobs
from support.quiet import progress_bar
from support.statistics import wilson_interval

STRETCH = 10  # decisions, the mean, before expert and policy change places (--policy)


def record_episode(episode, rng, args, limit, policy=None):
    """One disturbed demonstration from a random placement: dict of arrays in LIBERO's layout, and whether it succeeded.

    args: action_repeat, resolution, noise and kick are used. limit: control steps. The arrays are (T, ...), one row per
    decision: "actions" as executed and "clean_actions" (T, 7), gripper -1 open, +1 close; "agentview_rgb" (T, R, R, 3) uint8,
    upside down; and so on.
    policy: function from a frame (256, 256, 3) to an action (7,), which acts about half of the time.
    """
    from experts import Expert, disturb  # late, as all that needs the simulator: readers of files do not

    episode.reset(None, rng)
    expert = Expert(episode)
    stride = episode.sim.resolution // args.resolution
    names = ("actions", "clean_actions", "states", "robot_states", *OBSERVATIONS)
    rows = {name: [] for name in names}
    success, policy_acts = False, policy is not None and rng.random() < 0.5
    for _ in range(limit // args.action_repeat):
        command, frame = expert.action(), episode.render()
        if policy and rng.random() < 1 / STRETCH:
            policy_acts = not policy_acts
        executed = policy(frame) if policy_acts else disturb(command, rng, args.noise, args.kick)
        p, d = episode.privileged(), episode.data
        rotation = Rotation.from_matrix(p["eef_mat"])
        ori, quat = rotation.as_rotvec(), rotation.as_quat()
        upside_down = frame[::-1, ::-1]  # LIBERO's files keep OpenGL's orientation
        rows["agentview_rgb"].append(upside_down[::stride, ::stride])
        for key, a in (("clean_actions", command), ("actions", executed)):
            rows[key].append(np.append(a[:6], -1.0 if a[6] > 0.5 else 1.0))
        rows["states"].append(np.concatenate([[d.time], d.qpos, d.qvel]))
        rows["robot_states"].append(np.concatenate([p["gripper_qpos"], p["eef_pos"], quat]))
        rows["ee_pos"].append(p["eef_pos"])
        rows["ee_ori"].append(ori)
        rows["ee_states"].append(np.concatenate([p["eef_pos"], ori]))
        rows["gripper_states"].append(p["gripper_qpos"])
        rows["joint_states"].append(p["joint_pos"])
        for _ in range(args.action_repeat):
            success = episode.step(executed)
            if success:
                break
        if success:
            break
    demo = {name: np.stack(value) for name, value in rows.items()}
    return {**demo, "model_file": model_file(episode)}, success


def task_attributes(sim):
    """What LIBERO's and robomimic's tools ask a file of `sim`'s task (a TaskSim): attributes of `data`, text and numbers."""
    env, bddl = sim.env.env, Path(sim.env.env.bddl_file_name)
    problem, name = env.parsed_problem["problem_name"], type(env).__name__
    arguments = {"type": 1, "env_name": name, "problem_name": problem, "bddl_file": str(bddl)}
    arguments["env_kwargs"] = {
        "robots": ["Panda"], "controller_configs": {"type": "OSC_POSE"}, "control_freq": 20, "bddl_file_name": str(bddl),
        "camera_names": ["agentview"], "has_renderer": False, "has_offscreen_renderer": True, "use_camera_obs": True,
        "ignore_done": True, "reward_shaping": False,
    }  # fmt: skip
    info = {"problem_name": problem, "domain_name": "robosuite", "language_instruction": sim.instruction}
    return {
        "env_name": name, "env_args": json.dumps(arguments), "problem_info": json.dumps(info), "suite": sim.suite,
        "bddl_file_name": str(bddl), "bddl_file_content": bddl.read_text(encoding="utf-8"), "task_id": sim.task_id,
    }  # fmt: skip


def model_file(episode):
    """The scene of an episode as MuJoCo's XML (str), fixtures where this episode has them."""
    sim = episode.sim
    tree = ElementTree.fromstring(sim.env.env.model.get_xml())
    bodies = {body.get("name"): body for body in tree.iter("body")}
    for body, pos, quat in zip(sim.moved_bodies, episode.body_pos, episode.body_quat, strict=True):
        bodies[sim.model.body(int(body)).name].set("pos", " ".join(map(repr, map(float, pos))))
        bodies[sim.model.body(int(body)).name].set("quat", " ".join(map(repr, map(float, quat))))
    return ElementTree.tostring(tree, encoding="unicode")


def check_expert(episode, init_state, action_repeat, limit, videos=None):
    """Whether the undisturbed expert solves test state `init_state` within `limit` control steps, and in how many.
    videos: directory for a film of it."""
    from experts import Expert

    episode.reset(init_state)
    expert, success, steps, frames = Expert(episode), False, 0, []
    while not success and steps < limit:
        if steps % action_repeat == 0:
            command = expert.action()
            if videos:
                frames.append(episode.render())
        success, steps = episode.step(command), steps + 1
    if videos:
        outcome = dict(task_id=episode.sim.task_id, init_state=init_state, success=success, steps=steps)
        write_episode_film(videos, [*frames, episode.render()], outcome, action_repeat)
    return success, steps


_SIM = {}  # per process: the one task that is built at the moment


def _task_sim(*key):
    from simulator.task import TaskSim

    if key not in _SIM:
        for old in _SIM.values():
            old.close()
        _SIM.clear()
        _SIM[key] = TaskSim(*key)
    return _SIM[key]


_POLICY = {}  # per process: the policy that acts in recordings


def _policy_of(args, sentence, rng):
    """What `record_episode` takes as its policy, sampling at its checkpoint's temperature; None without --policy."""
    if args.policy is None:
        return None
    import torch

    from eval import act
    from policy import OpenVLA

    if not _POLICY:
        torch.set_num_threads(1)
        _POLICY["model"] = OpenVLA.from_pretrained(args.policy)
    model, generator = _POLICY["model"], torch.Generator().manual_seed(int(rng.integers(2**32)))
    key = model.unnorm_key_for(args.suite)
    return lambda frame: np.clip(
        act(model, key, model.sampling_temperature, False, frame[None], [sentence], [generator])[0], -1.0, 1.0
    )


def _work(job):
    """Worker: a share of one task's demonstrations, written to a part file, or of its test states. (task_id, what came of it):
    the part's name, attempts and the task's name, or a line (str) where the expert fails; for test states (success, steps)."""
    from simulator.suites import max_steps

    args, task_id, share, shares = job
    limit = max_steps(args.suite) * (2 if args.policy else 1)  # the expert has about half of the time then
    task = _task_sim(args.suite, task_id, "none" if args.check and not args.video else args.render)
    episode = task.episode()
    if args.check:
        states = range(share, min(args.episodes_per_task, task.num_init_states), shares)
        videos, how = Path(args.out) / args.suite / "videos", (args.action_repeat, limit)
        return task_id, [check_expert(episode, i, *how, videos if i < args.video else None) for i in states]
    demos, attempts = [], 0
    for number in np.array_split(np.arange(args.num_demos), shares)[share]:
        # Each demonstration has its own random numbers, so that the file does not depend on the number of workers.
        rng = np.random.default_rng([args.seed, task_id, number])
        policy, success = _policy_of(args, task.instruction, rng), False
        while not success:
            arrays, success = record_episode(episode, rng, args, limit, policy)
            attempts += 1
            if not success and attempts >= 20 and len(demos) < 0.1 * attempts:
                return (
                    task_id,
                    f"task {task_id} ({task.instruction}): {len(demos)} of {attempts} attempts succeeded",
                )
        demos.append(arrays)
    part = demo_path(args.out, args.suite, task.name, bool(args.policy)).with_suffix(f".part{share:04d}")
    write_demos(part, demos, args.action_repeat, task.instruction, **task_attributes(task))
    return task_id, (str(part), attempts, task.name)


@main_guard
def main(args):
    from experts import covered_tasks
    from simulator.render import default_render
    from simulator.suites import check_task_ids, get_suite, instructions

    if args.check and args.policy:
        raise UserError(
            "--check plays the expert alone: leave --policy out, or evaluate the policy with eval.py"
        )
    if args.video and not args.check:
        raise UserError("--video films the expert on the test states: give --check as well")
    task_ids = check_task_ids(args.suite, args.task_ids)
    covered, missing = covered_tasks(args.suite, task_ids)
    if missing:
        what = "; ".join(f"{', '.join(map(str, ids))} ({reason})" for reason, ids in missing.items())
        if args.task_ids or not covered:
            raise UserError(
                f"no scripted expert for {args.suite} task {what}; leave --task-ids out for those that have one"
            )
        print(f"no scripted expert for {args.suite} task {what}: left out", file=sys.stderr)
        task_ids = covered
    if not args.check or args.video:
        args.render = args.render or default_render()
        if args.policy:
            from models.checkpoints import resolve_checkpoint

            args.policy = str(resolve_checkpoint(args.policy))
            repeat = read_json(Path(args.policy) / "config.json").get("action_repeat", 1)
            if repeat != args.action_repeat:
                raise UserError(
                    f"{args.policy} acts every {repeat} control steps: give --action-repeat {repeat}"
                )
        try:
            (Path(args.out) / args.suite).mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise UserError(f"cannot write to {args.out}: {exc.strerror}; choose another --out") from exc
    workers = args.num_workers or cores()
    shares = min(workers, args.episodes_per_task if args.check else args.num_demos)
    # Neighbouring jobs are the same task's shares, so that all workers leave a task at about the same time.
    jobs = [(args, t, share, shares) for t in task_ids for share in range(shares)]
    results, total = {}, []
    os.environ["OMP_NUM_THREADS"], os.environ["LP_NUM_THREADS"] = "1", "0"  # Mesa draws in the calling thread
    bar = progress_bar(
        total=len(jobs), desc="expert on test states" if args.check else "recording", unit="part"
    )
    failed, names = {}, [get_suite(args.suite).get_task(t).name for t in task_ids]
    try:
        for task_id, result in run_jobs(_work, jobs, workers):
            results.setdefault(task_id, []).append(result)
            bar.update()
            if len(results[task_id]) < shares:
                continue
            if args.check:
                flat = [r for part in results[task_id] for r in part]
                total += flat
                tqdm.write(f"task {task_id}: {_rate(flat)}  {instructions(args.suite)[task_id]}")
            elif problems := [r for r in results[task_id] if isinstance(r, str)]:
                failed[task_id] = problems[0]
            else:
                parts = sorted(r[0] for r in results[task_id])
                attempts = sum(r[1] for r in results[task_id])
                path = demo_path(args.out, args.suite, results[task_id][0][2], args.policy is not None)
                merge_parts(parts, path)
                tqdm.write(
                    f"task {task_id}: {args.num_demos} demonstrations of {attempts} attempts -> {path}"
                )
    finally:  # no parts are left of a task that was interrupted, or on which the expert failed
        for name in [] if args.check else names:
            path = demo_path(args.out, args.suite, name, args.policy is not None)
            for part in path.parent.glob(f"{path.stem}.part*"):
                part.unlink(missing_ok=True)
    bar.close()
    if args.check:
        print(f"{args.suite}: {_rate(total)}")
    if failed:
        others = "; the others are recorded" if len(failed) < len(task_ids) else ""
        raise UserError(
            f"the expert fails on {args.suite} {'; '.join(failed.values())}{others}. Disturb it less: --noise 0.15 --kick 0.03"
        )


def _rate(results):
    """Successes of (success, steps) pairs with their 95 % interval, and the mean length of those that succeeded."""
    wins, n = sum(success for success, _ in results), len(results)
    if n == 0:
        return "no test states"
    low, high = wilson_interval(wins, n)
    steps = np.mean([t for success, t in results if success]) if wins else float("nan")
    return (
        f"{wins}/{n} = {100 * wins / n:.0f} % [{100 * low:.0f}, {100 * high:.0f}], {steps:.0f} control steps"
    )


if __name__ == "__main__":
    main(args)
