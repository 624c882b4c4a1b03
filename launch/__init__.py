"""Starts runs on many machines: a local stand-in for a cluster, Cloud TPU VMs, GKE, Slurm. Standard library alone."""
