"""Analysis of slots: attention, images, accuracy, masks, and known factors."""
