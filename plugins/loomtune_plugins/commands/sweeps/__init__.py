"""`loomtune train -m`: Hydra's grammar and sweepers say which runs there are; here they are checked, run and compared."""
