"""Does a policy do what it is told, or what the scene suggests?

    python -m bench sentence --suite libero_object --told 1,0,5,4,7,3,9,6,2,8

Plays the evaluation protocol, but task t is told the sentence of task told[t], in the stock suite's words. A policy that does not
listen keeps its success. On a LIBERO-PRO suite with another goal (`libero_object_task`: the same scenes, to be fetched is another
thing in them) the same list tells the right goal, in words that the policy has met: what is missing then is not the wording.

The file has the layout of eval.py's results.json, so that `support.compare` reads it.
"""

from dataclasses import dataclass
from pathlib import Path

from bench.common import TINY_POLICY, table
from support.cli import flag
from support.errors import UserError


@dataclass
class Args:
    checkpoint: str = flag(str(TINY_POLICY), "policy", default="openvla-tiny")
    suite: str = flag("libero_object", "LIBERO suite, or a LIBERO-PRO variant of one")
    told: list[int] | None = flag(
        None, "for every task of the suite, the task whose sentence it is told", default="1,2,…,0", min=0
    )
    task_ids: list[int] | None = flag(None, "tasks, as in 0,1,2", default="all of the suite", min=0)
    episodes_per_task: int = flag(20, "initial states 0 to N-1 of each task", min=1, max=50)
    num_envs: int = flag(16, "episodes that run at the same time", min=1)
    seed: int = flag(0, "of sampling, at the checkpoint's own temperature", min=0)
    video: int = flag(0, "episodes of each task to record as mp4, beside --out", min=0, max=50)
    out: Path = flag(Path("runs/bench-sentence.json"), "where the numbers go")


def sentences_told(suite, told=None):
    """What each task of `suite` is told: the stock sentence of task told[t] (default: of the next task).

    Raises UserError where `told` is not one task for each task of the suite.
    """
    from simulator.suites import base_suite, check_task_ids, instructions, num_tasks

    n = num_tasks(suite)
    told = [(t + 1) % n for t in range(n)] if told is None else told
    if len(told) != n:
        raise UserError(f"--told: {len(told)} numbers, but {suite} has {n} tasks")
    check_task_ids(suite, sorted(set(told)))
    stock = instructions(base_suite(suite))
    return [stock[task_id] for task_id in told]


def measure(args):
    from eval import evaluate
    from policy import OpenVLA
    from simulator.render import default_render

    sentences = sentences_told(args.suite, args.told)
    model = OpenVLA.from_pretrained(args.checkpoint).eval()
    render = default_render()  # as eval.py
    result = evaluate(
        model, args.suite, args.task_ids, args.episodes_per_task, args.num_envs, seed=args.seed, video=args.video,
        video_dir=args.out.parent / "videos", sentences=sentences, render=render,
    )  # fmt: skip
    settings = {
        "suite": args.suite,
        "temperature": model.temperature_or_own(None),
        "seed": args.seed,
        "render": render,
    }
    return {"checkpoint": args.checkpoint, "settings": settings, "told": sentences, **result.to_dict()}


def show(results):
    rows = [
        (r["instruction"], results["told"][r["task_id"]], r["successes"], r["episodes"], 100 * r["success_rate"])
        for r in results["tasks"]
    ]  # fmt: skip
    total = results["total"]
    rows.append(
        (total["instruction"], "", total["successes"], total["episodes"], 100 * total["success_rate"])
    )
    table(["goal of the task", "told", "successes", "episodes", "%:.1f"], rows)
