"""Measuring frozen encoders: features, k-NN, linear probes, results, comparisons."""
