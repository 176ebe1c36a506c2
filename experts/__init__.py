"""Scripted experts for LIBERO's tasks, from their goals (see expert.py)."""

from experts.expert import Expert, disturb, uncovered
