"""One run on the hosts of a TPU slice of a GKE cluster, as a JobSet that restarts until it is through.

    sgw-jax launch gke --name=nyud --image=us-docker.pkg.dev/project/images/sgw_jax:1 --tpu=v5e --topology=4x4 \\
        --bucket=my-runs -- train --config=nyud:swin_l,interaction=skem --workdir=/mnt/runs/nyud

The manifest goes to `kubectl apply -f -`; --dry-run prints it instead (JSON, which kubectl reads as it reads YAML).
The cluster needs JobSet (https://jobset.sigs.k8s.io) and a node pool of that topology; the image holds sgw_jax with
the extras [train,tpu] and has `python` on its PATH. A preempted, moved or failed slice is started again with the same
command, which goes on from the last checkpoint. `--bucket` is mounted at /mnt/runs by the driver of Cloud Storage FUSE.
Every host is told by GKE who the others are; sgw_jax joins them by itself.
"""

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

from sgw_jax.launch import command_line
from sgw_jax.launch.command_line import matching, whole

CHIPS_PER_HOST = 4
SMALL = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # all that v5e and v6e come in, but for parts of a host
TPUS = {  # type -> GKE's name of it, topologies
    "v5e": ("tpu-v5-lite-podslice", SMALL),
    "v5p": ("tpu-v5p-slice", ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")),  # and larger
    "v6e": ("tpu-v6e-slice", SMALL),
}
LARGEST_V5P = 6144  # chips
SECONDS_TO_SAVE = 300


def main(argv: Sequence[str] | None = None) -> int:
    """Applies the manifest, or prints it; returns kubectl's exit code."""
    parser = _parser()
    arguments, command = command_line.parse(parser, argv, durable=True)
    try:
        hosts = count_hosts(arguments.tpu, arguments.topology)
    except ValueError as error:
        parser.error(str(error))
    text = json.dumps(manifest(arguments, command, hosts), indent=2)
    if arguments.dry_run:
        print(text)
        return 0
    kubectl = ["kubectl", *([f"--context={arguments.context}"] if arguments.context else []), "apply", "-f", "-"]
    return command_line.feed(kubectl, text, remedy="install it")


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("gke", __doc__)
    add = parser.add_argument
    add("--name", required=True, type=command_line.NAME, help="of the JobSet")
    add("--image", required=True, type=matching(command_line.IMAGE, "an image as host/path/name:tag"))
    add("--tpu", required=True, choices=tuple(TPUS))
    add("--topology", required=True, type=matching(r"[0-9]{1,2}(x[0-9]{1,2}){1,2}", "chips by axis, as 4x4 or 2x2x2"))
    namespace = matching(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", "up to 63 of a-z, 0-9 and -")
    add("--namespace", type=namespace, help="default: that of the context")
    add("--context", type=matching(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*", "a context of kubectl"), help="default: current")
    account = matching(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", "lower-case letters, digits, - and .")
    add("--service-account", type=account, help="Kubernetes service account that may write the working directory")
    add("--env", action="append", default=[], type=_variable, metavar="NAME=VALUE", help="may be repeated")
    add("--bucket", type=command_line.BUCKET, help="of runs and data, mounted at /mnt/runs")
    add("--spot", action="store_true", help="on Spot VMs, which give a pod some 15 seconds of the time to save")
    add("--max-restarts", type=whole(0), default=100, help="preemptions count too; default: %(default)s")
    help = "seconds between SIGTERM and being killed; default: %(default)s"
    add("--seconds-to-save", type=whole(1, 86_400), default=SECONDS_TO_SAVE, help=help)
    add("--dry-run", action="store_true", help="print the manifest and apply nothing")
    return parser


def _variable(text: str) -> tuple[str, str]:
    check = matching(r"[A-Za-z_][A-Za-z0-9_]*=.*", "NAME=VALUE, the name of letters, digits and _")
    name, _, value = check(command_line.plain(text)).partition("=")
    return name, value


def count_hosts(tpu: str, topology: str) -> int:
    """Refuses topologies that GKE does not have, for their pods would wait for ever."""
    good = TPUS[tpu][1]
    sizes = [int(size) for size in topology.split("x")]
    chips = math.prod(sizes)
    allowed = topology in good
    if tpu == "v5p" and len(sizes) == 3:  # larger ones: cubes of 4x4x4 side by side, the longest axis last
        cubes = all(size and size % 4 == 0 for size in sizes)
        allowed |= cubes and sizes == sorted(sizes) and chips <= LARGEST_V5P
    if not allowed or chips % CHIPS_PER_HOST:
        why = f"{chips} chips, {CHIPS_PER_HOST} to a host"
        raise ValueError(
            f"argument --topology: {topology!r} ({why}) found; allowed for {tpu} is, say, {', '.join(good)}"
        )
    return chips // CHIPS_PER_HOST


def manifest(arguments: argparse.Namespace, command: Sequence[str], hosts: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": arguments.name}
    if arguments.namespace:
        metadata["namespace"] = arguments.namespace
    if hosts > 1:  # a node pool of several hosts is one slice; a run spread over two of them would lack their links
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",  # the index becomes the worker's number
        "backoffLimit": 0,  # one host that fails ends all: the JobSet starts all of them again
        "template": {**_annotations(arguments), "spec": _pod(arguments, command)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": arguments.max_restarts},
            "replicatedJobs": [{"name": "workers", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _pod(arguments: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    chips = {"google.com/tpu": CHIPS_PER_HOST}
    container: dict[str, Any] = {
        "name": "sgw-jax",
        "image": arguments.image,
        "command": [_literal(argument) for argument in ("python", "-m", "sgw_jax", *command)],  # no shell in between
        "env": [{"name": name, "value": _literal(value)} for name, value in arguments.env],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],  # between the TPU's hosts; the TPU's metrics
        "resources": {"requests": chips, "limits": dict(chips)},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": arguments.seconds_to_save,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": TPUS[arguments.tpu][0],
            "cloud.google.com/gke-tpu-topology": arguments.topology,
        },
        "containers": [container],
    }
    if arguments.bucket:
        container["volumeMounts"] = [{"name": "runs", "mountPath": "/mnt/runs"}]
        source = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": {"bucketName": arguments.bucket}}
        pod["volumes"] = [{"name": "runs", "csi": source}]
    if arguments.service_account:
        pod["serviceAccountName"] = arguments.service_account
    if arguments.spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        toleration = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        pod["tolerations"] = [toleration]
    return pod


def _annotations(arguments: argparse.Namespace) -> dict[str, Any]:
    """The driver runs beside the pods that ask for it."""
    return {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}} if arguments.bucket else {}


def _literal(text: str) -> str:
    """Kubernetes replaces $(NAME) in commands and variables, and reads $$ as one $."""
    return text.replace("$", "$$")
