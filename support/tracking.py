"""Where a run's numbers can be watched: TensorBoard always, Weights & Biases with `--track`.

metrics.jsonl stays the source of truth; nothing is ever read back from here. The horizontal axis of both is *decisions*. What is
logged at step 0 is the start policy's evaluation; the final evaluation is logged at the last step.
"""

import json
import os
import sys
import threading

from support.errors import UserError
from support.files import atomic_write

RUN_ID = "wandb-run-id"  # file in the run directory: a resumed run goes on in the same plots


def _error_of_thread(args):
    """TensorBoard writes in a thread of its own. On a full disk its traceback would stand beside the run's one line."""
    if issubclass(args.exc_type, OSError):
        sys.stderr.write(f"warning: {args.exc_value}\n")  # one write: another thread's line may follow
    else:
        threading.__excepthook__(args)


threading.excepthook = _error_of_thread


class Tracker:
    """Logs to out/tensorboard and, with `track`, to Weights & Biases (an extra: `pip install wandb`).

    out: run directory (Path). config: settings, shown beside the curves. resume_step: decisions of the checkpoint that a
    resumed run goes on from. TensorBoard then hides what an earlier process logged after it. Weights & Biases cannot: there
    the iterations that are played again have two points each, in the same place where nothing was changed.
    """

    def __init__(self, out, config, track=False, resume_step=None):
        from torch.utils.tensorboard import SummaryWriter  # late: it takes a second that --help does not need

        purge = None if resume_step is None else resume_step + 1
        self._wandb = _wandb_run(out, config) if track else None
        self._board = SummaryWriter(out / "tensorboard", purge_step=purge)
        if resume_step is None:
            table = "".join(f"    {name}: {json.dumps(value)}\n" for name, value in config.items())
            self._board.add_text("config", table, 0)  # indented four spaces: Markdown's literal text

    def log(self, metrics, step):
        """metrics: {"group/name": number}; what is no number, or has no group, is left out. step: decisions so far."""
        numbers = {k: v for k, v in metrics.items() if "/" in k and isinstance(v, (int, float))}
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()
        if self._wandb:
            self._wandb.log({**numbers, "decisions": step})

    def close(self):
        self._board.close()
        if self._wandb:
            self._wandb.finish()


def _wandb_run(out, config):
    try:
        import wandb
    except ImportError:
        raise UserError("--track needs Weights & Biases, which is not installed: pip install wandb") from None

    path = out / RUN_ID
    known = path.read_text().strip() if path.exists() else None  # None: wandb makes one
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "vla-rl",
            name=out.name,
            id=known,
            resume="allow",
            dir=out,
            config=config,
        )
    except wandb.errors.Error as exc:  # no key, no network, a name that the server refuses
        reason = str(exc).strip().splitlines()[0]
        raise UserError(f"--track: {reason} (WANDB_MODE=offline needs neither account nor network)") from exc
    atomic_write(path, run.id)
    # Steps of its own would have to grow; decisions are the axis, so that a final evaluation may share the last step.
    run.define_metric("decisions", hidden=True)
    run.define_metric("*", step_metric="decisions")
    return run
