"""From recordings to a reward model (reward_model.py): pseudo labels to look at, own rollouts, training, scores.

    python -m scripts.rprm label --demos data/libero_object --plot out/labels    look at the labels first
    python -m scripts.rprm record --policy <sft> --out data/rollouts             the policy's own successes and failures
    python -m scripts.rprm train --demos ... --policy <sft> --out <rprm>         the model, with held-out metrics
    python -m scripts.rprm score --demos ... --rprm <rprm> --plot out/scores     scores of recorded trajectories
    python -m bench rprm --rprm <rprm> --policy <sft>                            is it safe to optimise? (simulator)

`scripts/start.sh SUITE` records and trains for a suite.
"""

# ruff: noqa: E402 (flags come before the slow imports, so that --help and a mistyped flag answer at once)

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from support.cli import flag, parse_command
from support.labels import IGNORED, POSITIVE, LabelRule, LabelSummary


@dataclass
class DataArgs(LabelRule):
    demos: Path = flag(Path("data/libero_object"), "HDF5 file in LIBERO's layout, or a directory of them")
    limit: int | None = flag(None, "at most this many trajectories of each file of --demos", min=1)
    skip: int = flag(
        0, "leave out so many at the start of each file of --demos, such as those trained on", min=0
    )


@dataclass
class LabelArgs(DataArgs):
    plot: Path | None = flag(None, "directory for one PNG per trajectory")


@dataclass
class RecordArgs:
    suite: str = flag("libero_object", "LIBERO suite to roll out on")
    policy: str | None = flag(None, "policy checkpoint that acts", default="checkpoints/SUITE/policy")
    out: Path = flag(Path("data/rollouts"), "directory; files go to OUT/success and OUT/failure, one a task")
    task_ids: list[int] | None = flag(None, "tasks, such as 0,1", min=0, default="all of the suite")
    episodes_per_task: int = flag(100, "episodes per task, from random placements", min=1)
    temperature: float | None = flag(
        None,
        "sampling temperature of the policy; higher gives more failures",
        default="the checkpoint's",
        min=0.0,
    )
    num_workers: int = flag(0, "processes, a task at a time each; 0 = one per core, one on a GPU", min=0)
    device: str = flag("cpu", "where the model runs", choices=("cpu", "cuda"))
    seed: int = flag(1, "seed of placements and sampling; take another one to measure", min=0, max=2**32 - 1)


@dataclass
class TrainArgs(DataArgs):
    suite: str = flag("libero_object", "suite whose action statistics the policy's checkpoint is read with")
    policy: str | None = flag(
        None, "SFT checkpoint to start from, or a hub id", default="checkpoints/SUITE/policy"
    )
    vlm: str | None = flag(None, "instead: a VLM of transformers, by LoRA; --policy gives action statistics")
    out: Path = flag(Path("runs/rprm"), "directory for the reward model")
    successes: Path | None = flag(None, "the same of the policy's own successes, used like demonstrations")
    failures: Path | None = flag(None, "HDF5 file or directory of failed trajectories: hard negatives")
    epochs: int = flag(2, "most passes over the training rows; the learning rate falls to 0", min=1)
    patience: int = flag(1, "stop after this many epochs without a better held-out loss", min=1)
    batch_size: int = flag(64, "rows per optimiser step", min=2)
    micro_batch_size: int | None = flag(
        None, "rows per backward pass", min=1, default="all; 4 with an adapter"
    )
    lr: float = flag(5e-4, "peak learning rate of AdamW (7B: 1e-5; with an adapter: 1e-4)", min=0.0)
    lora_rank: int | None = flag(
        None,
        "train an adapter of this rank, not all weights: for 7B",
        min=1,
        max=4096,
        default="off; 16 with --vlm",
    )
    action_dropout: float = flag(0.3, "share of rows shown without their action", min=0.0, max=1.0)
    held_out: float = flag(0.15, "share of trajectories kept for validation", min=0.01, max=0.9)
    whole_vocabulary: bool = flag(False, "Eq. 3 over all tokens, not over the two answers that are compared")
    device: str = flag("cpu", "where the model runs", choices=("cpu", "cuda"))
    seed: int = flag(0, "seed of the split and of the batches", min=0, max=2**32 - 1)


@dataclass
class ScoreArgs(DataArgs):
    suite: str = flag("libero_object", "suite whose action statistics the checkpoint is read with")
    rprm: str | None = flag(None, "reward model directory (--out of train, with --vlm or without)")
    vlm: str | None = flag(None, "instead: a stock VLM of transformers (hub id or directory)")
    plot: Path | None = flag(None, "directory for one PNG per trajectory, score included")
    json: Path | None = flag(None, "file for the scores of every step")
    device: str = flag("cpu", "where the model runs", choices=("cpu", "cuda"))


COMMANDS = {
    "label": (LabelArgs, "pseudo labels of demonstrations: counts, and a plot per trajectory"),
    "record": (RecordArgs, "the policy's own successes and failures, as more data for train"),
    "train": (TrainArgs, "fine-tune the imitation policy into a reward model"),
    "score": (ScoreArgs, "scores of recorded trajectories"),
}

