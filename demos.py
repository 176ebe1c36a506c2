"""Demonstrations: LIBERO's HDF5 files, read and written, and recordings of the scripted experts (experts/).

Imitation needs data, and LIBERO's demonstrations live on a hub. The experts stand in for the human. Noise disturbs what is
*executed*, so that the data hold recoveries; the label of a row stays the clean command for the state that was reached (DART,
arXiv 1703.09327). Start states are LIBERO's random placements, never the 50 test states. With `--policy` a trained policy acts
for stretches of an episode and the expert, who still labels every state, for the others (DAgger, arXiv 1011.0686): where that
policy strays to, the next one has seen what to do.

File layout: LIBERO's own, so that official files and ours are read by the same code, and LIBERO's and robomimic's tools read ours:

    data                     attributes env_name, env_args, problem_info, bddl_file_name, macros_image_convention, ...
    data/demo_0              attributes num_samples, model_file (the scene's XML), init_state
    data/demo_0/actions      (T, 7) what was executed: replayed from init_state, it succeeds; gripper -1 open, +1 close
    data/demo_0/clean_actions  (T, 7) only in recordings: the labels to learn from; `read_demos` gives these
    data/demo_0/obs/...      agentview_rgb (T, H, W, 3) uint8 as OpenGL renders it, upside down; ee_pos, gripper_states, ...

One row is one decision; `action_repeat` says how many control steps it lasts (official files: 1).

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
    action_repeat: int = flag(4, "control steps per recorded decision (openvla-tiny acts every 4)", min=1)
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


if __name__ == "__main__":
    args = parse_args(
        Args, "Record scripted demonstrations in LIBERO's HDF5 layout, or check the scripted experts."
    )

import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import h5py
import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from support.errors import UserError, main_guard
from support.files import read_json, safe_name
from support.machine import cores
from support.pool import run_jobs
from support.quiet import progress_bar
from support.statistics import wilson_interval

CHECKED_STATES = 50  # LIBERO's test states per task; LIBERO-PRO's suites have 10
OBSERVATIONS = ("agentview_rgb", "ee_pos", "ee_ori", "ee_states", "gripper_states", "joint_states")
ROUNDING = 1e-4  # a stored command may exceed 1 by so much
STRETCH = 10  # decisions, the mean, before expert and policy change places (--policy)
IMAGE_CONVENTIONS = ("opengl", "opencv")


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------


class Refused:
    """What was left out of some demonstrations, and why: `add` each, `report` prints one line."""

    def __init__(self):
        self.reasons = {}  # reason -> places

    def add(self, place, reason):
        self.reasons.setdefault(str(reason), []).append(str(place))

    def report(self, used):
        """One line on stderr about what was left out; UserError where nothing is left."""
        groups = [f"{places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}: {reason}"
                  for reason, places in self.reasons.items()]  # fmt: skip
        count = sum(map(len, self.reasons.values()))
        if not used:
            raise UserError(f"no demonstration can be used; {'; '.join(groups) or 'none was found'}")
        if count:
            print(
                f"warning: {used} demonstrations used, {count} left out: {'; '.join(groups)}", file=sys.stderr
            )


def demo_files(path, action_repeat=None):
    """The demonstration files behind a file or directory name, sorted: those that open and hold what training needs.

    All are looked at, without their images, before the first is loaded. action_repeat: how many control steps a model's decision
    lasts; a file whose rows do not divide that is refused. UserError where no file is left, a line on stderr for each left out.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*_demo.hdf5")) if path.is_dir() else []
    if not files:
        raise UserError(
            f"no demonstrations at {path}: `python demos.py --suite libero_object --out data` records some"
        )
    good, problems = [], []
    for file in files:
        try:
            with h5py.File(file, "r") as f:
                repeat = _file_facts(f["data"])["action_repeat"]
                for name in (names := _demo_names(f["data"])):
                    f["data"][name]["actions"].shape  # noqa: B018  a KeyError where it is missing
            if not names:
                raise ValueError("it holds no demonstrations (no data/demo_* groups)")
        except (
            Exception
        ) as exc:  # h5py raises nearly every kind for damaged bytes; whichever it is gets printed
            problems.append(f"{file}: {exc}")
            continue
        if action_repeat is not None and action_repeat % repeat:
            raise UserError(
                f"{file} was recorded with {repeat} control steps per row, the model acts every {action_repeat}: "
                f"record again with `demos.py --action-repeat {action_repeat}`"
            )
        good.append(file)
    if not good:
        raise UserError(
            f"cannot read demonstrations from {problems[0]} (truncated, or not LIBERO's HDF5 layout?)"
        )
    for problem in problems:
        print(f"warning: left out {problem}", file=sys.stderr)
    return good


