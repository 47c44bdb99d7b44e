"""The command line: every command, its arguments and its help."""