if __name__ == "__main__":
    command, args = parse_command(COMMANDS, "RPRM: label, record, train, score")

import itertools
import json
import os

import numpy as np
import torch

from models.checkpoints import resolve_checkpoint
from models.vlm import VLM
from policy import OpenVLA, policy_convention
from reward_model import RPRM, embed_frames, fit, label_trajectory, make_examples, read_reward_model, split
from support.demonstrations import Refused, demo_files, demo_path, read_demos, write_demos
from support.errors import UserError, explain_out_of_memory, main_guard
from support.files import atomic_write, safe_name
from support.machine import cores
from support.metrics import auroc, binary_metrics, in_words, without_nan
from support.pool import run_jobs
from support.quiet import progress_bar
from support.training import make_directory


def read_trajectories(path, limit=None, success=True, skip=0):
    """Demonstrations or recorded rollouts of a file, or of all files in a directory, as dicts: those of `read_demos` plus
    `frames` (its `agentview`) and `success` as given."""
    refused, used = Refused(), 0
    for file in demo_files(path):
        demos = read_demos(file, refused=refused)
        for demo in itertools.islice(demos, skip, None if limit is None else skip + limit):
            if demo["ee_pos"] is None:
                refused.add(
                    f"{file} {demo['name']}", "neither obs/ee_pos nor obs/ee_states, which labels need"
                )
                continue
            used += 1
            more = {"frames": demo["agentview"], "success": success}
            yield {**demo, **more, "name": f"{Path(file).stem}_{demo['name']}"}
    if refused.reasons:
        refused.report(used)


def label(trajectory, rule):
    """`label_trajectory` for a dict of `read_trajectories`."""
    arrays = (trajectory[key] for key in ("actions", "ee_pos", "gripper_states", "action_repeat"))
    return label_trajectory(*arrays, rule, success=trajectory["success"], disturbed=trajectory["disturbed"])


def plot(directory, trajectory, result, scores=None):
    from support.trajectory_plot import plot_trajectory  # late: matplotlib takes a second to import

    path = directory / f"{safe_name(trajectory['name'])}.png"
    plot_trajectory(path, trajectory["frames"], result, trajectory["name"], scores)


def labelled(args, summary, successes=None, failures=None):
    """Yield (trajectory, `Labels`) of --demos, and of the other two where given. Counts into `summary`."""
    demos = (args.demos, args.limit, args.skip, True)
    for path, limit, skip, success in (demos, (successes, None, 0, True), (failures, None, 0, False)):
        for trajectory in read_trajectories(path, limit, success, skip) if path else ():
            result = label(trajectory, args)
            summary.add(result)
            yield trajectory, result


def run_label(args):
    summary = LabelSummary()
    for trajectory, result in labelled(args, summary):
        if args.plot:
            plot(args.plot, trajectory, result)
    print(summary)


def deciding(model, suite, temperature, seed):
    """The policy of an OpenVLA for `simulator.recording`: (frames, instruction) -> action tokens and actions (n, 7).
    temperature: None is the checkpoint's."""
    generator, unnorm_key = torch.Generator().manual_seed(seed), model.unnorm_key_for(suite)
    temperature = model.temperature_or_own(temperature)

    def decide(frames, instruction):
        input_ids, attention_mask = model.tokenize([instruction] * len(frames))
        how = dict(temperature=temperature, generator=generator, patch_embeddings=embed_frames(model, frames))
        tokens = model.generate_actions(input_ids, None, attention_mask, **how).tokens
        return tokens.cpu(), model.decode_actions(tokens, unnorm_key)

    return decide


def record_task(job):
    """Worker: play the episodes of one task and write them. (successes, episodes)"""
    from simulator.recording import runs_by_task  # late: LIBERO takes seconds to import

    args, task_id = job
    torch.set_num_threads(1)  # one process per core; and the same numbers, however many there are
    model = OpenVLA.from_pretrained(args.policy, device=args.device)
    decide = deciding(model, args.suite, args.temperature, args.seed + task_id)
    how = (args.episodes_per_task, model.action_repeat, args.seed, decide)
    for sim, _, runs in runs_by_task(args.suite, [task_id], *how):
        write_runs(args.out, sim, runs, model.action_repeat)
    return sum(run["success"] for run in runs), len(runs)


def run_record(args):
    from simulator.suites import check_task_ids

    task_ids = check_task_ids(args.suite, args.task_ids)
    resolve_checkpoint(args.policy)  # refused here, not in a worker
    if there := [args.out / kind for kind in ("success", "failure") if any((args.out / kind).glob("*.hdf5"))]:
        raise UserError(f"{there[0]} already holds recordings: choose another --out")
    make_directory(args.out)
    workers = args.num_workers or (1 if args.device == "cuda" else cores())
    os.environ["LP_NUM_THREADS"] = "0"  # Mesa draws in the calling thread
    jobs = run_jobs(record_task, [(args, task_id) for task_id in task_ids], workers)
    counts = list(progress_bar(jobs, total=len(task_ids), desc="rolling out", unit="task"))
    won, total = map(sum, zip(*counts, strict=True))
    print(f"{won} successes and {total - won} failures in {args.out}")


