"""`loomtune compare`: runs beside each other, whatever made them."""
