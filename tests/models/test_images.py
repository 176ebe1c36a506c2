"""Preprocessing against the official code's pixels (tests/fixtures)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models import images

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_preprocessing():
    data = np.load(FIXTURES / "preprocess.npz")
    frames = data["agentview"][:, ::-1, ::-1]
    resized = images.resize_frames(frames, 224).permute(0, 2, 3, 1).numpy()
    pixel_values = images.preprocess_images(frames)
    cropped = (pixel_values[:, 3:] * 127.5 + 127.5).round().permute(0, 2, 3, 1).numpy()
    for ours, theirs in ((resized, data["resized224"]), (cropped, data["center_cropped224"])):
        difference = np.abs(ours.astype(int) - theirs.astype(int))
        assert difference.max() <= 1 and difference.mean() <= 0.05
    one_level = 1 / 255 / min(images.DINO_STD)
    assert np.abs(pixel_values.numpy() - data["pixel_values"]).max() <= one_level * 1.1
    assert pixel_values.dtype == torch.float32 and images.preprocess_images(frames, 112).shape == (
        2,
        6,
        112,
        112,
    )


def test_augmentation():
    frames = np.load(FIXTURES / "preprocess.npz")["agentview"][:, ::-1, ::-1]
    resized = images.resize_frames(frames, 112)
    centre = images.crop_and_normalize(resized)
    torch.testing.assert_close(images.crop_and_normalize(resized, jitter=1e-6), centre, rtol=0, atol=1e-3)
    seeds = [torch.Generator().manual_seed(s) for s in (0, 0, 1)]
    first, again, other = (images.crop_and_normalize(resized, "random", 1.0, seed) for seed in seeds)
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == centre.shape
    assert not torch.equal(images.crop_and_normalize(resized, "none"), centre)
    # A shift of one pixel between crop origins is a shift of the same content: the crop does move, and nothing else.
    assert images._crop_matrix(112, torch.tensor([0.0, 5.0])).argmax(-1)[:, 0].tolist() == [0, 5]
    with pytest.raises(ValueError, match="uint8"):
        images.preprocess_images(frames / 255.0)
    with pytest.raises(ValueError, match="crop"):
        images.crop_and_normalize(resized, "left")