def read_demos(path, images=True, suite=None, refused=None):
    """Yield the demonstrations of one HDF5 file as dicts of arrays, one at a time.

    Keys: actions (T, 7) float64, what to learn, gripper -1 open / +1 close; executed (T, 7), what the robot did; disturbed (bool):
    whether those differ; agentview (T, H, W, 3) uint8 upright (with `images`); ee_pos (T, 3) m, gripper_states (T, 2) m, states
    (T, S): None where the file has none; instruction (str); action_repeat (int); name (str); file (str). Official files, files
    without attributes (`*_no_noops`) and older ones of ours (`actions` clean, `executed_actions` beside) all work.

    suite: the instruction is then that of the suite's task which the file belongs to, by its name or by what it says.
    refused: a `Refused` that takes note of demonstrations which are left out, for the caller's report. Without it they make one
    line at the end of the file, and a UserError where the file has no good one.
    Raises: UserError for a file that is missing or truncated.
    """
    path, found, own = Path(path), 0, refused is None
    refused = Refused() if own else refused
    try:
        with h5py.File(path, "r") as f:
            data = f["data"]
            facts = _file_facts(data)
            facts.update(instruction=_instruction(data, path, suite), file=str(path))
            for name in _demo_names(data):
                try:
                    demo = _read_demo(data[name], facts, images)
                except Exception as exc:  # as above
                    refused.add(f"{path} {name}", exc)
                    continue
                found += 1
                yield {**demo, **facts, "name": name}
    except UserError:
        raise
    except Exception as exc:
        raise UserError(
            f"cannot read demonstrations from {path}: {exc} (truncated, or not LIBERO's HDF5 layout?)"
        ) from exc
    if own:
        if not found and not refused.reasons:
            refused.add(path, "it holds no demonstrations (no data/demo_* groups)")
        refused.report(found)


def _demo_names(data):
    numbers = {name: name.split("_")[1] for name in data if name.startswith("demo_")}
    return sorted(numbers, key=lambda name: (int(numbers[name]) if numbers[name].isdigit() else 10**9, name))


def _file_facts(data):
    """What a file states about all its demonstrations: action_repeat, images, gripper. ValueError for what is not understood."""
    repeat = int(data.attrs.get("action_repeat", 1))
    if not 1 <= repeat <= 1000:
        raise ValueError(f"action_repeat is {repeat}")
    convention = _text(data.attrs.get("macros_image_convention", "opengl"))
    if convention not in IMAGE_CONVENTIONS:
        raise ValueError(
            f"macros_image_convention is {convention!r}, not one of {', '.join(IMAGE_CONVENTIONS)}"
        )
    return {"action_repeat": repeat, "image_convention": convention, "ours": "action_repeat" in data.attrs}


