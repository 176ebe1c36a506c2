"""A PPO update, against the one that transformers and peft make on the same weights.

    python -m bench update

The variants are checked to give the same log-probs (tests/bench/test_measurements.py).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from bench.common import TINY_POLICY, rates, ratio, table
from bench.model import choose_device, device_flag, load, observations, transformers_llama, turns
from policy import LORA_TARGETS, ActorCritic
from ppo import PPOConfig, RolloutBuffer, ppo_update
from support.cli import flag


@dataclass
class Args:
    model: str = flag(str(TINY_POLICY), "checkpoint directory or hub id", default="openvla-tiny")
    device: str = device_flag()
    samples: int = flag(128, "decisions per update, one mini-batch", min=2)
    micro_batch_sizes: list[int] = flag([128, 32, 8], "decisions per backward pass", min=1)
    rounds: int = flag(5, "turns of each variant; medians are reported", min=1)
    out: Path = flag(Path("runs/bench-update.json"), "where the numbers go")


PLAIN = "transformers + peft, all logits"


class PlainActorCritic:
    """PPO's actor-critic as one would put it together from transformers and peft: Llama's forward pass returns the
    logits of every position over the whole vocabulary, and pictures go through the towers each time. Same adapters."""

    def __init__(self, model, lora_rank, lora_alpha):
        suffixes = LORA_TARGETS["language"].split(".*", 1)[1]
        config = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=f".*{suffixes}")
        self.model = model
        self.llama = get_peft_model(transformers_llama(model), config, adapter_name="policy")
        self.llama.add_adapter("critic", config)
        self.head = torch.nn.Linear(model.text["hidden_size"], 1, device=model.device)

    def _parameters(self, adapter):
        return [p for name, p in self.llama.named_parameters() if f".{adapter}." in name]

    def policy_parameters(self):
        return self._parameters("policy")

    def critic_parameters(self):
        return [*self._parameters("critic"), *self.head.parameters()]

    def _sequence(self, input_ids, attention_mask, pixel_values):
        x = self.model.language_model.model.embed_tokens(input_ids)
        x = torch.cat((x[:, :1], self.model.embed_images(pixel_values), x[:, 1:]), dim=1)
        patches = attention_mask.new_ones(len(x), self.model.num_patches)
        mask, last = (
            torch.cat((patches, attention_mask), dim=1),
            self.model.num_patches + attention_mask.sum(1) - 1,
        )
        return x, mask, last

    def evaluate_actions(self, input_ids, attention_mask, action_tokens, pixel_values, temperature):
        self.llama.set_adapter("policy")
        n, steps = attention_mask.sum(1, keepdim=True), torch.arange(7, device=input_ids.device)
        ids = torch.nn.functional.pad(input_ids, (0, 7)).scatter(1, n + steps, action_tokens)
        mask = (torch.arange(ids.shape[1], device=ids.device) < n + 7).long()
        x, mask, _ = self._sequence(ids, mask, pixel_values)
        logits = self.llama(inputs_embeds=x, attention_mask=mask).logits  # (B, S, V)
        log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
        at = (self.model.num_patches + n - 1 + steps)[:, :, None].expand(-1, -1, log_p.shape[-1])
        log_p = log_p.gather(1, at)  # (B, 7, V)
        return log_p.gather(-1, action_tokens[:, :, None])[..., 0], -(log_p.exp() * log_p).sum(-1)

    def value(self, input_ids, attention_mask, pixel_values):
        self.llama.set_adapter("critic")
        x, mask, last = self._sequence(input_ids, attention_mask, pixel_values)
        states = self.llama.base_model.model.model(inputs_embeds=x, attention_mask=mask).last_hidden_state
        return self.head(states[torch.arange(len(x), device=x.device), last].float())[:, 0]


def rollout_buffer(actor_critic, model, samples, image_kind, **kind):
    """A finished rollout of `samples` decisions with random rewards and the actor-critic's own log-probs and values."""
    T, N = math.ceil(samples / 8), min(8, samples)
    buffer = None
    for t in range(T):
        ids, mask, pixels = observations(model, N, seed=t)
        images = actor_critic.embed_images(pixels) if image_kind == "patch_embeddings" else pixels
        if buffer is None:
            buffer = RolloutBuffer(T, N, images.shape[1:], image_kind, image_dtype=images.dtype)
        tokens, log_probs, values = actor_critic.act(ids, mask, **{image_kind: images}, **kind)
        buffer.store_observation(t, 0, [""] * N, ids, mask, **{image_kind: images})
        buffer.store_decision(t, tokens, log_probs, values)
        ended = torch.zeros(N, dtype=torch.bool)
        buffer.store_outcome(t, torch.rand(N), ended, ended, torch.zeros(N))
    buffer.compute_advantages(torch.zeros(N), 0.99, 0.95)
    return buffer


def updater(actor_critic, buffer, micro_batch_size):
    """A function that does one PPO update of policy and critic on `buffer`: one epoch, one mini-batch."""
    optimizers = [
        torch.optim.AdamW(parameters, lr=1e-6, eps=1e-5)
        for parameters in (actor_critic.policy_parameters(), actor_critic.critic_parameters())
    ]
    cfg = PPOConfig(temperature=1.0, minibatch_size=buffer.size, micro_batch_size=micro_batch_size)
    return lambda: ppo_update(actor_critic, buffer, *optimizers, cfg, True, torch.Generator().manual_seed(0))


def measure(args):
    """All variants: two adapters on the language layers."""
    device, dtype, name = choose_device(args.device)
    actor_critic = ActorCritic(load(args.model, device, dtype), targets="language")
    model = actor_critic.base_policy()
    plain = PlainActorCritic(model, actor_critic.policy.config.r, actor_critic.policy.config.lora_alpha)
    # One rollout in two forms: what the towers made of the pictures, or the pictures themselves.
    cached, pixels = (
        rollout_buffer(actor_critic, model, args.samples, kind)
        for kind in ("patch_embeddings", "pixel_values")
    )
    variants = {}
    for size in sorted({min(size, cached.size) for size in args.micro_batch_sizes}, reverse=True):
        for label, ours, buffer in (
            (PLAIN, plain, pixels),
            ("here, features computed anew", actor_critic, pixels),
            ("here, features cached", actor_critic, cached),
        ):
            variants[label, size] = updater(ours, buffer, size)
    seconds = turns(variants, args.rounds, device)
    rows = [
        dict(
            variant=label,
            micro_batch_size=size,
            ratio=ratio(seconds, (PLAIN, size), (label, size)),
            **rate,
        )
        for (label, size), rate in rates(seconds, cached.size).items()
    ]
    return dict(model=args.model, device=name, dtype=str(dtype), samples=cached.size, rates=rows)


def show(r):
    print(f"\n{r['model']}, {r['device']}, {r['dtype']}, updates of {r['samples']} decisions")
    columns = ["", "micro-batch:d", "samples/s:.1f", "lowest:.1f", "highest:.1f", "ratio:.2f"]
    names = ("variant", "micro_batch_size", "per_s", "slowest", "fastest", "ratio")
    table(columns, [[row[name] for name in names] for row in r["rates"]])
    print(
        "samples/s: policy and critic, forward and backward, optimiser steps; ratio: to transformers + peft at the\n"
        "same micro-batch, median over rounds. Cached features were computed in the rollout, which needs them anyway."
    )
