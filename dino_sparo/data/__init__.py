"""Sources of images, views, and batches."""
