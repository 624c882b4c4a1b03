"""The configuration of real.py: photographs with the labels of ../shared/data, from pretrained DINOv2-S.

Its values are written down here and not taken from configs/people.py, so that a comparison goes on as it began.
"""

from pathlib import Path

from sgw_jax.configs import base

PEOPLE = ("semseg", "human_parts", "saliency", "edges")


def get_config(arg: str | None = None):
    """root: the folder that holds people/; tuned: frozen, or lora."""
    config = base.get_config()
    options = base.parse_arg(arg, root="", tuned="frozen")
    config.data.update({"source": "folder", "root": str(Path(options["root"]) / "people")})
    config.data.update({"num_classes": 14, "num_parts": 7, "size": (224, 112)})
    config.augment.update({"flip": False, "colour": False})  # under three passes over the data, which taps can serve
    config.tasks = PEOPLE

    config.backbone = "dinov2"
    config.channels = 64
    config.stride = 8
    config.upsample = "subpixel"
    for name in ("kem", "skem", "within_tasks"):
        config.interactions[name].update({"pre_norm": True, "task_gate": True})
    config.interactions.cross_attention.pre_norm = True

    config.batch_size = 8
    # Muon's products for the pyramid's kernels would be as much work as all the rest of a step from cached taps.
    config.optimizer.update({"name": "adamw", "weight_decay": 0.01})
    config.schedule.update({"name": "cosine", "warmup_steps": 20})
    config.ema_decay = 0.98
    if options["tuned"] == "lora":
        config.lora.rank = 8
    else:
        config.optimizer.backbone_scale = 0.0
    return config
