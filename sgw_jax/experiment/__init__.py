"""From a configuration to the objects it describes."""
