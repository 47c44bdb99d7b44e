"""`dino-sparo study`: train and evaluate variants of a recipe over seeds, and write a page about them."""
