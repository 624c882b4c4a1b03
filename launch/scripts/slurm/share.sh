# shellcheck shell=bash
# GPUS COMMAND...: the command, on this process's part of the node's GPUs. With fewer processes than GPUs JAX would give
# a process the one GPU of its own number.
first=$((SLURM_LOCALID * $1))
JAX_LOCAL_DEVICE_IDS=$(seq -s, "$first" $((first + $1 - 1)))
export JAX_LOCAL_DEVICE_IDS
shift
exec "$@"