def write_runs(directory, sim, runs, action_repeat):
    """Write runs in LIBERO's layout: <directory>/success and <directory>/failure, in each one file a task."""
    from simulator.recording import as_demonstration

    for kind, success in (("success", True), ("failure", False)):
        if found := [as_demonstration(run) for run in runs if run["success"] == success]:
            path = demo_path(directory, kind, sim.name)  # not the instruction: tasks of libero_90 share those
            write_demos(path, found, action_repeat, sim.instruction, suite=sim.suite, task_id=sim.task_id)


def run_train(args):
    make_directory(Path(args.out))
    torch.manual_seed(args.seed)  # of an adapter's first weights
    adapter = args.lora_rank is not None or args.vlm is not None
    dtype = torch.bfloat16 if adapter and args.device == "cuda" else torch.float32  # of frozen weights
    if args.vlm:
        policy = OpenVLA.from_pretrained(args.policy)
        statistics = policy.action_statistics(policy.unnorm_key_for(args.suite))
        reward_model = VLM.from_pretrained(args.vlm, dtype, args.device)
        reward_model.add_adapter(args.vlm, statistics, args.lora_rank or 16)
    else:
        reward_model = RPRM(OpenVLA.from_pretrained(args.policy, dtype, args.device), {})
        if adapter:
            reward_model.add_adapter(args.policy, args.lora_rank)

    summary = LabelSummary()
    trajectories = labelled(args, summary, args.successes, args.failures)
    bar = progress_bar(trajectories, desc="label and embed", unit="trajectory")
    examples = make_examples(reward_model, bar, args.suite, summary)
    print(summary)
    held_out = split(examples, args.held_out, args.seed)
    names = ("epochs", "batch_size", "lr", "patience", "action_dropout", "whole_vocabulary", "seed")
    options = {name: getattr(args, name) for name in names}
    best, history = fit(
        reward_model, examples.select(~held_out), examples.select(held_out), **options,
        micro_batch_size=args.micro_batch_size or (4 if adapter else None),
    )  # fmt: skip
    # A keyframe is where the hand stops, so a small command alone gives some labels away. More than that has to be seen.
    moves = reward_model.decode_actions(examples.actions[held_out], args.suite)[:, :3]
    shortcut = auroc(-np.linalg.norm(moves, axis=1), examples.labels[held_out].numpy())
    best = {**best, "auroc_small_command": shortcut}
    info = {
        "label_rule": {f.name: getattr(args, f.name) for f in dataclasses.fields(LabelRule)}, "labels": str(summary), "suite": args.suite, "policy": str(args.policy),
        "data": {name: str(getattr(args, name)) for name in ("demos", "successes", "failures") if getattr(args, name)},
        "train_rows": int((~held_out).sum()), "training": options, "held_out": best, "history": history,
    }  # fmt: skip
    reward_model.save(args.out, without_nan(info))
    print(
        f"held out ({best['rows']} rows, epoch {best['epoch']}): {in_words(best)}\nfor comparison, AUROC of the "
        f"image without the action {best['auroc_state_only']:.3f}, of a small command alone {shortcut:.3f}\n"
        f"saved {args.out}"
    )


def run_score(args):
    from simulator.sentences import sentence_of  # late, as above

    if (args.rprm is None) == (args.vlm is None):
        raise UserError("give one of --rprm and --vlm")
    summary, records = LabelSummary(), []
    reward_model = read_reward_model(args.vlm or args.rprm, device=args.device)
    for trajectory, result in progress_bar(labelled(args, summary), desc="score", unit="trajectory"):
        actions = reward_model.encode_actions(policy_convention(trajectory["actions"]), args.suite)
        sentence = sentence_of(args.suite, trajectory["file"], trajectory["instruction"])
        instructions = [sentence] * len(trajectory["frames"])
        scores = reward_model.score_frames(trajectory["frames"], instructions, actions)
        labels = result.labels if result.usable else np.full_like(result.labels, IGNORED)
        records.append({"name": trajectory["name"], "labels": labels.tolist(), "scores": scores.tolist()})
        if args.plot:
            plot(args.plot, trajectory, result, scores)
    if not records:
        raise UserError(f"{args.demos}: no trajectory after the first {args.skip} of each file: lower --skip")
    scores, labels = (np.concatenate([r[key] for r in records]) for key in ("scores", "labels"))
    scores, labels = scores[labels != IGNORED], labels[labels != IGNORED] == POSITIVE
    print(summary)
    print(f"against the pseudo labels ({len(labels)} rows): {in_words(binary_metrics(scores, labels))}")
    if args.json:
        atomic_write(args.json, json.dumps(records))


@main_guard
def main(command, args):
    run = {"label": run_label, "record": run_record, "train": run_train, "score": run_score}[command]
    if "policy" in vars(args):
        args.policy = args.policy or f"checkpoints/{args.suite}/policy"
    if getattr(args, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    with explain_out_of_memory("use --device cpu, or a lower --batch-size or --micro-batch-size for train"):
        run(args)


if __name__ == "__main__":
    main(command, args)
