"""People in photographs: clothing (14 classes), human parts (7), saliency and edges, from pretrained DINOv2 features.

Command:   python -m sgw_jax train --config=people --config.data.root=DIR --config.backbone_weights=WEIGHTS
           --config.backbone_cache=features --workdir=runs/people
Weights:   WEIGHTS is a hub folder of a DINOv2 ViT-S/14 (docs/backbones.md). It is frozen: what it makes of the images
           is computed once, into the directory that backbone_cache names (1.07 GB), and read in every step and by
           every other run on these images.
Data:      DIR as in docs/your-data.md; of other people, clothes and counts set data.num_classes, class_names, num_parts
           and part_names. The result is of Clothing Co-Parsing (700 photographs of 336 x 168 for training, 54 for
           validation, 150 for testing).
Hardware:  2 CPU cores.
Time:      about 900 s of processor time, two cores side by side; less once the features are there.
Result:    on test 43.8 % mIoU of clothing, 65.8 % of parts, 97.1 % max-F of saliency and 47.9 % of edges (validation:
           44.1, 63.9, 97.1, 47.0).
Variants:  --config=people:interaction=none,tasks=semseg+edges
           fine-tuned: --config.optimizer.backbone_scale=0.03 --config.optimizer.layer_decay=0.75, or low-rank updates
           alone, --config.lora.rank=8 --config.optimizer.lora_scale=0.1; both without backbone_cache, and several times
           slower.
"""

from sgw_jax.configs import base

TASKS = ("semseg", "human_parts", "saliency", "edges")
CLOTHING = (
    "background", "hair", "skin", "top", "outer", "dress", "skirt", "trousers", "legwear", "shoes", "bag", "hat",
    "glasses", "accessory",
)  # fmt: skip
PARTS = ("background", "head", "skin", "upper", "lower", "feet", "dress")


def get_config(arg: str | None = None):
    """interaction: a key of config.interactions; tasks: names joined by "+"."""
    config = base.get_config()
    options = base.parse_arg(arg, interaction="kem", tasks="+".join(TASKS))
    config.interaction = options["interaction"]
    config.tasks = tuple(options["tasks"].split("+"))

    config.data.source = "folder"
    config.data.num_classes, config.data.class_names = len(CLOTHING), CLOTHING
    config.data.num_parts, config.data.part_names = len(PARTS), PARTS
    config.data.size = (336, 168)
    config.augment.update({"flip": False, "colour": False})  # in three passes over the data neither is missed

    config.backbone = "dinov2"
    config.optimizer.backbone_scale = 0.0
    config.channels = 64
    config.stride = 8
    config.upsample = "subpixel"
    for name in ("kem", "skem", "within_tasks"):
        config.interactions[name].update({"pre_norm": True, "task_gate": True})
    config.interactions.cross_attention.update({"pre_norm": True})

    config.steps = 300
    config.batch_size = 8
    config.optimizer.update(
        {"name": "muon", "learning_rate": 1.5e-3, "muon_rms": 1.0, "weight_decay": 0.02, "clip_norm": None}
    )
    config.schedule.update({"name": "cosine", "warmup_steps": 30})
    config.ema_decay = 0.99
    config.checkpoint_every = 100
    config.eval_every = 100
    return config
