"""Which cores and which EGL devices one rank of many renders on (paper, section 3.5: balanced environments)."""

import os

from simulator.render import num_egl_devices
from support.machine import cores


def share_of_machine(ranks, num_workers=None, egl_devices=None):
    """Keyword arguments of `LiberoVecEnv` for this rank: num_workers, egl_devices.

    ranks: support.distributed.Ranks. num_workers: of this rank; by default its share of the cores. egl_devices: those of this
    machine that may render, shared out among its ranks; by default a rank renders where it computes.
    """
    if num_workers is None and ranks.local_size > 1:
        num_workers = max(1, cores() // ranks.local_size)
    visible = [x.strip() for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    chosen = all(x.isdigit() for x in visible)  # else a single process leaves EGL the choice
    if egl_devices is None and os.environ.get("MUJOCO_EGL_DEVICE_ID"):
        pass  # chosen there: workers inherit it
    elif egl_devices is None and ranks.device.startswith("cuda") and (chosen or ranks.local_size > 1):
        # EGL counts all GPUs of the machine, CUDA only those that it was told to see. And in a container there may be GPUs to
        # compute on, and none that EGL knows: Mesa then draws on the CPU, for all ranks.
        device = int(visible[ranks.local_rank]) if chosen else ranks.local_rank
        egl_devices = [device] if device < num_egl_devices() else None
    elif egl_devices is not None:
        mine = egl_devices[ranks.local_rank :: ranks.local_size]
        egl_devices = mine or [egl_devices[ranks.local_rank % len(egl_devices)]]
    return dict(num_workers=num_workers, egl_devices=egl_devices)
