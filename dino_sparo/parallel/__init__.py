"""Processes that are one run: group, collectives, device, precision, launcher."""
