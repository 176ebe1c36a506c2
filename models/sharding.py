"""A backbone spread over the ranks (FSDP2), for GPUs that cannot hold it. Everything that knows about it stands here.

A rank keeps 1 / W of each block, and fetches the rest of a block when it is that block's turn, in the forward
pass and again in the backward pass. The price: every forward pass needs all ranks, and moves the whole
backbone over the wires. So does each of the 7 passes that decode an action, because there is no room for a
merged copy: LoRA stays unmerged.
"""

import torch

# FSDP2 and DTensor are imported where they are used: it takes a second, and few runs need them.


def shard_backbone(model, device):
    """Spread the frozen weights of every block of an OpenVLA over the ranks. Give the model on the CPU: one
    block at a time moves to `device`, this rank's, where the whole need not fit.

    Adapters, embeddings, head and projector (0.7 of 15 GB at 7B) stay whole on every rank: adapters are what
    the optimiser steps on and what `sum_gradients_` sums.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),))
    towers = model.vision_backbone
    for block in (
        *towers.featurizer.blocks,
        *towers.fused_featurizer.blocks,
        *model.language_model.model.layers,
    ):
        adapters = {p for name, p in block.named_parameters() if "lora_" in name}
        # Each block is a root of its own, and a root would keep its weights gathered if not told otherwise.
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
    model.needs_all_ranks = True


def move_whole_parameters(module, device):
    """Move those parameters to `device` that are not spread over the ranks."""
    for parameter in module.parameters():
        if not is_spread(parameter):
            parameter.data = parameter.data.to(device)


def is_spread(tensor):
    return hasattr(tensor, "full_tensor")  # a DTensor


def whole_tensor(tensor):
    """`tensor` itself, or where it is spread over the ranks its whole, in host memory; all ranks must call
    this then."""
    return tensor.full_tensor().cpu() if is_spread(tensor) else tensor


def is_first_rank():
    """Is this the process that writes files?"""
    return (
        not torch.distributed.is_available()
        or not torch.distributed.is_initialized()
        or torch.distributed.get_rank() == 0
    )
