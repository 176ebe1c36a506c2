"""Demonstrations: scripted experts on privileged poses, and LIBERO's HDF5 files.

Imitation needs data, and LIBERO's demonstrations live on a hub. The experts below stand in for the human: they read object
poses that only the simulator knows and steer the gripper with a proportional law, so that the stored images and actions look
like a demonstration's. Three properties make them learnable by a small policy that sees one frame and has no memory:

1. Reactive. The command is a function of the current state alone: no timers, no hidden phase. A frame decides the action.
2. Phases look different. The gripper comes down a funnel (its height target falls with the horizontal distance) and leaves on
   a slant towards the goal, so that no picture belongs both to "closing in" and to "carrying away".
3. Recoveries. Noise disturbs what is *executed*; the stored label stays the clean command for the state that was reached
   (DART, arXiv 1703.09327). Start states are LIBERO's random placements, never the 50 test states.

File layout: LIBERO's own (`data/demo_<i>/{actions,states,robot_states,rewards,dones,obs/*}`), so that official files and ours
are read by the same code. One row is one decision; `data.attrs["action_repeat"]` says how many control steps it lasts (1 in
official files). Actions are stored in LIBERO's convention (gripper -1 = open, +1 = close), images as rendered (upside down).

    python demos.py --suite libero_object --num-demos 50 --out data
    python demos.py --suite libero_object --check           # success of the undisturbed expert on the 50 test states
"""

import json
import multiprocessing
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import h5py
import numpy as np
from tqdm import tqdm

from experts import PickAndPlaceExpert, disturb
from support.cli import parse_args
from support.errors import UserError, main_guard
from support.files import safe_name
from support.machine import cores, die_with_parent
from support.quiet import progress_bar
from support.statistics import wilson_interval

MAX_DECISIONS = 70  # per recorded episode: 280 control steps, libero_object's limit


@dataclass
class Args:
    suite: str = field(default="libero_object", metadata={"help": "libero_object or libero_spatial"})
    task_ids: Optional[list[int]] = field(
        default=None, metadata={"help": "comma-separated task ids", "default": "all tasks", "min": 0}
    )
    num_demos: int = field(default=60, metadata={"help": "successful demonstrations to record per task"})
    out: str = field(
        default="data", metadata={"help": "directory; files go to <out>/<suite>/<task>_demo.hdf5"}
    )
    action_repeat: int = field(
        default=4, metadata={"help": "control steps per recorded decision (openvla-tiny acts every 4)"}
    )
    noise: float = field(
        default=0.25,
        metadata={"help": "std of the disturbance of executed translation commands; labels stay clean"},
    )
    kick: float = field(
        default=0.08,
        metadata={"help": "probability per decision of a large random push, a recovery to learn from"},
    )
    resolution: int = field(
        default=256, metadata={"help": "stored image side in pixels (official LIBERO files: 128)"}
    )
    render: Optional[str] = field(
        default=None,
        metadata={
            "help": "simplified or exact meshes",
            "default": "exact where a GPU renders, else light",
            "choices": ["light", "exact"],
        },
    )
    num_workers: int = field(default=0, metadata={"help": "processes; 0 = one per core", "min": 0})
    seed: int = field(
        default=0, metadata={"help": "seed of placements and disturbances", "min": 0, "max": 2**32 - 1}
    )
    check: bool = field(
        default=False,
        metadata={"help": "record nothing; report the undisturbed expert on the 50 test states"},
    )


# --------------------------------------------------------------------------------------------------------------------
# Recording
# --------------------------------------------------------------------------------------------------------------------


