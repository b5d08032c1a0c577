"""`loomtune inspect`: rows as a model will see them, and what a whole split amounts to."""
