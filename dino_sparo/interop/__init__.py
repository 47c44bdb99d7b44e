"""Encoders in, from our files and official ones, and out."""
