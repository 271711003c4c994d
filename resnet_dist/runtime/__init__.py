"""The processes and their machine: launcher variables, Accelerate, signals, standard streams."""
