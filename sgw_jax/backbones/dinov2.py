"""DINOv2 (Oquab et al. 2023), plain and with registers (Darcet et al. 2024): a ViT of patches of 14 pixels."""

from sgw_jax.backbones.vit import SIZES as VIT_SIZES
from sgw_jax.backbones.vit import Size, ViT, sized

SIZES: dict[str, Size] = {
    **{name: VIT_SIZES[name] for name in ("small", "base", "large")},
    "giant": Size(1536, 40, 24, mlp_ratio=4096 / 1536, gated=True),
}


def dinov2(size: str = "small", registers: int = 0, **overrides) -> ViT:
    """A ViT as DINOv2 trains it: class token, layer scale, by default a position embedding for 518 x 518 pixels.

    With ``registers`` (4 in the published weights) the position embedding is interpolated with antialiasing, as the
    original does. Sizes are "small", "base", "large" and "giant"; any attribute of `ViT` can be overridden.
    """
    published = {"patch_size": 14, "class_token": True, "layer_scale": 1e-5, "image_size": (518, 518)}
    return sized("dinov2", SIZES, size, {**published, "registers": registers, "antialias": registers > 0, **overrides})
