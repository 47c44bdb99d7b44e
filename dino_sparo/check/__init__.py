"""What a run would be, and what is in its way."""
