"""Scripted experts for LIBERO's tasks, from their goals. Start reading at expert.py."""

import simulator  # noqa: F401  before anything imports LIBERO or mujoco: quiet, and one line where they cannot be used
from experts.expert import Expert, covered_tasks, disturb, goal_of

__all__ = ["Expert", "covered_tasks", "disturb", "goal_of"]
