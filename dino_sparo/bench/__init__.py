"""`dino-sparo bench`: the time of training by stage, compared with plain code."""
