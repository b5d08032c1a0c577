"""`loomtune train -m`: Hydra's sweepers say which runs there are; here they are checked, run and compared."""
