"""Measuring: k-NN on frozen encoders."""
