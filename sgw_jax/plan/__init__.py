"""What a configuration costs, before it is run: by module (`network`), and on the devices of a slice (`pod`)."""

from sgw_jax.plan.network import Plan, plan, print_plan
from sgw_jax.plan.pod import PodPlan, pod_plan, print_pod_plan, topology_devices

__all__ = ["Plan", "PodPlan", "plan", "pod_plan", "print_plan", "print_pod_plan", "topology_devices"]
