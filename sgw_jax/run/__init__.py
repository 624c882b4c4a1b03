"""A run and its working directory: states, steps, checkpoints, logs, and how it starts, stops and goes on."""
