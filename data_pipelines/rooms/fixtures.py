"""What belongs to the room itself: rugs, and windows, doors and pictures, which need a stretch of wall but no floor."""

import numpy as np

from sgw_jax.data_pipelines.rooms.furniture import Piece, between
from sgw_jax.data_pipelines.rooms.materials import GRADIENT, Material, draw, plain
from sgw_jax.data_pipelines.rooms.solids import box, cone, limb


def window(random: np.random.Generator) -> Piece:
    """Against a wall, middle at z = 0: a glowing pane behind a frame with glazing bars, and a sill."""
    x, z, frame = between(random, 0.4, 0.8), between(random, 0.45, 0.65), draw(random, busy=0.2)
    sky, land = (between(random, 0.4, 0.8), between(random, 0.5, 0.9), between(random, 0.6, 1.0)), draw(random).first
    glow = between(random, 0.5, 1.8) if random.random() < 0.8 else 0.02
    wavy = (0.0, 0.0, 1.6, 2.0, 0.0, 1.0, 0.0, 0.0, 3.0)
    pane = Material(GRADIENT, land, sky, wavy, (random.random() * 0.4 - 0.1, random.random(), 0.0), 0.4, glow, True)
    solids = [box((-x, x), (0, 0.01), (-z, z), pane)]
    solids += [box((s * x - 0.035, s * x + 0.035), (0, 0.06), (-z, z), frame) for s in (-1, 1)]
    solids += [box((-x - 0.035, x + 0.035), (0, 0.06), (s * z - 0.035, s * z + 0.035), frame) for s in (-1, 1)]
    bars = int(random.random() * 3)
    solids += [
        box((b - 0.02, b + 0.02), (0, 0.04), (-z, z), frame) for b in np.linspace(-x, x, bars + 2)[1:-1].tolist()
    ]
    if random.random() < 0.6:
        solids.append(box((-x, x), (0, 0.04), (-0.02, 0.02), frame))
    solids.append(box((-x - 0.08, x + 0.08), (0, 0.14), (-z - 0.07, -z - 0.035), frame))
    return Piece("window", solids, (x + 0.1, 0), z)


def door(random: np.random.Generator) -> Piece:
    """Against a wall: a slab with two sunken panels' rims, a frame and a handle."""
    x, height = between(random, 0.38, 0.48), between(random, 1.95, 2.1)
    frame, slab = draw(random, busy=0.3), draw(random, 3)
    solids = [box((-x, x), (0, 0.03), (0, height), slab)]
    solids += [box((s * x - 0.05, s * x + 0.05), (0, 0.06), (0, height + 0.05), frame) for s in (-1, 1)]
    solids.append(box((-x - 0.05, x + 0.05), (0, 0.06), (height, height + 0.1), frame))
    if random.random() < 0.6:
        for low, high in ((0.12, 0.42), (0.52, 0.93)):
            solids.append(box((-0.65 * x, 0.65 * x), (0, 0.045), (low * height, high * height), frame))
    side = 0.8 * x * (-1 if random.random() < 0.5 else 1)
    solids.append(limb((side, 0.08, 1.0), (0.7 * side, 0.08, 1.0), 0.022, plain((0.6, 0.55, 0.4), 0.9)))
    return Piece("door", solids, (x + 0.1, 0), height + 0.1)


def picture(random: np.random.Generator) -> Piece:
    """Against a wall, middle at z = 0: a framed canvas. Belongs to the wall."""
    x, z = between(random, 0.2, 0.5), between(random, 0.2, 0.4)
    solids = [
        box((-x, x), (0, 0.03), (-z, z), draw(random)),
        box((0.05 - x, x - 0.05), (0, 0.035), (0.05 - z, z - 0.05), draw(random, 3, busy=1)),
    ]
    return Piece("wall", solids, (x + 0.1, 0), z)


def rug(random: np.random.Generator) -> Piece:
    """On the floor, rectangular or round. Belongs to the floor."""
    cloth, x, y = draw(random, 2, busy=0.9), between(random, 0.6, 1.2), between(random, 0.5, 0.9)
    if random.random() < 0.3:
        return Piece("floor", [cone(0, 0, (0, 0.012), (x, x), cloth)], (x, x), 0.012)
    border = box((-x - 0.06, x + 0.06), (-y - 0.06, y + 0.06), (0, 0.01), draw(random, busy=0))
    return Piece("floor", [border, box((-x, x), (-y, y), (0, 0.014), cloth)], (x, y), 0.014)
