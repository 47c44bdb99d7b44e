"""The recipe of an experiment: typed sections, the read-outs by name, and the files that hold recipes."""
