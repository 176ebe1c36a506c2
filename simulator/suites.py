"""LIBERO's suites: their tasks, what each task's sentence is, initial states and step limits.

One task has up to three sentences: that of its file's name, the `(:language ...)` in its BDDL file, and what recorded files say of
themselves, which LIBERO's script copies from the BDDL. They differ in every task of libero_object ("pick up the ..." and "pick the
...") and libero_spatial. LIBERO's benchmark, OpenVLA's data and published evaluations take the file name's, and so does
`instructions`, which everything here asks: simulator, environments, demonstrations, training, reward model.

The exception are LIBERO-PRO's suites about language (`_lan`: other words for the same goal, `_task`: another goal). They keep the
stock file names and change the sentence in the BDDL. So where the base suite has a BDDL file of the same name with another
sentence, the suite's own BDDL counts.
"""

import os
import re
from pathlib import Path

import libero.libero
import numpy as np
import yaml
from libero.libero import benchmark, get_libero_path

from support.errors import UserError

# Policy steps per episode in LIBERO's evaluation protocol (control steps at 20 Hz, the 10 settling steps not counted).
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}  # fmt: skip
SUITES = tuple(MAX_STEPS)


# --------------------------------------------------------------------------------------------------------------------
# Suites and tasks
# --------------------------------------------------------------------------------------------------------------------


def base_suite(suite):
    """The original suite behind a LIBERO-PRO perturbation (`libero_object_swap` -> `libero_object`)."""
    for name in SUITES:
        if suite == name or suite.startswith(name + "_"):
            return name
    names = ", ".join(SUITES)
    raise UserError(f"unknown suite {suite!r}: choose one of {names} (or a LIBERO-PRO variant of one)")


def max_steps(suite):
    """Step limit of the suite's evaluation protocol, in control steps."""
    return MAX_STEPS[base_suite(suite)]


def get_suite(suite):
    """LIBERO's benchmark object for a suite name. UserError for an unknown one, or where LIBERO's files are not there."""
    base_suite(suite)
    for kind in ("bddl_files", "init_states", "assets"):
        resource_dir(kind)
    known = benchmark.get_benchmark_dict()
    if suite not in known:
        raise UserError(f"unknown suite {suite!r}: choose one of {', '.join(sorted(known))}")
    return benchmark.get_benchmark(suite)()


def num_tasks(suite):
    return get_suite(suite).n_tasks


def check_task_ids(suite, task_ids):
    """Return `task_ids` (all tasks when None). UserError that names the valid range, or a task whose BDDL file is missing."""
    known = get_suite(suite)
    n = known.n_tasks
    task_ids = list(range(n)) if task_ids is None else list(task_ids)
    bad = [t for t in task_ids if not 0 <= t < n]
    if bad or not task_ids:
        which = bad[0] if bad else "(none)"
        raise UserError(f"task id {which} is not in {suite}: valid ids are 0 to {n - 1}")
    if len(set(task_ids)) < len(task_ids):
        raise UserError(f"task ids {','.join(map(str, task_ids))}: name each task once")
    for task_id in task_ids:
        _bddl_path(suite, task_id, known.get_task(task_id))
    return task_ids


# --------------------------------------------------------------------------------------------------------------------
# What a task's sentence is
# --------------------------------------------------------------------------------------------------------------------


def instructions(suite):
    """The sentence of every task of a suite, in task order: what a policy is told, and what demonstrations are labelled with."""
    base = base_suite(suite)
    sentences = []
    for task in get_suite(suite).tasks:
        own, stock = (_bddl_sentence(folder, task.bddl_file) for folder in (task.problem_folder, base))
        changed = suite != base and own is not None and stock is not None and own != stock
        sentences.append(own if changed else file_name_sentence(task.name))
    return sentences


