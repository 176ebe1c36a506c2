"""From the simulator's frame to what the vision towers read, pixel for pixel as in OpenVLA's own evaluation.

The official evaluation sends every frame through JPEG, a Lanczos resize and a crop, all in TensorFlow, and the policy
has only ever seen the result. Every step below reproduces TensorFlow's pixels (at most 1 grey level off); each shortcut
that looks harmless (Pillow's decoder, Pillow's Lanczos) moves pixels by up to 17 levels.
"""

import functools
import io
import math

import numpy as np
import simplejpeg
import torch
from PIL import Image

DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_SIDE = math.sqrt(0.9)  # the crop keeps 90 % of the AREA


@functools.lru_cache(maxsize=8)
def _lanczos_matrix(size_in, size_out):
    """(size_out, size_in) float32: antialiased Lanczos-3 as one matrix, so that a resize is two matrix products."""
    scale = size_in / size_out
    stretch = max(scale, 1.0)  # antialiasing: when shrinking, the kernel is as wide as 3 OUTPUT pixels
    centre = (torch.arange(size_out, dtype=torch.float64)[:, None] + 0.5) * scale
    x = ((torch.arange(size_in, dtype=torch.float64)[None] + 0.5) - centre) / stretch
    weights = torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)
    return (weights / weights.sum(1, keepdim=True)).float()


def _crop_matrix(size, start):
    """start (B,) in pixels -> (B, size, size): bilinear crop of CROP_SIDE x size from `start` on, scaled up
    to size."""
    position = start[:, None] + torch.arange(size) * CROP_SIDE  # (B, size)
    # a hat function interpolates linearly
    return (1 - (position[:, :, None] - torch.arange(size)).abs()).clamp_min(0)


def resize_frames(frames, image_size):
    """frames (B, H, W, 3) uint8 upright -> (B, 3, image_size, image_size) uint8: JPEG round trip, then
    Lanczos-3."""
    frames = np.ascontiguousarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames must be uint8 (B, H, W, 3), not {frames.dtype} {frames.shape}")
    frames = np.stack([_jpeg_round_trip(frame) for frame in frames])
    batch, height, width, _ = frames.shape
    x = torch.from_numpy(frames).view(batch, height, width * 3).float()
    # rows first: no transposed copy
    x = (_lanczos_matrix(height, image_size) @ x).view(batch, image_size, width, 3)
    x = x.transpose(2, 3).contiguous() @ _lanczos_matrix(width, image_size).T  # (B, S, 3, S)
    return x.transpose(1, 2).round().clamp_(0, 255).to(torch.uint8, memory_format=torch.contiguous_format)


def _jpeg_round_trip(frame):
    data = io.BytesIO()
    Image.fromarray(frame).save(data, "JPEG", quality=95, subsampling=2)  # the bytes equal TensorFlow's
    # the fast DCT, as TensorFlow
    return simplejpeg.decode_jpeg(data.getvalue(), fastdct=True, fastupsample=False)


def crop_and_normalize(images, crop="center", jitter=0.0, generator=None):
    """images (B, 3, S, S) uint8 from `resize_frames` -> pixel_values (B, 6, S, S) float32, DINOv2's channels first.

    crop: "center" (evaluation), "random" (training: the same 90 % of the area, anywhere), "none".
    jitter: 0 = off; 1 = the official training recipe (brightness +-0.2, contrast and saturation 0.8 ... 1.2,
        hue +-0.05).
    generator: CPU torch.Generator for the two random parts.
    """
    size, x = images.shape[-1], images.float()
    if crop != "none":
        if crop not in ("center", "random"):
            raise ValueError(f"crop must be center, random or none, not {crop!r}")
        where = (
            torch.rand(2, len(images), generator=generator) if crop == "random" else torch.full((2, 1), 0.5)
        )
        rows, columns = (_crop_matrix(size, w * (1 - CROP_SIDE) * (size - 1)) for w in where)
        x = rows[:, None] @ x @ columns[:, None].mT
        x = x.mul_(255.5 / 255).floor_()  # TensorFlow's float -> uint8: truncate x * 255.5
    x = x / 255
    if jitter:
        x = _color_jitter(x, jitter, generator)
    mean, std = torch.tensor((DINO_MEAN, DINO_STD)).view(2, 3, 1, 1)
    return torch.cat(((x - mean) / std, (x - 0.5) / 0.5), dim=1)


def _color_jitter(x, strength, generator):
    """Brightness, contrast, saturation, hue, in the official order. All are affine in RGB: one 3x3."""
    u = (torch.rand(4, len(x), 1, 1, generator=generator) * 2 - 1) * strength
    brightness, contrast, saturation, angle = (
        u[0] * 0.2,
        1 + u[1] * 0.2,
        1 + u[2] * 0.2,
        u[3] * 0.05 * 2 * math.pi,
    )
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    turn = torch.eye(3).repeat(len(x), 1, 1)  # hue turns, saturation stretches the two chroma axes
    turn[:, 1:2, 1:2], turn[:, 1:2, 2:] = saturation * angle.cos(), -saturation * angle.sin()
    turn[:, 2:, 1:2], turn[:, 2:, 2:] = saturation * angle.sin(), saturation * angle.cos()
    mean = x.mean((2, 3))[:, :, None]  # (B, 3, 1): contrast pivots on each channel's mean
    y = (x.flatten(2) - mean) * contrast + mean + brightness
    return (torch.linalg.inv(to_yiq) @ turn @ to_yiq @ y).clamp(0, 1).view_as(x)


def preprocess_images(frames, image_size=224):
    """frames (B, H, W, 3) uint8, upright (already rotated by 180 degrees) -> pixel_values (B, 6, S, S) float32."""
    return crop_and_normalize(resize_frames(frames, image_size))
