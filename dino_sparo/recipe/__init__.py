"""Recipes: typed sections, read-outs by name, and recipe files."""
