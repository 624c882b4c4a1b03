"""What check, train, evaluate, predict, score and plan do, a module each, whose `run` gives the exit code."""
