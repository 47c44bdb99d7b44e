"""Looking inside: where single slots attend."""
