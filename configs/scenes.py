"""Six tasks on procedural indoor scenes, on a laptop.

Command:   python -m sgw_jax train --config=configs/scenes.py --workdir=runs/scenes
Hardware:  2 CPU cores; unchanged on GPUs and TPUs (--config.mesh.data, --config.mesh.fsdp)
Variants:  --config=configs/scenes.py:interaction=none,tasks=semseg+depth
"""

from configs import base


def get_config(arg: str | None = None):
    """interaction: none | cross_attention | kem | skem; tasks: names joined by "+"."""
    config = base.get_config()
    options = base.parse_arg(arg, interaction="kem", tasks="+".join(config.tasks))
    config.interaction = options["interaction"]
    config.tasks = tuple(options["tasks"].split("+"))

    config.augment.scale = (1.0, 1.3)
    config.backbones.vit.update({"width": 96, "depth": 4, "num_heads": 3, "patch_size": 8, "patch_embed": "conv"})
    config.channels = 48
    config.upsample = "subpixel"
    for name in ("kem", "skem"):
        config.interactions[name].update({"num_heads": 2, "pre_norm": True})
    config.interactions.skem.etf_vertices = 48
    config.interactions.cross_attention.update({"num_heads": 2, "pre_norm": True})

    config.steps = 600
    config.batch_size = 16
    config.optimizer.update({"learning_rate": 1.5e-3, "weight_decay": 0.02, "clip_norm": 5.0})
    config.schedule.update({"name": "cosine", "warmup_steps": 60})
    config.ema_decay = 0.99
    config.checkpoint_every = 100
    config.eval_every = 300
    return config
