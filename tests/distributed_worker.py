"""What tests/test_distributed.py runs under torchrun: `distributed_worker.py CASE DIRECTORY`. Also imported by it, for one process."""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from policy import ActorCritic, build_tiny
from ppo import PPOConfig, RolloutBuffer, ppo_update
from support import distributed
from support.errors import UserError, main_guard

T, N = 6, 4
SMALL = dict(
    vision_width=32,
    vision_blocks=3,
    vision_heads=2,
    width=32,
    layers=3,
    heads=2,
    mlp=64,
    image_size=32,
    patch_size=16,
)
# name: (LoRA targets, critic, PPO settings)
UPDATES = {
    "language": ("language", "adapter", dict(target_kl=None)),
    "all": ("all", "adapter", dict(target_kl=None)),
    "shared critic": ("language", "shared", dict(target_kl=None)),
    "kl guard": ("language", "adapter", dict(target_kl=0.03)),
    "kl guard, no critic": ("language", "none", dict(target_kl=0.03)),  # at last nothing learns, on no rank
}


class Recorder(torch.optim.AdamW):
    """AdamW that keeps the gradients it was given."""

    def __init__(self, parameters):
        super().__init__([{"params": list(parameters)}], lr=3e-3, eps=1e-5, weight_decay=0.0)
        self.seen = []

    def step(self):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        if gradients:  # without a critic its optimiser has none
            self.seen.append(torch.cat(gradients))
        super().step()


def model(targets, critic):
    torch.manual_seed(0)
    actor_critic = ActorCritic(build_tiny(0, words=["pick", "up", "milk"], **SMALL), 4, 8, targets, critic)
    for name, parameter in actor_critic.named_parameters():  # adapters that do something from the start
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return actor_critic


def rollout(actor_critic, envs):
    """The part of one fixed rollout of T x N that belongs to `envs`. Rewards differ much between environments."""
    g = torch.Generator().manual_seed(1)
    pixels = torch.randn(T, N, 6, 32, 32, generator=g)
    rewards = torch.rand(T, N, generator=g) + torch.arange(N) ** 2
    noise = 0.2 * torch.randn(T, N, generator=g)  # as if the policy had moved since: some ratios are clipped
    done, cut = torch.rand(2, T, N, generator=g) < 0.2
    frozen = actor_critic.vision_frozen
    shape = (actor_critic.model.num_patches, 32) if frozen else (6, 32, 32)
    part = slice(envs.start, envs.stop)
    kind = "patch_embeddings" if frozen else "pixel_values"
    buffer = RolloutBuffer(T, len(envs), shape, kind, frame_shape=(1, 1, 3))
    for t in range(T):
        ids, mask = actor_critic.model.tokenize(["pick up milk" if n % 2 else "pick milk" for n in envs])
        images = actor_critic.embed_images(pixels[t, part]) if frozen else pixels[t, part]
        samplers = [torch.Generator().manual_seed(100 * t + n) for n in envs]
        tokens, log_probs, values = actor_critic.act(ids, mask, **{kind: images}, generator=samplers)
        buffer.store_observation(t, 0, [""] * len(envs), ids, mask, **{kind: images})
        buffer.store_decision(t, tokens, log_probs + noise[t, part, None] / 7, values)
        buffer.store_outcome(t, rewards[t, part], done[t, part], cut[t, part], torch.full((len(envs),), 0.5))
    buffer.compute_advantages(torch.zeros(len(envs)), 0.99, 0.95)
    return buffer


def update(ranks, name, shard=False):
    """Two epochs on that rollout -> {"gradients": [...], "weights", "metrics", "tokens", and with `shard` the merged policy}."""
    targets, critic, settings = UPDATES[name]
    actor_critic = model(targets, critic)
    if shard:
        actor_critic.shard(ranks)
    optimizers = Recorder(actor_critic.policy_parameters()), Recorder(actor_critic.critic_parameters())
    buffer = rollout(actor_critic, ranks.share(N))
    cfg = PPOConfig(temperature=1.0, epochs=2, minibatch_size=8, micro_batch_size=3, value_clip=0, **settings)
    metrics = ppo_update(
        actor_critic, buffer, *optimizers, cfg, True, torch.Generator().manual_seed(0), ranks
    )
    weights = [*actor_critic.policy_parameters(), *actor_critic.critic_parameters()]
    base = actor_critic.policy.base_tensors()
    merged = {name: actor_critic.policy.merged(name, base[name]).detach() for name in base}
    with torch.no_grad(), actor_critic.start_policy() as start:
        ids, mask = start.tokenize(["pick milk"])
        before = start.prompt_state(ids, mask, pixel_values=torch.ones(1, 6, 32, 32))
    return {
        "gradients": [g for optimizer in optimizers for g in optimizer.seen],
        "weights": torch.cat([p.detach().flatten() for p in weights]),
        "metrics": metrics,
        "tokens": buffer.action_tokens,
        "merged": merged,
        "start": before,
    }


@main_guard
@distributed.ends_together
def main():
    case, directory = sys.argv[1], Path(sys.argv[2])
    if case == "late" and os.environ["RANK"] == "0":
        time.sleep(3)
    ranks = distributed.join()
    if case == "updates":
        results = {(name, shard): update(ranks, name, shard) for name in UPDATES for shard in (False, True)}
        torch.save(results, directory / f"rank{ranks.rank}.pt")
        return
    (directory / f"pid{ranks.rank}").write_text(str(os.getpid()))
    if case == "late":
        os._exit(ranks.sum_(torch.ones(1)) != ranks.size)  # as if killed: nobody tidies up
    if case == "error" and ranks.rank == 1:
        raise UserError("the milk is spilt")
    if case == "stop":
        stopped = []
        # As signals.Stop: seen between decisions.
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
        while not stopped:
            time.sleep(0.1)
        ranks.check_others()
        print("stopped without a reason")
        sys.exit(130)
    if ranks.rank == 1 and case == "kill":
        time.sleep(3600)
    if ranks.rank == 0 and case == "kill":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # only the collective tells
    ranks.barrier()


if __name__ == "__main__":
    main()
