"""Images in, crops out."""
