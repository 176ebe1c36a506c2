"""Does a policy read from the first tokens of an action what the picture should tell it?

    python -m bench prefix --checkpoint checkpoints/libero_spatial/policy --suite libero_spatial

The expert plays test states. At each of its decisions the policy is asked for the third token, up or down, behind the
expert's own x and y, and behind x and y that are a few bins off. That is nearly the same motion (8 bins are 6 % of
half the range), so the answer should hardly change; where it does, a policy that samples x and y does something else
than was demonstrated. docs/imitation.md has the story (libero_spatial).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.common import TINY_POLICY, table
from support.cli import flag
from support.errors import UserError
from support.quiet import progress_bar

CHUNK = 64  # frames in one forward pass


@dataclass
class Args:
    checkpoint: str = flag(str(TINY_POLICY), "policy", default="openvla-tiny")
    suite: str = flag("libero_object", "LIBERO suite")
    task_ids: list[int] | None = flag(None, "tasks, as in 0,1,2", default="all of the suite", min=0)
    states: int = flag(3, "test states of each task", min=1, max=10)
    offsets: list[int] = flag((0, 1, -1, 2, -2, 4, -4, 8, -8), "bins that x and y are off", min=-255, max=255)
    out: Path = flag(Path("runs/bench-prefix.json"), "where the numbers go")


def expert_decisions(suite, task_ids, states, action_repeat):
    """What the undisturbed expert sees and does: frames (F, 256, 256, 3) uint8, commands (F, 7), instructions, and whether it
    lifts (F,): the hand holds something less than 2 cm above where the fingers closed, and the command goes up."""
    from experts import Expert, covered_tasks
    from simulator.suites import check_task_ids, max_steps
    from simulator.task import TaskSim

    task_ids, missing = covered_tasks(suite, check_task_ids(suite, task_ids))
    if missing:
        what = "; ".join(f"{', '.join(map(str, ids))} ({reason})" for reason, ids in missing.items())
        raise UserError(f"no scripted expert for {suite} task {what}: name the others with --task-ids")
    frames, commands, instructions, lifts = [], [], [], []
    for task_id in progress_bar(task_ids, desc="the expert plays", unit="task"):
        sim = TaskSim(suite, task_id, "light")
        episode = sim.episode()
        for state in range(states):
            episode.reset(state)
            expert, closed_at = Expert(episode), None
            for _ in range(max_steps(suite) // action_repeat):
                command = expert.action()
                height, gap = expert.scene.eef[2], expert.scene.gap
                if closed_at is None and command[6] == 0 and gap < 0.06:
                    closed_at = height
                lifts.append(closed_at is not None and command[2] > 0.1 and height < closed_at + 0.02)
                frames.append(episode.render())
                commands.append(command)
                instructions.append(sim.instruction)
                if any(episode.step(command) for _ in range(action_repeat)):
                    break
        sim.close()
    return np.stack(frames), np.stack(commands), instructions, np.array(lifts)


@torch.no_grad()
def z_probabilities(model, patches, instructions, bins, offset):
    """(F, 256) probabilities of the third token behind x and y that are `offset` bins off `bins` (F, 7).

    patches (F, P, d): the frames' patch embeddings.
    """
    bins = bins.clone()
    bins[:, :2] = (bins[:, :2] + offset).clamp(0, 255)
    tokens, (ids, mask) = model.action_tokenizer.bin_to_token(bins), model.tokenize(instructions)
    rows = torch.arange(len(bins)).split(CHUNK)
    logits = [
        model.action_logits(ids[r], mask[r], tokens[r], patch_embeddings=patches[r])[:, 2] for r in rows
    ]
    return torch.cat(logits).softmax(-1)


def measure(args):
    from policy import OpenVLA

    model = OpenVLA.from_pretrained(args.checkpoint)
    key = model.unnorm_key_for(args.suite)
    frames, commands, instructions, lifts = expert_decisions(
        args.suite, args.task_ids, args.states, model.action_repeat
    )
    tokens = torch.from_numpy(np.asarray(model.encode_actions(commands, key)))
    bins = model.action_tokenizer.token_to_bin(tokens)
    every = model.action_tokenizer.bin_to_token(torch.arange(256)[:, None].expand(-1, 7))
    going_up = torch.from_numpy(model.decode_actions(every, key)[:, 2] > 0.1)
    with torch.no_grad():
        chunks = [frames[i : i + CHUNK] for i in range(0, len(frames), CHUNK)]
        patches = torch.cat([model.embed_images(model.preprocess(chunk)) for chunk in chunks])
    rows, own = [], z_probabilities(model, patches, instructions, bins, 0)
    for offset in args.offsets:
        p = z_probabilities(model, patches, instructions, bins, offset) if offset else own
        change = 0.5 * (p - own).abs().sum(-1)  # total variation
        up = p[:, going_up].sum(-1)[torch.from_numpy(lifts)]
        rows.append({
            "offset": offset, "change": change.mean().item(), "changed": (change > 0.5).float().mean().item(),
            "up": up.mean().item() if len(up) else None,
        })  # fmt: skip
    return {
        "checkpoint": args.checkpoint,
        "suite": args.suite,
        "decisions": len(frames),
        "lifts": int(lifts.sum()),
        "rows": rows,
    }


def show(results):
    print(f"\n{results['decisions']} decisions of the expert, {results['lifts']} of them lifts")
    table(
        ["bins off", "mean change:.3f", "more than 0.5:.3f", "P(up) at lifts:.3f"],
        [(str(r["offset"]), r["change"], r["changed"], r["up"]) for r in results["rows"]],
    )
    print("\nchange: total variation of the third token's distribution; 0 equal, 1 nothing in common")
