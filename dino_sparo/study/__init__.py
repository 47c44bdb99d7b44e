"""`dino-sparo study`: variants of a recipe over seeds, trained and evaluated alike, on one page."""
