"""The labels of recordings anew, by the present experts, from the recorded states: minutes where recording takes half an hour.

    python -m experts.relabel --data data/libero_spatial --out relabelled/libero_spatial

Pictures, states and what was executed stay; `clean_actions`, what a policy is to learn, becomes what the experts would do now.
So a change of an expert can be tried on what was recorded before it.
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

from support.cli import flag, parse_args


@dataclass
class Args:
    data: Path = flag(MISSING, "directory with recordings of demos.py")
    out: Path = flag(MISSING, "directory for the same files with new labels")


if __name__ == "__main__":  # before the imports that take seconds
    args = parse_args(
        Args, "The labels of recordings anew, by the present experts, from the recorded states."
    )

import os
import shutil
from xml.etree import ElementTree

import h5py
import mujoco
import numpy as np

from experts.expert import Expert
from simulator.task import TaskSim
from support.errors import UserError, main_guard
from support.machine import cores
from support.pool import run_jobs
from support.quiet import progress_bar


def place_fixtures(episode, model_file):
    """Put an `Episode`'s fixtures where its demonstration's scene (MuJoCo's XML, str) has them: they are in no state."""
    bodies = {body.get("name"): body for body in ElementTree.fromstring(model_file).iter("body")}
    model = episode.sim.model
    for row, body in enumerate(episode.sim.moved_bodies):
        found = bodies[model.body(int(body)).name]
        episode.body_pos[row] = [float(x) for x in found.get("pos").split()]
        episode.body_quat[row] = [float(x) for x in found.get("quat").split()]


def set_state(episode, state):
    """state: time, qpos, qvel, as LIBERO's files have them."""
    model, data = episode.sim.model, episode.data
    episode._activate()
    data.time, data.qpos[:], data.qvel[:] = state[0], state[1 : 1 + model.nq], state[1 + model.nq :]
    mujoco.mj_forward(model, data)


def relabel(episode, model_file, states):
    """The expert's commands (T, 7), in the files' convention (gripper -1 open, +1 close), in recorded states (T, S)."""
    place_fixtures(episode, model_file)
    set_state(episode, states[0])
    expert, commands = Expert(episode), []
    for state in states:
        set_state(episode, state)
        command = expert.action()
        commands.append(np.append(command[:6], -1.0 if command[6] > 0.5 else 1.0))
    return np.array(commands)


def _work(job):
    """One file. Returns (commands, how many of them changed)."""
    source, target = job
    temporary = target.with_name(target.name + ".tmp")
    count = changed = 0
    try:
        shutil.copyfile(source, temporary)
        with h5py.File(temporary, "r+") as f:
            data = f["data"]
            if not {"suite", "task_id"} <= set(data.attrs):
                raise UserError(f"{source} was not recorded by demos.py: its states cannot be restored")
            sim = TaskSim(data.attrs["suite"], int(data.attrs["task_id"]), "none")
            episode = sim.episode()
            for demo in data.values():
                new = relabel(episode, demo.attrs["model_file"], demo["states"][:])
                count += len(new)
                # Less is no change: commands depend on a pose that was one substep (2 ms) older when they were recorded.
                changed += int((np.abs(new - demo["clean_actions"][:]).max(axis=1) > 0.02).sum())
                demo["clean_actions"][...] = new
            sim.close()
        os.replace(temporary, target)
    except (OSError, KeyError) as exc:
        raise UserError(f"cannot label {source} anew: {exc}") from exc
    finally:
        temporary.unlink(missing_ok=True)
    return count, changed


@main_guard
def main(args):
    files = sorted(args.data.glob("*.hdf5"))
    if not files:
        raise UserError(f"no HDF5 files in {args.data}")
    if args.out.resolve() == args.data.resolve():
        raise UserError("--out is --data: the old labels would be lost; choose another directory")
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [(file, args.out / file.name) for file in files]
    bar = progress_bar(total=len(jobs), desc="labelling", unit="file")
    count = changed = 0
    for commands, different in run_jobs(_work, jobs, cores()):
        count, changed = count + commands, changed + different
        bar.update()
    bar.close()
    print(f"{changed:,} of {count:,} labels changed; {args.out}")


if __name__ == "__main__":
    main(args)
