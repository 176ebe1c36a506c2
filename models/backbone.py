"""OpenVLA's parts under their official tensor names: the vision tower (a ViT), the projector, and a layer of the Llama.

Written out, because that is shorter than what it takes to make timm's and transformers' versions return these
states, and because `LlamaLayer` serves all three ways in which the policy runs it: whole sequences, single
tokens through a cache, and only the last few positions of a sequence.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def run_block(block, *args, gradient_checkpointing=False):
    """block(*args); with gradient checkpointing its activations are computed again in the backward pass, not kept."""
    if gradient_checkpointing and torch.is_grad_enabled():
        # Nothing in these blocks is random.
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
    return block(*args)


# --------------------------------------------------------------------------------------------------------------------
# Vision tower: a ViT up to its second-to-last block
# --------------------------------------------------------------------------------------------------------------------


class Scale(nn.Module):  # DINOv2's LayerScale, under its official tensor name
    def __init__(self, width):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale_factor


class VisionAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        # each (B, heads, tokens, head_dim)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # exact GELU, not tanh


class VisionBlock(nn.Module):
    def __init__(self, size, scaled):
        super().__init__()
        width = size["hidden_size"]
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(width, size["num_attention_heads"])
        self.mlp = VisionMLP(width, size["intermediate_size"])
        self.ls1, self.ls2 = (Scale(width), Scale(width)) if scaled else (nn.Identity(), nn.Identity())

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTower(nn.Module):
    """Patch features of the second-to-last block, without the final norm: the last block is not even built.

    With register tokens it is a DINOv2 (class token, registers, LayerScale), without them a SigLIP (patches only).
    """

    def __init__(self, size):
        super().__init__()
        width, patch, registers = size["hidden_size"], size["patch_size"], size["num_register_tokens"]
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, (size["image_size"] // patch) ** 2, width))
        self.extra_tokens = 1 + registers if registers else 0
        if registers:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.reg_token = nn.Parameter(torch.zeros(1, registers, width))
        blocks = size["num_hidden_layers"] - 1
        self.blocks = nn.ModuleList(VisionBlock(size, scaled=registers > 0) for _ in range(blocks))

    def forward(self, images, gradient_checkpointing=False):
        """images (B, 3, S, S), normalised for this tower -> (B, patches, width)."""
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = x + self.pos_embed  # positions for patches only
        if self.extra_tokens:
            extra = (token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token))
            x = torch.cat((*extra, x), dim=1)
        for block in self.blocks:
            x = run_block(block, x, gradient_checkpointing=gradient_checkpointing)
        return x[:, self.extra_tokens :]


class Projector(nn.Module):
    """Per patch, both towers' features -> the Llama's width."""

    def __init__(self, vision_width, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(vision_width, 4 * vision_width), nn.Linear(4 * vision_width, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x):
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


# --------------------------------------------------------------------------------------------------------------------
# Llama
# --------------------------------------------------------------------------------------------------------------------


def _rotate(x, cos, sin):
    """Rotary positions: (x_i, x_{i + half}) turn by position x frequency_i. `sin` carries the sign of
    rotate-half."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class LlamaAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.v_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x, cos, sin, cache=None, at=None, slot=None, mask=None):
        """Causal attention over x (B, S, d), in one of three ways:
        plain: every position asks, and `cache`, if given, is filled;
        at (B, n): only these positions ask -> (B, n, d); all S are keys and values;
        slot (B,): x is one new token per row, its key and value go to that cache slot; it sees what `mask`
        allows.
        """
        q, k, v = (
            self._heads(self.q_proj(_pick(x, at))),
            self._heads(self.k_proj(x)),
            self._heads(self.v_proj(x)),
        )
        k = _rotate(k, cos, sin)
        q = _rotate(q, cos, sin) if at is None else _rotate(q, cos[at][:, None], sin[at][:, None])
        if slot is not None:
            rows = torch.arange(len(x), device=x.device)
            cache[0][rows, :, slot], cache[1][rows, :, slot] = k[:, :, 0], v[:, :, 0]
            k, v = cache
        elif cache is not None:
            cache[0][:, :, : x.shape[1]], cache[1][:, :, : x.shape[1]] = k, v
        if at is not None:
            mask = (torch.arange(x.shape[1], device=x.device) <= at[:, :, None])[:, None]  # (B, 1, n, S)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, tokens, head_dim)


def _pick(x, at):
    """x (B, S, d) at positions `at` (B, n) -> (B, n, d); all of x for None."""
    return x if at is None else x.gather(1, at[:, :, None].expand(-1, -1, x.shape[-1]))


class LlamaMLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    def __init__(self, text):
        super().__init__()
        width, eps = text["hidden_size"], text["rms_norm_eps"]
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.self_attn = LlamaAttention(width, text["num_attention_heads"])
        self.mlp = LlamaMLP(width, text["intermediate_size"])

    def forward(self, x, cos, sin, cache=None, at=None, slot=None, mask=None):
        x = _pick(x, at) + self.self_attn(self.input_layernorm(x), cos, sin, cache, at, slot, mask)
        return x + self.mlp(self.post_attention_layernorm(x))
