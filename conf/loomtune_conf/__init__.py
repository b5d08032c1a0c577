"""Hydra groups of named choices; their names are those of the axes. `recipe/` holds whole runs."""
