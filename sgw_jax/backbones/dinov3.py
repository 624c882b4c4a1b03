"""DINOv3's vision transformers (Simeoni et al. 2025): rotary positions, registers, no bias of the keys."""

from sgw_jax.backbones.vit import SIZES as VIT_SIZES
from sgw_jax.backbones.vit import Size, ViT, sized

THETA = 100.0  # of the rotary positions
EPSILON = 1e-5  # of the layer norms

SIZES: dict[str, Size] = {
    "small": VIT_SIZES["small"],
    "small_plus": Size(384, 12, 6, gated=True),
    "base": VIT_SIZES["base"],
    "large": VIT_SIZES["large"],
    "huge_plus": Size(1280, 32, 20, gated=True),
    "7b": Size(4096, 40, 32, mlp_ratio=2.0, gated=True),
}


def dinov3(size: str = "small", **overrides) -> ViT:
    """A ViT as DINOv3 trains it: patches of 16 pixels, class token, four registers, layer scale, rotary positions.

    Sizes are "small" (S), "small_plus" (S+), "base" (B), "large" (L), "huge_plus" (H+) and "7b"; those with a plus and
    7b have gated MLPs, and 7b no bias of queries and values. Any attribute of `ViT` can be overridden.
    """
    published = {
        "patch_size": 16,
        "class_token": True,
        "registers": 4,
        "rope_theta": THETA,
        "layer_scale": 1e-5,
        "epsilon": EPSILON,
        "qkv_bias": "none" if size == "7b" else "query_value",
    }
    return sized("dinov3", SIZES, size, {**published, **overrides})
