"""How sure a number is: confidence intervals, and tests of whether two checkpoints differ."""
