"""A training run on a GKE cluster with TPU slices, as a JobSet: one pod a host, started again when one is lost.

    python launch/gke.py NAME --image=REGISTRY/sgw_jax:TAG --accelerator=v5e --topology=4x4 --spot \\
        --bucket=my-runs -- train --config=nyud --workdir=/mnt/runs/run-1

The cluster needs the JobSet operator and a node pool of the topology; the image holds this package with `.[tpu]`. The
command is in the manifest as a list, so no shell reads it. `--bucket` is mounted at /mnt/runs by Cloud Storage FUSE. A
lost node ends the job's pods, which save on SIGTERM; the JobSet starts them anew, and the same command goes on from the
last checkpoint. `--dry-run` prints the manifest (JSON, which is YAML too); else it goes to `kubectl apply`.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from arguments import BUCKET, add_command, add_dry_run, count, matching, name, run

# What GKE calls the slices, and the chips of one of their machines.
ACCELERATORS = {
    "v5e": ("tpu-v5-lite-podslice", 4, "4x4, 8x8, 16x16"),
    "v5p": ("tpu-v5p-slice", 4, "2x2x2, 2x4x4, 4x4x4"),
    "v6e": ("tpu-v6e-slice", 4, "4x4, 8x8, 16x16"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints or applies the manifest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", type=name, help="of the JobSet")
    image = matching(r"[\w][\w.:/@-]*", "a container image such as region-docker.pkg.dev/project/repo/sgw_jax:1")
    parser.add_argument("--image", required=True, type=image)
    parser.add_argument("--accelerator", required=True, choices=ACCELERATORS)
    parser.add_argument("--topology", required=True, type=matching(r"\d+(x\d+){1,2}", "a topology such as 4x4"))
    parser.add_argument("--namespace", type=name, default="default")
    parser.add_argument("--service-account", type=name, help="Kubernetes service account with access to the bucket")
    parser.add_argument("--bucket", type=BUCKET, help="of runs and data, mounted at /mnt/runs")
    parser.add_argument("--spot", action="store_true", help="cheaper nodes that may be taken away")
    parser.add_argument("--max-restarts", type=count, default=100, help="default: %(default)s")
    parser.add_argument("--grace-seconds", type=count, default=120, help="to save in (default: %(default)s)")
    add_dry_run(parser)
    add_command(parser)
    arguments = parser.parse_args(argv)
    try:
        manifest = json.dumps(jobset(arguments), indent=2)
    except ValueError as error:
        parser.error(str(error))
    if arguments.dry_run:
        print(manifest)
        return 0
    return run([["kubectl", "apply", "-f", "-"]], dry_run=False, given=manifest)


def jobset(arguments: argparse.Namespace) -> dict[str, Any]:
    """The manifest (jobset.x-k8s.io/v1alpha2).

    Raises:
      ValueError: a topology that is no whole number of machines.
    """
    node, chips, examples = ACCELERATORS[arguments.accelerator]
    total = math.prod(int(length) for length in arguments.topology.split("x"))
    if total == 0 or total % chips:
        raise ValueError(
            f"--topology={arguments.topology} has {total} chips, which machines of {chips} do not make up; "
            f"{arguments.accelerator} has slices such as {examples}."
        )
    hosts = total // chips
    selector = {"cloud.google.com/gke-tpu-accelerator": node, "cloud.google.com/gke-tpu-topology": arguments.topology}
    spot: dict[str, Any] = {}
    if arguments.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        taint = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        spot = {"tolerations": [taint]}
    container: dict[str, Any] = {
        "name": "train",
        "image": arguments.image,
        "command": ["python", "-m", "sgw_jax", *arguments.command],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],  # of the TPU's library
        "resources": {kind: {"google.com/tpu": chips} for kind in ("requests", "limits")},
    }
    annotations, volumes = {}, {}
    if arguments.bucket:
        container["volumeMounts"] = [{"name": "runs", "mountPath": "/mnt/runs"}]
        source = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": {"bucketName": arguments.bucket}}
        volumes = {"volumes": [{"name": "runs", "csi": source}]}
        annotations = {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}}
    account = {"serviceAccountName": arguments.service_account} if arguments.service_account else {}
    pod = {
        "restartPolicy": "Never",  # all processes start again together, which is the JobSet's business
        "terminationGracePeriodSeconds": arguments.grace_seconds,
        "nodeSelector": selector,
        **spot,
        **account,
        "containers": [_escaped(container)],
        **volumes,
    }
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {**annotations, "spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": arguments.name,
            "namespace": arguments.namespace,
            # One node pool a job: all its pods on one slice.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": arguments.max_restarts},
            "replicatedJobs": [{"name": "workers", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _escaped(container: dict[str, Any]) -> dict[str, Any]:
    """Kubernetes replaces $(NAME) in a command by a variable; $$ is a dollar sign."""
    return container | {"command": [part.replace("$", "$$") for part in container["command"]]}


if __name__ == "__main__":
    sys.exit(main())