def _read_demo(group, facts, images):
    executed = _numbers(group["actions"], None, 7).astype(np.float64)  # (T, 7)
    actions, steps = executed, len(executed)
    if "clean_actions" in group:
        actions = _numbers(group["clean_actions"], steps, 7).astype(np.float64)
    elif "executed_actions" in group:  # recordings before 2026-11: `actions` were the clean ones
        executed = _numbers(group["executed_actions"], steps, 7).astype(np.float64)
    check_convention(actions, facts["ours"])
    obs = group["obs"] if "obs" in group else {}
    demo = {"actions": actions, "executed": executed, "disturbed": executed is not actions}
    ee = ("ee_pos", 3) if "ee_pos" in obs else ("ee_states", 6)
    for key, (name, width) in {"ee_pos": ee, "gripper_states": ("gripper_states", 2)}.items():
        demo[key] = _numbers(obs[name], None, width) if name in obs else None
    demo["ee_pos"] = None if demo["ee_pos"] is None else demo["ee_pos"][:, :3]
    demo["states"] = _numbers(group["states"], steps, None) if "states" in group else None
    if images:
        pictures = obs["agentview_rgb"]
        side = pictures.shape[1]
        if pictures.shape != (steps, side, side, 3) or pictures.dtype != np.uint8 or not 8 <= side <= 2048:
            raise ValueError(f"agentview_rgb is {pictures.dtype} {pictures.shape} beside {steps} actions")
        # OpenVLA sees LIBERO's pictures turned by 180 degrees; those of OpenCV's convention are mirrored top to bottom already.
        turned = np.asarray(pictures)[:, :: -1 if facts["image_convention"] == "opengl" else 1, ::-1]
        demo["agentview"] = np.ascontiguousarray(turned)
    return demo


def check_convention(actions, known=False):
    """ValueError, naming the column, for actions (T, 7) that are not LIBERO's: six deltas in [-1, 1], gripper -1 open, +1 close.

    Other ranges cannot be guessed: a gripper of 0 and 1, read as LIBERO's, would make every row "close". known: the file is one
    of ours, whose gripper may be closed all the time.
    """
    if not np.isfinite(actions).all():
        raise ValueError(f"actions column {int(np.argmin(np.isfinite(actions).all(0)))} is not finite")
    most = np.abs(actions).max(0)
    if (most > 1 + ROUNDING).any():
        column = int(np.argmax(most > 1 + ROUNDING))
        raise ValueError(f"actions column {column} reaches {most[column]:.4g}; LIBERO's stay within [-1, 1]")
    if not known and actions[:, 6].min() >= 0:
        raise ValueError(
            "actions column 6 (gripper) is never negative; LIBERO's is -1 for open and +1 for close"
        )


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


def _text(value):
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _instruction(data, path, suite):
    """The task's sentence: the suite's own for the task that this file belongs to, else what the file says, else its name."""
    from simulator import suites  # late: LIBERO takes seconds to import, and scripts check their files first
    from simulator.sentences import sentence_in

    try:
        text = json.loads(_text(data.attrs["problem_info"]))["language_instruction"]
        text = (
            text
            if isinstance(text, str)
            else ("" if all(len(word) == 1 for word in text) else " ").join(text)
        )
        text = " ".join(text.replace('"', " ").split())
    except (KeyError, ValueError, TypeError):
        text = suites.file_name_sentence(path.name)
    if suite is None or not suite.startswith(suites.SUITES):
        return text
    task = suites.task_of_file(suite, path)
    return sentence_in(suite, text) if task is None else suites.instructions(suite)[task]


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


def demo_path(out, suite, name, policy=False):
    """<out>/<suite>/<name>_demo.hdf5; LIBERO's files carry the task's name. With a policy <name>_policy_demo.hdf5, so that both
    kinds may lie in one directory."""
    return Path(out) / suite / f"{safe_name(name)}{'_policy' * policy}_demo.hdf5"


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


