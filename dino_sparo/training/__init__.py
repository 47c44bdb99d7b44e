"""Learning: the step and the loop, loss, schedules, optimizer, teacher, and what watches them."""
