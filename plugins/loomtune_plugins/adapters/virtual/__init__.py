"""Virtual tokens, as inputs or as keys and values."""
