"""What train, evaluate, predict and plan do, a module each: `run(arguments, rest, console)` gives the exit code."""
