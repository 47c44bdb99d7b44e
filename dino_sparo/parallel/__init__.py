"""Processes of a run: launcher, process group, collectives, device, and precision."""
