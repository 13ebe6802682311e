"""Engine for models of mlx-lm, on a Mac or on a CPU under Linux."""