def file_name_sentence(name):
    """`KITCHEN_SCENE3_turn_on_the_stove`, `pick_up_the_milk_demo.hdf5` ... -> the words after the scene, as a sentence."""
    stem = re.sub(r"(_demo)?(\.(hdf5|bddl))?$", "", Path(name).name)
    return re.sub(r"^.*SCENE\d+_", "", stem).replace("_", " ")


def _bddl_sentence(folder, file):
    """`(:language ...)` of a BDDL file, in lower case as LIBERO reads it; None without such a file."""
    path = resource_dir("bddl_files") / folder / file
    if not path.is_file():
        return None
    found = re.search(r"\(:language\s+([^()]*)\)", path.read_text(encoding="utf-8"))
    return " ".join(found[1].lower().split()) if found else None


def task_of_file(suite, path):
    """The task that a file of demonstrations belongs to by its name (`<task>_demo.hdf5`), or None."""
    stem = re.sub(r"(_demo)?\.hdf5$", "", Path(path).name)
    names = get_suite(suite).get_task_names()
    return names.index(stem) if stem in names else None


def task_of_sentence(suite, sentence):
    """The first task of `suite` that `sentence` can mean, or None.

    It may be the task's sentence, its BDDL's or its file name's: recorded files hold any of them. A few tasks of libero_90
    share a sentence; `task_of_file` tells those apart.
    """
    wanted = _words(sentence)
    tasks = get_suite(suite).tasks
    for sentences in (
        instructions(suite),
        [_bddl_sentence(task.problem_folder, task.bddl_file) for task in tasks],
        [file_name_sentence(task.name) for task in tasks],
    ):
        for task_id, known in enumerate(sentences):
            if known is not None and _words(known) == wanted:
                return task_id
    return None


def _words(sentence):
    return " ".join(sentence.lower().replace('"', " ").split()).rstrip(".")


# --------------------------------------------------------------------------------------------------------------------
# LIBERO's files
# --------------------------------------------------------------------------------------------------------------------


def resource_dir(kind):
    """LIBERO's directory of "bddl_files", "init_states" or "assets". UserError where it is not there."""
    try:
        path = Path(get_libero_path(kind))
    except (ValueError, AssertionError, OSError, yaml.YAMLError) as exc:
        raise UserError(f"cannot read LIBERO's paths from {_path_file()}: {exc}") from exc
    if not path.is_dir():
        raise UserError(f"LIBERO's {kind} are not at {path}{paths_come_from()}")
    return path


def _path_file():
    """The file that may set where LIBERO's resources are."""
    directory = os.environ.get("LIBERO_CONFIG_PATH") or libero.libero.libero_config_path
    return Path(directory).expanduser() / "config.yaml"


def paths_come_from():
    """The end of a message about a missing file: who says that it should be there."""
    file = _path_file()
    return f" ({file} sets that path; correct or remove it)" if file.is_file() else ""


def bddl_path(suite, task_id):
    """The BDDL file of a task. UserError where it is missing, as for a few suites of the package."""
    return _bddl_path(suite, task_id, get_suite(suite).get_task(task_id))


def _bddl_path(suite, task_id, task):
    path = resource_dir("bddl_files") / task.problem_folder / task.bddl_file
    if not path.is_file():
        raise UserError(f"{suite} task {task_id} has no BDDL file: {path} does not exist{paths_come_from()}")
    return path


def init_states(suite, task_id):
    """A task's stored initial states (n, 1 + nq + nv) float64: time, positions, velocities. n is 50 in the stock suites, 10 in
    several others, and 0 for a task that comes without any."""
    try:
        return get_suite(suite).get_task_init_states(task_id)
    except FileNotFoundError as exc:
        if paths_come_from():  # another LIBERO's files, which may have another format
            raise UserError(f"no initial states of {suite} task {task_id}: {exc}{paths_come_from()}") from exc
        return np.empty((0, 0))


def num_init_states(suite, task_id):
    """How many initial states a task has, without building it."""
    return len(init_states(suite, task_id))
