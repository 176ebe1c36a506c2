"""OpenVLA-7B's shapes on device "meta", which has shapes and no values: everything between pixels and
gradients runs there.

What asks a tensor for its value (on a GPU: the host waits for the device) fails by itself; what mixes devices
is caught below. The same
passes are counted: FLOPs per decision and per sample of an update, and the bytes that a backward pass keeps.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models.checkpoints import TIMM_TOWERS
from models.memory import Needs
from policy import ACTION_DIM, ActorCritic, OpenVLA
from ppo import action_log_prob, policy_loss, value_loss

CONFIG = {
    "n_action_bins": 256,
    "pad_to_multiple_of": 64,
    "timm_model_ids": list(TIMM_TOWERS),
    "text_config": {"vocab_size": 32064, "pad_token_id": 32000},
}
TERA = 1e12


class OneDevice(TorchDispatchMode):
    """Every operation takes tensors of device "meta" only. (Copies to a device, and Python numbers, are no
    mixture.)"""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.ndim}
        assert devices <= {"meta"} or "copy" in str(operation) or devices == {"cpu"}, (operation, devices)
        return operation(*args, **(kwargs or {}))


def actor_critic(layers=32, **variant):
    text = {**CONFIG["text_config"], "num_hidden_layers": layers}
    with torch.device("meta"):
        model = OpenVLA({**CONFIG, "text_config": text}).to(torch.bfloat16)
        return ActorCritic(model, lora_rank=32, lora_alpha=16, **variant)


def observation(batch, prompt=30):
    ids = torch.ones(batch, prompt, dtype=torch.long, device="meta")
    return dict(
        input_ids=ids, attention_mask=ids, pixel_values=torch.zeros(batch, 6, 224, 224, device="meta")
    )


def update(model, images, saved=None):
    """PPO's two losses and their backward passes for a batch -> TFLOP."""
    B = len(images["input_ids"])
    old, advantages = torch.zeros(2, B, device="meta")
    tokens = torch.full((B, ACTION_DIM), 31800, device="meta")

    def keep(tensor):
        storage = tensor.untyped_storage()
        if saved is not None:
            saved[storage._cdata] = storage  # kept alive, so that its address is not used again
        return tensor

    with FlopCounterMode(display=False) as flops, OneDevice():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            log_probs, entropy = model.evaluate_actions(action_tokens=tokens, temperature=1.5, **images)
        loss, _ = policy_loss(action_log_prob(log_probs), old, advantages, 0.2)
        (loss - 0.01 * entropy.sum(-1)).sum().backward()
        values = model.value(**images)
        if values.requires_grad:
            value_loss(values, old, advantages, 0.2).sum().backward()
    assert log_probs.shape == (B, ACTION_DIM) and values.shape == (B,) and values.dtype == torch.float32
    assert all(p.grad is not None and p.grad.is_meta for p in model.policy_parameters())
    return flops.get_total_flops() / TERA


@pytest.mark.slow
def test_nothing_between_pixels_and_loss_waits_for_a_device_or_mixes_two():
    images = observation(2)
    # What is counted wants all layers.
    for temperature, model in ((0.0, actor_critic(layers=2)), (1.5, actor_critic())):
        with FlopCounterMode(display=False) as flops, OneDevice():
            tokens, log_probs, values = model.act(
                **images, temperature=temperature, generator=[torch.Generator(), torch.Generator()]
            )
        assert tokens.shape == log_probs.shape == (2, ACTION_DIM) and values.shape == (2,) and tokens.is_meta
    per_decision = flops.get_total_flops() / TERA / 2
    with OneDevice():
        scores = (
            actor_critic(layers=2)
            .base_policy()
            .text_after_actions_logits(
                **images, action_tokens=tokens, token_ids=torch.tensor([5, 6], device="meta")
            )
        )
    assert scores.shape == (2, 2)

    # The backward pass keeps what `Needs` says: 3.95 GB a sample, or 0.13 GB and a block.
    saved, images = {}, observation(1)
    per_sample = update(model, images, saved)
    frozen = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = sum(storage.nbytes() for key, storage in saved.items() if key not in frozen)
    stacks = [(286, 4096, 11008, 32, 7, 4), (256, 1024, 4096, 23, 4, 2), (256, 1152, 4304, 26, 4, 2)]
    estimate = Needs("7B", torch.bfloat16)._activations(stacks)
    assert abs(estimate / kept - 1) < 0.05
    model.model.gradient_checkpointing = True
    recomputed = update(model, images)
    print(
        f"TFLOP: decision {per_decision:.2f}, sample {per_sample:.2f}, with checkpointing {recomputed:.2f}; {kept / 1e9:.2f} GB kept"
    )
    # Two passes over about 290 tokens of 7.5 G weights, 2 FLOP each, and the towers'; backward: once more for
    # the inputs.
    assert (
        8 < per_decision < 8.6
        and 1.9 < per_sample / per_decision < 2.2
        and 2.8 < recomputed / per_decision < 3.2
    )


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["shared", "none"])
def test_cached_patches_and_other_critics(critic):
    model = actor_critic(layers=2, targets="language", critic=critic, whole_vocabulary=True)
    images = observation(1)
    with OneDevice():
        images["patch_embeddings"] = model.embed_images(images.pop("pixel_values"))
        model.act(**images, temperature=1.0)
    update(model, images)
