"""The flag of XLA for networks so small that compiling them takes longer than they run: it is asked for little."""

# Of LLVM, which takes a third of the time. Numbers differ from those of optimised programs by roundings, as they do
# between machines; without XLA's fusion emitters too, programs that make the same bits for people would not here.
QUICK = "--xla_backend_optimization_level=0"
