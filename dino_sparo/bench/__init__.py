"""Where the time of training goes: what `dino-sparo bench` measures."""