def write_demos(path, demos, action_repeat, instruction, **attributes):
    """Write demonstrations (dicts of arrays, see `record_episode`) in LIBERO's layout, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w") as f:
            data = f.create_group("data")
            data.attrs.update(
                action_repeat=action_repeat, num_demos=len(demos), total=int(sum(len(d["actions"]) for d in demos)),
                macros_image_convention="opengl", problem_info=json.dumps({"language_instruction": instruction}),
            )  # fmt: skip
            data.attrs.update(attributes)
            for i, demo in enumerate(demos):
                g = data.create_group(f"demo_{i}")
                g.attrs["num_samples"] = len(demo["actions"])
                if "model_file" in demo:
                    g.attrs["model_file"] = demo["model_file"]
                if "states" in demo:
                    g.attrs["init_state"] = demo["states"][0]
                done = np.zeros(len(demo["actions"]), np.uint8)
                done[-1] = 1
                for key, value in {"dones": done, "rewards": done, **demo}.items():
                    if key == "agentview_rgb":  # one chunk a frame; gzip 1 halves it for 4 ms
                        how = {"chunks": (1, *value.shape[1:]), "compression": "gzip", "compression_opts": 1}
                        g.create_dataset(f"obs/{key}", data=value, **how)
                    elif key != "model_file":
                        g.create_dataset(f"obs/{key}" if key in OBSERVATIONS else key, data=value)
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
                    data.attrs.update(f["data"].attrs)
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


# --------------------------------------------------------------------------------------------------------------------
# Recording
# --------------------------------------------------------------------------------------------------------------------


def record_episode(episode, rng, args, limit, policy=None):
    """One disturbed demonstration from a random placement: dict of arrays in LIBERO's layout, and whether it succeeded.

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


def check_expert(episode, init_state, action_repeat, limit):
    """Whether the undisturbed expert solves test state `init_state` within `limit` control steps, and in how many."""
    from experts import Expert

    episode.reset(init_state)
    expert = Expert(episode)
    for t in range(limit):
        if t % action_repeat == 0:
            command = expert.action()
        if episode.step(command):
            return True, t + 1
    return False, limit


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
    """What `record_episode` takes as its policy, sampling at temperature 1; None without --policy."""
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
        act(model, key, 1.0, False, frame[None], [sentence], [generator])[0], -1.0, 1.0
    )


def _work(job):
    """Worker: a share of one task's demonstrations, written to a part file, or of its test states. (task_id, what came of it):
    the part's name, attempts and the task's name, or a line (str) where the expert fails; for test states (success, steps)."""
    from simulator.suites import max_steps

    args, task_id, share, shares = job
    limit = max_steps(args.suite) * (2 if args.policy else 1)  # the expert has about half of the time then
    task = _task_sim(args.suite, task_id, "none" if args.check else args.render)
    episode = task.episode()
    if args.check:
        states = range(share, min(CHECKED_STATES, task.num_init_states), shares)
        return task_id, [check_expert(episode, i, args.action_repeat, limit) for i in states]
    rng = np.random.default_rng([args.seed, task_id, share])
    policy = _policy_of(args, task.instruction, rng)
    demos, attempts = [], 0
    quota = len(range(share, args.num_demos, shares))
    while len(demos) < quota:
        arrays, success = record_episode(episode, rng, args, limit, policy)
        attempts += 1
        if success:
            demos.append(arrays)
        elif attempts >= 20 and len(demos) < 0.1 * attempts:
            return (
                task_id,
                f"task {task_id} ({task.instruction}): {len(demos)} of {attempts} attempts succeeded",
            )
    part = demo_path(args.out, args.suite, task.name, policy is not None).with_suffix(f".part{share}")
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
    if not args.check:
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
    shares = min(workers, CHECKED_STATES if args.check else args.num_demos)
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
    low, high = wilson_interval(wins, n)
    steps = np.mean([t for success, t in results if success]) if wins else float("nan")
    return (
        f"{wins}/{n} = {100 * wins / n:.0f} % [{100 * low:.0f}, {100 * high:.0f}], {steps:.0f} control steps"
    )


if __name__ == "__main__":
    main(args)
