"""Which processes form a run: what launch/, Open MPI, Slurm and TPU pods say of it in the environment."""

import os
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax

from sgw_jax.data_pipelines.errors import InputError

OWN = ("SGW_COORDINATOR", "SGW_PROCESSES", "SGW_PROCESS")
SLURM = "SLURM_STEP_NODELIST"  # which srun sets in every process that it starts
ADDRESS = re.compile(r"([^\s:/\[\]]+|\[[0-9A-Fa-f:]+\]):(\d{1,5})")
PORTS = range(61_440, 65_536)  # as JAX has them for other clusters


def join(heartbeat_seconds: int) -> None:
    """Makes several processes one program, where the environment says that there are several.

    Raises:
      InputError: a variable is missing or cannot be; it names it.
    """
    found = of_environment(os.environ)
    if found is None:
        return
    try:
        jax.distributed.initialize(**found, heartbeat_timeout_seconds=heartbeat_seconds)
    except (ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"The processes of this run could not find each other ({str(error).partition(chr(10))[0]}). Set {OWN[0]} "
            f"(host:port of process 0), {OWN[1]} and {OWN[2]} in each of them; docs/scaling.md says more."
        ) from error


def of_environment(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of jax.distributed.initialize, empty where JAX finds all by itself; None: a process alone.

    Raises:
      InputError: see `join`.
    """
    given = {name: environment[name] for name in OWN if environment.get(name)}
    mpi_processes = _number(environment, "OMPI_COMM_WORLD_SIZE", 1)
    if OWN[1] in given or OWN[2] in given or (given and mpi_processes is None):
        if missing := [name for name in OWN if name not in given]:
            raise InputError(
                f"{' and '.join(given)} without {' and '.join(missing)}: set all three in every process "
                "(docs/scaling.md), or none for a process alone."
            )
        processes = _number(environment, OWN[1], 1)
        assert processes is not None
        process = _number(environment, OWN[2], 0, processes - 1)
        return {"coordinator_address": _address(given[OWN[0]]), "num_processes": processes, "process_id": process}
    if mpi_processes is not None:
        return _of_open_mpi(environment, mpi_processes)
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or SLURM in environment:
        return {}
    return None


def _of_open_mpi(environment: Mapping[str, str], processes: int) -> dict[str, Any] | None:
    """Of Open MPI 4, JAX reads the address of mpirun. Open MPI 5 tells none, so that on several machines it is to be
    given; on one machine a port is derived from the job's name."""
    if processes == 1:
        return None
    if "OMPI_MCA_orte_hnp_uri" in environment and not environment.get(OWN[0]):
        return {}
    process = _number(environment, "OMPI_COMM_WORLD_RANK", 0, processes - 1)
    local = _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK", 0, processes - 1)
    if process is None or local is None:
        raise InputError("OMPI_COMM_WORLD_SIZE without OMPI_COMM_WORLD_RANK and _LOCAL_RANK: mpirun sets all three.")
    if address := environment.get(OWN[0]):
        address = _address(address)
    elif _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE", 1) == processes:
        job = environment.get("PMIX_NAMESPACE", str(os.getppid()))
        address = f"127.0.0.1:{PORTS[zlib.crc32(job.encode()) % len(PORTS)]}"
    else:
        raise InputError(
            "Open MPI 5 does not tell its processes where process 0 is, and these are on several machines: "
            f"mpirun -x {OWN[0]}=HOST:PORT ..., HOST being the first machine and PORT a free one on it."
        )
    return {
        "coordinator_address": address,
        "num_processes": processes,
        "process_id": process,
        "local_device_ids": [local],  # a GPU each, as JAX has it under Open MPI 4
    }


def _address(text: str) -> str:
    parts = ADDRESS.fullmatch(text)
    if parts is None or not 0 < int(parts[2]) < 2**16:
        raise InputError(f"{OWN[0]}={text}: it must be host:port of process 0, such as node1:12345.")
    return text


def _number(environment: Mapping[str, str], name: str, low: int, high: int | None = None) -> int | None:
    """A variable's whole number; None where it is not set."""
    text = environment.get(name)
    if not text:
        return None
    whole = re.fullmatch(r"\d{1,9}", text, flags=re.ASCII)
    if not whole or int(text) < low or (high is not None and int(text) > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{name}={text}: it must be a whole number {allowed}.")
    return int(text)
