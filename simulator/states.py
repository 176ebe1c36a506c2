"""Saved environments (`LiberoVecEnv.get_state`) and their distribution over ranks: flat dicts of numpy arrays.

Keys are of three kinds: `sim_I`, the simulator's state of environment I; `settings`, `seed` and `curriculum_…`, the same for
all of them; everything else has one row per environment.
"""

import json

import numpy as np

# names in checkpoints from before November 2026
_OLD_NAMES = {"parked": "idle", "asked_next": "assigned_next"}


def current_names(state):
    """A state that an older version saved, with the names of today."""
    return {_OLD_NAMES.get(key, key): x for key, x in state.items()}


def pack_settings(settings):
    """A dict as an array of bytes, so that a state stays a dict of arrays."""
    return np.frombuffer(json.dumps(settings).encode(), np.uint8).copy()


def merge_states(states):
    """States of all ranks, in the order of their environments -> the state of one LiberoVecEnv with all of them."""
    merged, first = {}, 0
    for state in states:
        for key, x in state.items():
            if key.startswith("sim_"):
                merged[f"sim_{first + int(key[4:])}"] = x
            elif _is_common(key):
                merged[key] = x
            else:
                merged[key] = np.concatenate([merged[key], x]) if key in merged else x
        first += _num_envs(state)
    return _with_num_envs(merged, first)


def split_state(state, envs):
    """The part of a state that belongs to the consecutive environments `envs` (a range): inverse of `merge_states`."""
    part = {}
    for key, x in state.items():
        if key.startswith("sim_"):
            if int(key[4:]) in envs:
                part[f"sim_{int(key[4:]) - envs.start}"] = x
        else:
            part[key] = x if _is_common(key) else x[envs.start : envs.stop]
    return _with_num_envs(part, len(envs))


def _is_common(key):
    return key in ("settings", "seed") or key.startswith("curriculum_")


def _num_envs(state):
    return next(len(x) for key, x in state.items() if not (key.startswith("sim_") or _is_common(key)))


def _with_num_envs(state, num_envs):
    if "settings" in state:
        settings = json.loads(bytes(np.asarray(state["settings"]))) | {"num_envs": num_envs}
        state["settings"] = pack_settings(settings)
    return state
