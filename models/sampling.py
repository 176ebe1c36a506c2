"""How an action token is drawn from its distribution."""

import torch


def most_likely(log_p, k):
    return log_p.argmax(-1)


def sampler(batch, generator, device, count=7):
    """draw(log_p (B, tokens), k) -> the k-th token of every row, (B,). Random numbers come from the CPU, and per-row
    generators make a row's draw independent of batch and device."""
    generators = generator if isinstance(generator, (list, tuple)) else None
    if generators:
        rows = [torch.rand(count, dtype=torch.float64, generator=g) for g in generators]
        uniforms = torch.stack(rows)
    else:
        uniforms = torch.rand(batch, count, dtype=torch.float64, generator=generator)
    uniforms = uniforms.to(device, non_blocking=True)  # (B, 7)
    return lambda log_p, k: sample(log_p, uniforms[:, k])


def sample(log_p, u):
    """Inverse CDF: the first token whose cumulative probability exceeds u. In float64 for the tail of 32,064 tokens."""
    cdf = log_p.double().exp().cumsum(-1)
    return torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0].clamp_max(log_p.shape[-1] - 1)
