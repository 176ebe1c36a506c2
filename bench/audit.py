"""The training process of `python -m bench soak`: train.py as it is, with two counters around what a decision passes through.

    python -m bench.audit REPORT.json --suite libero_object ...        # the rest are train.py's flags

The environments tell how many control steps each episode has. A decision must add `action_repeat` to that number; where the
episode ended it may add less, and where the worker died nothing. So a decision that was carried out twice, or never, shows.
And each (step, environment) of the rollout buffer must have been written once, in order, before the advantages are computed.
"""

import json
import sys
from collections import Counter

import numpy as np

import train
from envs import LiberoVecEnv
from ppo import RolloutBuffer
from support.cli import parse_args
from support.files import atomic_write


def audit_training(report):
    count, lengths, written = Counter(lost=0), {}, {}
    step, store, finish = LiberoVecEnv.step, RolloutBuffer.store_outcome, RolloutBuffer.compute_advantages

    def audited_step(self, actions):
        obs, reward, terminated, truncated, info = step(self, actions)
        # control steps of each environment's episode
        so_far = lengths.setdefault("now", np.zeros(self.num_envs, int))
        after = info["episode_length"]
        ended, cut, grown = terminated | truncated, info["worker_restarted"], after - so_far
        full = self.action_repeat
        fine = (grown == full) | (ended & (0 < grown) & (grown < full)) | (cut & (grown == 0))
        so_far[:] = np.where(ended, 0, after)
        count.update(decisions=len(fine), lost=int((~fine).sum()), cut=int(cut.sum()), ended=int(ended.sum()))
        lengths["workers"] = self.worker_pids
        return obs, reward, terminated, truncated, info

    def audited_store(self, t, *rest, **named):
        times = written.setdefault("now", np.zeros((self.num_steps, self.num_envs), int))
        count["lost"] += int((times[:t] != 1).sum())  # not in order
        times[t] += 1
        return store(self, t, *rest, **named)

    def audited_finish(self, *rest):
        times = written.pop("now")
        count.update(stored=int(times.sum()), lost=int((times != 1).sum()), updates=1)
        atomic_write(report, json.dumps({**count, "workers": lengths["workers"]}))
        return finish(self, *rest)

    LiberoVecEnv.step = audited_step
    RolloutBuffer.store_outcome, RolloutBuffer.compute_advantages = audited_store, audited_finish
    train.main(parse_args(train.Args, train.__doc__))


if __name__ == "__main__":
    audit_training(sys.argv.pop(1))
