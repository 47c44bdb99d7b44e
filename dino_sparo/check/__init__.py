"""Checks of a run before it starts: plan, estimates for GPUs, measurements, and problems."""
