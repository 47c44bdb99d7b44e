"""Learning: loss, schedules, optimiser, teacher, checkpoints and the loop."""
