"""Scripted experts for LIBERO's tasks, from their goals. Start reading at expert.py."""

from experts.expert import Expert, covered_tasks, disturb, goal_of

__all__ = ["Expert", "covered_tasks", "disturb", "goal_of"]
