"""LIBERO's HDF5 files of demonstrations, read and written.

The layout is LIBERO's own, so that official files and ours are read by the same code, and LIBERO's and robomimic's tools read ours:

    data                     attributes env_name, env_args, problem_info, bddl_file_name, macros_image_convention, ...
    data/demo_0              attributes num_samples, model_file (the scene's XML), init_state
    data/demo_0/actions      (T, 7) what was executed: replayed from init_state, it succeeds; gripper -1 open, +1 close
    data/demo_0/clean_actions  (T, 7) only in recordings: the labels to learn from; `read_demos` gives these
    data/demo_0/obs/...      agentview_rgb (T, H, W, 3) uint8 as OpenGL renders it, upside down; ee_pos, gripper_states, ...

One row is one decision; `action_repeat` says how many control steps it lasts (official files: 1).
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import h5py
import numpy as np

from support.errors import UserError
from support.files import atomic_write, safe_name

OBSERVATIONS = ("agentview_rgb", "ee_pos", "ee_ori", "ee_states", "gripper_states", "joint_states")
ROUNDING = 1e-4  # a stored command may exceed 1 by so much
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
        except Exception as exc:
            # h5py raises nearly every kind for damaged bytes; whichever it is gets printed.
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


def read_demos(path, images=True, refused=None):
    """Yield the demonstrations of one HDF5 file as dicts of arrays, one at a time.

    Keys: actions (T, 7) float64, what to learn, gripper -1 open / +1 close; executed (T, 7), what the robot did; disturbed (bool):
    whether the file keeps both apart; agentview (T, H, W, 3) uint8 upright (with `images`); ee_pos (T, 3) m, gripper_states
    (T, 2) m, states (T, S), instruction (str), what the file calls its task (`simulator.sentences.sentence_of` turns it into the
    suite's sentence): None where the file has none; action_repeat (int); name (str); file (str). Official files, files without attributes
    (`*_no_noops`) and older ones of ours (`actions` clean, `executed_actions` beside) all work.

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
            facts.update(instruction=_instruction(data), file=str(path))
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


def _instruction(data):
    """What a file says of its task, in any wrapping; None where it says nothing."""
    try:
        text = json.loads(_text(data.attrs["problem_info"]))["language_instruction"]
    except (KeyError, ValueError, TypeError):
        return None
    if isinstance(text, list):  # of words, or of letters
        text = ("" if all(len(str(word)) == 1 for word in text) else " ").join(map(str, text))
    return " ".join(text.replace('"', " ").split()) if isinstance(text, str) else None


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


def demo_path(out, suite, name, policy=False):
    """<out>/<suite>/<name>_demo.hdf5; LIBERO's files carry the task's name. With a policy <name>_policy_demo.hdf5, so that both
    kinds may lie in one directory."""
    return Path(out) / suite / f"{safe_name(name)}{'_policy' * policy}_demo.hdf5"


def write_demos(path, demos, action_repeat, instruction, **attributes):
    """Write demonstrations (dicts of arrays, see `demos.record_episode`) in LIBERO's layout, atomically."""
    with _whole_file(path) as f:
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


def merge_parts(parts, path):
    """Join part files into one demonstration file by HDF5 copies, renumbering the demonstrations."""
    with _whole_file(path) as out:
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
    for part in parts:
        Path(part).unlink()


@contextlib.contextmanager
def _whole_file(path):
    """A new HDF5 file, to be filled. It is built in memory and written at once: on a full disk HDF5 ends in a segmentation fault."""
    content = io.BytesIO()
    with h5py.File(content, "w") as f:
        yield f
    atomic_write(path, content.getbuffer())
