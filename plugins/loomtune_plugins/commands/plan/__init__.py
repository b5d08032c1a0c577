"""`loomtune plan`: what a run will take, whether it fits, and what would be better, before anything is paid for."""
