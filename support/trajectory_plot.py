"""One picture per trajectory: what the label rule saw, and what the reward model makes of it."""

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from support.files import atomic_write

COLOURS = {1: ("tab:green", "positive"), 0: ("tab:gray", "negative"), -1: ("white", "no label")}


def plot_trajectory(path, frames, result, title, scores=None):
    """Draw what the label rule saw, for a person to look at: pictures, speed, gripper, labels (and scores).

    path: PNG to write. frames (T, H, W, 3) uint8 upright. result: `support.labels.Labels`. scores (T,) in [0, 1] or None.
    """
    T, seconds = len(frames), np.arange(len(frames)) / result.rate
    rows = 4 if scores is not None else 3
    figure = Figure(figsize=(12, 2.2 * rows + 1.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.6, 2.2 * rows - 1.0])
    top.suptitle(f"{title}\n{', '.join(result.problems) or 'no problems'}", fontsize=10)

    # Frames at the keyframes first, the rest of the strip filled evenly.
    room = 9
    shown = list(result.keyframes[:room])
    for t in np.linspace(0, T - 1, room).round().astype(int).tolist():
        if len(shown) < room and t not in shown:
            shown.append(t)
    for axis, t in zip(np.atleast_1d(top.subplots(1, len(shown))), sorted(shown), strict=True):
        axis.imshow(frames[t])
        key = t in result.keyframes
        axis.set_title(
            f"{seconds[t]:.1f} s" + (" key" if key else ""), fontsize=8, color="tab:red" if key else "black"
        )
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set(color="tab:red" if key else "black", linewidth=2.5 if key else 0.8)

    axes = bottom.subplots(
        rows, 1, sharex=True, height_ratios=[2, 2, 2, 0.7] if scores is not None else [2, 2, 0.7]
    )
    speed_axis, gripper_axis, label_axis = axes[0], axes[1], axes[-1]
    if len(result.speed):
        edges = [0, *result.milestones, T]
        for number, (start, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            left, right = (np.array([start, end]) - 0.5) / result.rate
            for axis in axes[:-1]:
                axis.axvspan(
                    left, right, color=("tab:blue", "tab:orange")[number % 2], alpha=0.10, linewidth=0
                )
            gripper_axis.text(left, 84, f" {number + 1}", fontsize=8, va="bottom")
        for k in result.keyframes:
            for axis in axes[:-1]:
                axis.axvline(seconds[k], color="tab:red", linewidth=0.8, alpha=0.6)
        speed_axis.plot(seconds, 100 * result.speed, ".-", color="black", linewidth=1.2, markersize=4)
        speed_axis.axhline(100 * result.near, color="tab:red", linestyle="--", linewidth=1, label="near zero")
        key = result.keyframes
        speed_axis.plot(seconds[key], 100 * result.speed[key], "v", color="tab:red", label="keyframe")
        speed_axis.legend(loc="upper right", fontsize=8)
        gripper_axis.plot(seconds, 1000 * result.openness, ".-", color="black", linewidth=1.2, markersize=4)
    speed_axis.set_ylabel("hand speed\ncm/s")
    gripper_axis.set(ylabel="gripper, mm\nand segments", ylim=(-5, 98))
    if scores is not None:
        axes[2].plot(seconds, scores, ".-", color="tab:purple", linewidth=1.2, markersize=4)
        axes[2].set(ylabel="RPRM\nscore", ylim=(-0.05, 1.05))
    for value, (colour, name) in COLOURS.items():
        spans = [((t - 0.5) / result.rate, 1 / result.rate) for t in np.flatnonzero(result.labels == value)]
        caption = f"{name} ({len(spans)})"
        label_axis.broken_barh(spans, (0, 1), color=colour, edgecolor="black", linewidth=0.2, label=caption)
    limits = (-0.5 / result.rate, (T - 0.5) / result.rate)
    label_axis.set(yticks=[], ylabel="label", xlabel="time, s", ylim=(0, 1), xlim=limits)
    label_axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.9), ncols=3, fontsize=8, frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    atomic_write(path, data.getvalue())