def record_episode(episode, suite, rng, args):
    """One disturbed demonstration from a random placement: dict of arrays in LIBERO's layout, and whether it succeeded."""
    from scipy.spatial.transform import Rotation

    episode.reset(None, rng)
    expert = PickAndPlaceExpert(episode, suite)
    stride = episode.sim.resolution // args.resolution
    rows = {
        k: []
        for k in (
            "actions",
            "executed_actions",
            "states",
            "robot_states",
            "agentview_rgb",
            "ee_pos",
            "ee_ori",
            "ee_states",
            "gripper_states",
            "joint_states",
        )
    }
    success = False
    for _ in range(MAX_DECISIONS * 4 // args.action_repeat):
        command = expert.action(episode)
        executed = disturb(command, rng, args.noise, args.kick)
        p, d = episode.privileged(), episode.data
        rotation = Rotation.from_matrix(p["eef_mat"])
        ori, quat = rotation.as_rotvec(), rotation.as_quat()
        frame = episode.render()[::-1, ::-1]  # LIBERO's files keep OpenGL's orientation, upside down
        rows["agentview_rgb"].append(frame[::stride, ::stride])
        for key, a in (("actions", command), ("executed_actions", executed)):
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
    return {k: np.stack(v) for k, v in rows.items()}, success


def check_expert(episode, suite, init_state, action_repeat, limit):
    """Whether the undisturbed expert solves test state `init_state` within `limit` control steps, and in how many."""
    episode.reset(init_state)
    expert = PickAndPlaceExpert(episode, suite)
    for t in range(limit):
        if t % action_repeat == 0:
            command = expert.action(episode)
        if episode.step(command):
            return True, t + 1
    return False, limit


_SIM = {}  # per process: the one task that is built at the moment


def _task_sim(suite, task_id, render, resolution=256):
    from simulator.task import TaskSim

    key = (suite, task_id, render, resolution)
    if key not in _SIM:
        for old in _SIM.values():
            old.close()
        _SIM.clear()
        _SIM[key] = TaskSim(suite, task_id, render=render, resolution=resolution)
    return _SIM[key]


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    die_with_parent()


def _work(job):
    """Worker: a share of one task's demonstrations (written to a part file) or of its test states."""
    args, task_id, share, shares = job
    from simulator.suites import max_steps

    if args.check:
        task = _task_sim(args.suite, task_id, "none")
        episode = task.episode()
        limit = max_steps(args.suite)
        return task_id, [
            check_expert(episode, args.suite, i, args.action_repeat, limit) for i in range(share, 50, shares)
        ]
    task = _task_sim(args.suite, task_id, args.render)
    episode = task.episode()
    rng = np.random.default_rng([args.seed, task_id, share])
    demos, attempts = [], 0
    quota = len(range(share, args.num_demos, shares))
    while len(demos) < quota:
        arrays, success = record_episode(episode, args.suite, rng, args)
        attempts += 1
        if success:
            demos.append(arrays)
        elif attempts >= 20 and len(demos) < 0.1 * attempts:
            raise UserError(
                f"the expert fails on {args.suite} task {task_id}: {len(demos)} of {attempts} attempts succeeded"
            )
    part = demo_path(args.out, args.suite, task.instruction).with_suffix(f".part{share}")
    write_demos(part, demos, args.action_repeat, task.instruction, suite=args.suite, task_id=task_id)
    return task_id, (str(part), attempts, task.instruction)


def demo_path(out, suite, name):
    return Path(out) / suite / f"{safe_name(name)}_demo.hdf5"


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------

_OBS = ("agentview_rgb", "ee_pos", "ee_ori", "ee_states", "gripper_states", "joint_states")


def write_demos(path, demos, action_repeat, instruction, **attributes):
    """Write demonstrations (dicts of arrays, see `record_episode`) in LIBERO's layout, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w") as f:
            data = f.create_group("data")
            data.attrs["action_repeat"] = action_repeat
            data.attrs["num_demos"] = len(demos)
            data.attrs["total"] = int(sum(len(d["actions"]) for d in demos))
            data.attrs["problem_info"] = json.dumps({"language_instruction": instruction})
            for key, value in attributes.items():
                data.attrs[key] = value
            for i, demo in enumerate(demos):
                g = data.create_group(f"demo_{i}")
                g.attrs["num_samples"] = len(demo["actions"])
                obs = g.create_group("obs")
                for key, value in demo.items():
                    if key in ("dones", "rewards"):
                        continue
                    where = obs if key in _OBS else g
                    if key == "agentview_rgb":  # one chunk a frame; gzip 1 halves it for 4 ms
                        where.create_dataset(
                            key,
                            data=value,
                            chunks=(1, *value.shape[1:]),
                            compression="gzip",
                            compression_opts=1,
                        )
                    else:
                        where.create_dataset(key, data=value)
                done = np.zeros(len(demo["actions"]), np.uint8)
                done[-1] = 1
                g.create_dataset("dones", data=demo.get("dones", done))
                g.create_dataset("rewards", data=demo.get("rewards", done))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def merge_parts(parts, path):
    """Join part files into one demonstration file by HDF5 copies, renumbering the demonstrations."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with h5py.File(temporary, "w") as out:
            data = out.create_group("data")
            count = total = 0
            for part in parts:
                with h5py.File(part, "r") as f:
                    for key, value in f["data"].attrs.items():
                        data.attrs[key] = value
                    total += int(f["data"].attrs["total"])
                    for i in range(int(f["data"].attrs["num_demos"])):
                        f.copy(f["data"][f"demo_{i}"], data, name=f"demo_{count}")
                        count += 1
            data.attrs["num_demos"], data.attrs["total"] = count, total
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for part in parts:
        Path(part).unlink()


def demo_files(path):
    """The demonstration files behind a file or directory name, sorted. UserError where there are none."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*_demo.hdf5")) if path.is_dir() else []
    if not files:
        raise UserError(
            f"no demonstrations at {path}: run `python demos.py --suite libero_object --out data` to record some"
        )
    return files


def read_demos(path, images=True):
    """Yield the demonstrations of one HDF5 file as dicts of arrays, one at a time.

    Keys: actions (T, 7) float64, gripper -1 open / +1 close; agentview (T, H, W, 3) uint8 upright (rotated by 180 degrees
    from the file); ee_pos (T, 3); gripper_states (T, 2); states (T, S) where stored; instruction (str); action_repeat (int);
    name (str); file (str). Works on official LIBERO files, which have no `action_repeat` (it is 1).
    Raises: UserError for a file that is missing, truncated, or of another layout.
    """
    path = Path(path)
    try:
        with h5py.File(path, "r") as f:
            data = f["data"]
            instruction = _instruction(data, path)
            action_repeat = int(data.attrs.get("action_repeat", 1))
            if not 1 <= action_repeat <= 1000:
                raise ValueError(f"action_repeat is {action_repeat}")
            names = sorted((n for n in data if n.startswith("demo_")), key=lambda n: int(n.split("_")[1]))
            if not names:
                raise UserError(f"{path} holds no demonstrations (no data/demo_* groups)")
            for name in names:
                g = data[name]
                obs = g["obs"]
                steps = len(_numbers(g["actions"], None, 7))
                # Positions and gripper are for the reward model's labels, which say themselves what they miss.
                ee_pos = (
                    _numbers(obs["ee_pos"], None, 3)
                    if "ee_pos" in obs
                    else _numbers(obs["ee_states"], None, 6)
                )
                gripper = _numbers(obs["gripper_states"], None, 2) if "gripper_states" in obs else None
                demo = dict(
                    actions=_numbers(g["actions"], steps, 7).astype(np.float64),
                    instruction=instruction,
                    action_repeat=action_repeat,
                    name=name,
                    file=str(path),
                    gripper_states=gripper,
                    ee_pos=ee_pos[:, :3],
                )
                if "states" in g:
                    demo["states"] = _numbers(g["states"], steps, None)
                if images:
                    pictures = obs["agentview_rgb"]
                    side = pictures.shape[1]
                    if (
                        pictures.shape != (steps, side, side, 3)
                        or pictures.dtype != np.uint8
                        or not 8 <= side <= 2048
                    ):
                        raise ValueError(
                            f"agentview_rgb is {pictures.dtype} {pictures.shape} beside {steps} actions"
                        )
                    demo["agentview"] = np.ascontiguousarray(np.asarray(pictures)[:, ::-1, ::-1])
                yield demo
    except UserError:
        raise
    except Exception as exc:  # h5py raises nearly every kind for damaged bytes; whichever it is gets printed
        raise UserError(
            f"cannot read demonstrations from {path}: {exc} (truncated, or not LIBERO's HDF5 layout?)"
        ) from exc


def _numbers(dataset, steps, width):
    """(steps, width) numbers of an HDF5 dataset, NaN included; None: any number of them. Raises ValueError."""
    rows, columns = dataset.shape  # an AttributeError or ValueError for what is no table
    if (
        dataset.dtype.kind not in "fiu"
        or steps not in (None, rows)
        or width not in (None, columns)
        or not rows
    ):
        wanted = f"({steps or 'T'}, {width or 'any'})"
        raise ValueError(f"{dataset.name} is {dataset.dtype} {dataset.shape}, expected {wanted}")
    return np.asarray(dataset)


def _instruction(data, path):
    """The task's instruction: from the file's attributes (as LIBERO stores it), else from the file's name."""
    try:
        text = json.loads(data.attrs["problem_info"])["language_instruction"]
        return text if isinstance(text, str) else "".join(text)
    except (KeyError, ValueError, TypeError):
        return path.name.removesuffix("_demo.hdf5").replace("_", " ")


@main_guard
def main():
    args = parse_args(
        Args, "Record scripted demonstrations in LIBERO's HDF5 layout, or check the scripted experts."
    )
    if args.num_demos < 1 or args.action_repeat < 1:
        raise UserError("--num-demos and --action-repeat must be at least 1")
    if args.resolution not in (64, 128, 256):
        raise UserError(f"--resolution {args.resolution}: choose 64, 128 or 256")
    if not args.suite.startswith(("libero_object", "libero_spatial")):
        raise UserError(f"no scripted expert for {args.suite!r}: they cover libero_object and libero_spatial")
    from simulator.render import default_render
    from simulator.suites import check_task_ids, instructions

    task_ids = check_task_ids(args.suite, args.task_ids)
    if not args.check:
        args.render = args.render or default_render()
        try:
            (Path(args.out) / args.suite).mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise UserError(f"cannot write to {args.out}: {exc.strerror}; choose another --out") from exc
    workers = args.num_workers or cores()
    shares = min(workers, 50 if args.check else args.num_demos)
    # Neighbouring jobs are the same task's shares, so that both workers leave a task at about the same time.
    jobs = [(args, t, share, shares) for t in task_ids for share in range(shares)]
    results = {}
    os.environ["OMP_NUM_THREADS"], os.environ["LP_NUM_THREADS"] = (
        "1",
        "0",
    )  # Mesa draws in the calling thread (envs.py)
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=_start_worker) as pool:
        bar = progress_bar(
            total=len(jobs), desc="expert on test states" if args.check else "recording", unit="part"
        )
        for task_id, result in pool.imap_unordered(_work, jobs):
            results.setdefault(task_id, []).append(result)
            bar.update()
            if len(results[task_id]) < shares:
                continue
            if args.check:
                flat = [r for part in results[task_id] for r in part]
                wins, n = sum(s for s, _ in flat), len(flat)
                low, high = wilson_interval(wins, n)
                steps = np.mean([t for s, t in flat if s]) if wins else float("nan")
                tqdm.write(
                    f"task {task_id}: {wins}/{n} = {100 * wins / n:.0f} % [{100 * low:.0f}, {100 * high:.0f}], "
                    f"{steps:.0f} control steps  {instructions(args.suite)[task_id]}"
                )
            else:
                parts = sorted(r[0] for r in results[task_id])
                attempts = sum(r[1] for r in results[task_id])
                path = demo_path(args.out, args.suite, results[task_id][0][2])
                merge_parts(parts, path)
                tqdm.write(
                    f"task {task_id}: {args.num_demos} demonstrations of {attempts} attempts -> {path}"
                )
        bar.close()


if __name__ == "__main__":
    main()
