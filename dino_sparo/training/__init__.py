"""Learning: loss, schedules, optimizer, teacher, checkpoints and the loop."""
