"""Plots of trajectories."""

import numpy as np
from PIL import Image

import reward_model
from support.trajectory_plot import plot_trajectory


def test_plot_of_one_step(tmp_path):
    result = reward_model.label_trajectory(np.zeros((1, 7)), np.zeros((1, 3)))
    plot_trajectory(tmp_path / "one.png", np.zeros((1, 8, 8, 3), np.uint8), result, "one step")
    with Image.open(tmp_path / "one.png") as image:
        image.verify()
