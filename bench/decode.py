"""Decoding: seven action tokens for a batch of observations, against transformers' `generate` on the same weights.

    python -m bench decode

The variants are checked to choose the same tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from bench.common import TINY_POLICY, rates, ratio, table
from bench.model import choose_device, device_flag, generate, load, observations, transformers_llama, turns
from support.cli import flag


@dataclass
class Args:
    model: str = flag(str(TINY_POLICY), "checkpoint directory or hub id", default="openvla-tiny")
    device: str = device_flag()
    batch: int = flag(10, "observations, each with its own prompt", min=1)
    rounds: int = flag(10, "turns of each variant; medians are reported", min=1)
    out: Path = flag(Path("runs/bench-decode.json"), "where the numbers go")


ONE, BATCHED, OURS = "transformers, one at a time", "transformers, batched", "here, batched"


def compare(model, batch, rounds, device):
    """Actions per second of one model in five ways, vision included, preprocessing not.

    `transformers, one at a time` is how the official code acts: for each observation the towers, then `generate` over
    the whole vocabulary with a cache. (The official version also computes the logits of all 256 patches; the one
    measured here no longer does.) `transformers, batched` is the same `generate` on the whole batch.
    """
    llama = transformers_llama(model)
    ids, mask, pixels = observations(model, batch)
    rows = [
        (ids[i : i + 1, : int(mask[i].sum())], mask[i : i + 1, : int(mask[i].sum())], pixels[i : i + 1])
        for i in range(batch)
    ]
    tokens = model.generate_actions(ids, pixels, mask, temperature=0.0, whole_vocabulary=True).tokens
    greedy = {
        ONE: torch.cat([generate(model, llama, *row, greedy=True) for row in rows]),
        BATCHED: generate(model, llama, ids, mask, pixels, greedy=True),
    }
    generator = torch.Generator().manual_seed(0)

    def act(ids, mask, pixels, **how):
        return model.generate_actions(ids, pixels, mask, temperature=1.0, generator=generator, **how)

    variants = {
        ONE: lambda: [generate(model, llama, *row) for row in rows],
        BATCHED: lambda: generate(model, llama, ids, mask, pixels),
        "here, one at a time": lambda: [act(*row) for row in rows],
        "here, batched, whole vocabulary": lambda: act(ids, mask, pixels, whole_vocabulary=True),
        OURS: lambda: act(ids, mask, pixels),
    }
    with torch.no_grad():
        seconds = turns(variants, rounds, device)
    return dict(
        batch=batch,
        rates=rates(seconds, batch),
        ratio_to_one=ratio(seconds, ONE, OURS),
        ratio_to_batched=ratio(seconds, BATCHED, OURS),
        # Greedy, whole vocabulary: share of tokens that agree (1.0 in float32; bfloat16 rounds apart).
        same_tokens={name: float((tokens == theirs).float().mean()) for name, theirs in greedy.items()},
    )


def measure(args):
    device, dtype, name = choose_device(args.device)
    model = load(args.model, device, dtype)
    return dict(
        model=args.model,
        device=name,
        dtype=str(dtype),
        **compare(model, args.batch, args.rounds, device),
    )


def show(r):
    print(f"\n{r['model']}, {r['device']}, {r['dtype']}, batch of {r['batch']}")
    rows = [(name, *rate.values()) for name, rate in r["rates"].items()]
    table(["", "actions/s:.1f", "lowest:.1f", "highest:.1f"], rows)
    same = ", ".join(f"{name}: {100 * share:.0f} %" for name, share in r["same_tokens"].items())
    print(
        f"{OURS} = {r['ratio_to_one']:.2f} x one at a time, {r['ratio_to_batched']:.2f} x transformers' batch "
        f"(medians over rounds)\nsame greedy tokens as {same}"
    )
