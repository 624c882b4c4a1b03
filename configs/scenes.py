"""Six tasks on procedural indoor scenes, on a laptop.

Command:   python -m sgw_jax train --config=configs/scenes.py --workdir=runs/scenes
Hardware:  2 CPU cores; unchanged on 1, 2, 4 or 8 GPUs or TPU chips (docs/scaling.md: --config.mesh.name)
Time:      five to six minutes; results in docs/accuracy.md
Variants:  --config=configs/scenes.py:interaction=none,tasks=semseg+depth
"""

from sgw_jax.configs import base


def get_config(arg: str | None = None):
    """interaction: a key of config.interactions; tasks: names joined by "+"."""
    config = base.get_config()
    options = base.parse_arg(arg, interaction="kem", tasks="+".join(config.tasks))
    config.interaction = options["interaction"]
    config.tasks = tuple(options["tasks"].split("+"))

    config.data.lengths.validation = 128
    config.augment.colour = False  # four passes over the data are too few to need more than the flip
    config.backbones.vit.update({"width": 96, "depth": 4, "num_heads": 3, "patch_size": 8, "patch_embed": "conv"})
    config.channels = 32
    config.upsample = "subpixel"
    for name in ("kem", "skem", "within_tasks"):
        # Without the gates KEM costs semseg and normals accuracy, and sKEM edges (docs/accuracy.md).
        config.interactions[name].update({"pre_norm": True, "task_gate": True})
    config.interactions.skem.etf_vertices = 32
    config.interactions.cross_attention.update({"pre_norm": True})

    # InvPT's weights are made for 40,000 steps from a pretrained backbone; from scratch in minutes, classes need more.
    config.task_weights.update(
        {"semseg": 4.0, "depth": 8.0, "normals": 5.0, "edges": 20.0, "saliency": 3.0, "human_parts": 20.0}
    )

    config.steps = 1000
    config.batch_size = 8
    # With AdamW the network does not leave "all background" on human parts (docs/accuracy.md).
    config.optimizer.update(
        {"name": "muon", "learning_rate": 1.5e-3, "muon_rms": 1.0, "weight_decay": 0.02, "clip_norm": None}
    )
    config.schedule.update({"name": "cosine", "warmup_steps": 60})
    config.ema_decay = 0.99
    config.checkpoint_every = 250
    config.eval_every = 250
    return config
