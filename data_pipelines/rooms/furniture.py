"""Random furniture as composites of convex solids: origin on the floor below the middle, back -y, front +y."""

from typing import NamedTuple

import numpy as np

from sgw_jax.data_pipelines.rooms.materials import Material, draw, plain
from sgw_jax.data_pipelines.rooms.solids import Solid, ball, box, cone, legs, limb


class Piece(NamedTuple):
    """One object: its class name, its solids, the half sides (x, y) of the floor it needs, and the height of its top.

    `seat` is the height to sit at (0: no seat); `light` the height of its bulb (0: none).
    """

    name: str
    solids: list[Solid]
    half: tuple[float, float]
    height: float
    seat: float = 0.0
    light: float = 0.0


def between(random: np.random.Generator, low: float, high: float) -> float:
    """A uniform draw."""
    return low + (high - low) * random.random()


def table(random: np.random.Generator, low: bool = False) -> Piece:
    """A dining table, desk or coffee table: a square or round top on four legs, two panels or a pedestal."""
    top, foot = draw(random), draw(random)
    height = between(random, 0.36, 0.48) if low else between(random, 0.70, 0.80)
    x, y = between(random, 0.45, 0.85), between(random, 0.3, 0.45)
    thick = between(random, 0.03, 0.07)
    under = height - thick
    style = random.random()
    if style < 0.35:
        radius = between(random, 0.4, 0.6)
        solids = [
            cone(0, 0, (under, height), (radius, radius), top),
            cone(0, 0, (0.03, under), (0.05, 0.05), foot),
            cone(0, 0, (0, 0.05), (0.55 * radius, 0.45 * radius), foot),
        ]
        return Piece("table", solids, (radius, radius), height)
    solids = [box((-x, x), (-y, y), (under, height), top)]
    if style < 0.8:
        solids += legs(x - 0.05, y - 0.05, under, between(random, 0.04, 0.09), random.random() < 0.4, foot)
    else:
        solids += [box((s * x - 0.03 * (s + 1), s * x + 0.03 * (1 - s)), (-y, y), (0, under), foot) for s in (-1, 1)]
        solids.append(box((-x + 0.06, x - 0.06), (-y + 0.02, -y + 0.05), (0.3 * under, under), foot))
    return Piece("table", solids, (x, y), height)


def chair(random: np.random.Generator) -> Piece:
    """A chair: a seat and a plain or slatted back on four legs or a swivelling pedestal; sometimes with arms."""
    cushion, frame = draw(random), draw(random)
    seat, half = between(random, 0.42, 0.48), between(random, 0.20, 0.25)
    tall = seat + between(random, 0.40, 0.55)
    solids = [box((-half, half), (-half, half), (seat - 0.06, seat), cushion)]
    if random.random() < 0.3:
        solids += [
            cone(0, 0, (0.06, seat - 0.05), (0.03, 0.03), frame),
            cone(0, 0, (0.0, 0.08), (half * 1.1, 0.05), frame),
        ]
    else:
        solids += legs(half - 0.025, half - 0.025, seat - 0.05, 0.045, random.random() < 0.4, frame)
    if random.random() < 0.4:
        slats = 3 + int(random.random() * 3)
        solids += [
            box((x - 0.02, x + 0.02), (-half, -half + 0.03), (seat, tall), frame)
            for x in np.linspace(0.02 - half, half - 0.02, slats)
        ]
        solids.append(box((-half, half), (-half - 0.005, -half + 0.035), (tall - 0.09, tall), cushion))
    else:
        solids.append(box((-half, half), (-half, -half + 0.05), (seat + 0.04, tall), cushion))
    if random.random() < 0.3:
        for side in (-1, 1):
            x = side * (half + 0.01)
            solids.append(box((x - 0.02, x + 0.02), (-half, half - 0.06), (seat + 0.18, seat + 0.22), frame))
            solids.append(box((x - 0.02, x + 0.02), (half - 0.12, half - 0.08), (seat - 0.04, seat + 0.18), frame))
    return Piece("chair", solids, (half, half), tall, seat=seat)


def sofa(random: np.random.Generator) -> Piece:
    """An armchair, a settee or a sofa: base, back, two arms, one to three seat cushions, a few pillows."""
    cloth, cushion = draw(random, 4), draw(random, 6)
    cushion = cloth if random.random() < 0.6 else cushion
    seats = 1 + int(random.random() * 3)
    width, depth = 0.6 * seats + between(random, 0.0, 0.25), between(random, 0.38, 0.46)
    arm = between(random, 0.10, 0.18)
    seat, back, rest = between(random, 0.40, 0.46), between(random, 0.72, 0.92), between(random, 0.54, 0.64)
    half, inner = width / 2 + arm, width / 2
    solids = [
        box((-half, half), (-depth, depth), (0.07, seat - 0.12), cloth),
        box((-half, half), (-depth, -depth + 0.2), (seat - 0.12, back), cloth),
    ]
    for side in (-1, 1):
        ends = sorted((side * inner, side * half))
        if random.random() < 0.3:
            middle = (ends[0] + ends[1]) / 2
            solids.append(
                limb(
                    (middle, -depth + 0.1, rest - arm / 2),
                    (middle, depth - arm / 2, rest - arm / 2),
                    arm / 2 + 0.015,
                    cloth,
                )
            )
        solids.append(box((ends[0], ends[1]), (-depth + 0.2, depth), (seat - 0.12, rest - 0.02), cloth))
    step = width / seats
    for k in range(seats):
        left = -inner + k * step
        solids.append(
            box((left + 0.01, left + step - 0.01), (-depth + 0.2, depth + 0.02), (seat - 0.12, seat), cushion)
        )
    for _ in range(int(random.random() * 3)):
        x = between(random, -inner + 0.2, inner - 0.2)
        solids.append(ball((x, -depth + 0.3, seat + 0.17), (0.2, 0.09, 0.18), draw(random, 8)))
    return Piece("sofa", solids, (half, depth), back, seat=seat)


def bed(random: np.random.Generator) -> Piece:
    """A single or double bed: frame, mattress, blanket, headboard at the back, pillows."""
    wood, sheet, blanket = draw(random), draw(random, 3, 0.5), draw(random, 4)
    double = random.random() < 0.5
    x = between(random, 0.7, 0.85) if double else between(random, 0.45, 0.55)
    y, top = between(random, 0.95, 1.05), between(random, 0.42, 0.58)
    fold = between(random, -0.1, 0.45)
    solids = [
        box((-x, x), (-y, y), (0.08, top - 0.2), wood),
        box((-x + 0.02, x - 0.02), (-y + 0.04, y - 0.02), (top - 0.2, top), sheet),
        box((-x - 0.01, x + 0.01), (-y + 0.7 - fold, y + 0.01), (top - 0.28, top + 0.035), blanket),
        box((-x - 0.02, x + 0.02), (-y - 0.03, -y + 0.04), (0, between(random, 0.75, 1.15)), wood),
        *legs(x - 0.06, y - 0.06, 0.09, 0.08, False, wood),
    ]
    pillow = draw(random, 5, 0.3)
    for centre in (-0.4, 0.4) if double else (0.0,):
        solids.append(ball((centre, -y + 0.28, top + 0.06), (0.3, 0.2, 0.1), pillow))
    return Piece("bed", solids, (x + 0.02, y + 0.03), top + 0.05)


def cabinet(random: np.random.Generator) -> Piece:
    """A wardrobe with doors, a chest of drawers or an open bookshelf."""
    body, front, knob = draw(random, 3), draw(random, 3), plain((0.5, 0.5, 0.5), 0.8)
    front = body if random.random() < 0.5 else front
    x, y, style = between(random, 0.35, 0.75), between(random, 0.2, 0.3), random.random()
    if style < 0.33:
        height = between(random, 1.6, 2.15)
        solids = [box((-x, x), (-y, y), (0, height), body)]
        for side in (-1, 1):
            ends = sorted((side * 0.012, side * (x - 0.03)))
            solids.append(box((ends[0], ends[1]), (y, y + 0.025), (0.08, height - 0.05), front))
            solids.append(ball((side * 0.07, y + 0.05, 0.48 * height), (0.025, 0.03, 0.06), knob))
        return Piece("cabinet", solids, (x, y + 0.03), height)
    if style < 0.66:
        rows, height = 2 + int(random.random() * 3), between(random, 0.7, 1.1)
        solids = [
            box((-x, x), (-y, y), (0.05, height), body),
            box((-x + 0.04, x - 0.04), (-y, y - 0.04), (0, 0.05), body),
        ]
        step = (height - 0.1) / rows
        for k in range(rows):
            low = 0.08 + k * step
            solids.append(box((-x + 0.03, x - 0.03), (y, y + 0.025), (low, low + step - 0.03), front))
            solids += [ball((side * 0.5 * x, y + 0.04, low + step / 2), (0.035, 0.03, 0.025), knob) for side in (-1, 1)]
        return Piece("cabinet", solids, (x, y + 0.03), height)
    return _bookshelf(random, x, 0.7 * y, body, front)


def _bookshelf(random: np.random.Generator, x: float, y: float, body: Material, back: Material) -> Piece:
    rows = 3 + int(random.random() * 3)
    height = rows * between(random, 0.34, 0.42)
    solids = [box((-x, x), (-y, -y + 0.02), (0, height), back)]
    solids += [
        box((min(s * x, s * x - s * 0.03), max(s * x, s * x - s * 0.03)), (-y, y), (0, height), body) for s in (-1, 1)
    ]
    step = (height - 0.04) / rows
    solids += [
        box((-x + 0.03, x - 0.03), (-y + 0.02, y), (k * step + 0.01, k * step + 0.04), body) for k in range(rows + 1)
    ]
    for k in range(rows):
        left = -x + 0.04
        for _ in range(int(random.random() * 3)):  # runs of books, each run one block with an upright pattern
            width = between(random, 0.1, 0.3)
            if left + width > x - 0.05:
                break
            tall = k * step + 0.04 + step * between(random, 0.45, 0.8)
            solids.append(
                box(
                    (left, left + width),
                    (-y + 0.03, y * between(random, 0.3, 0.9)),
                    (k * step + 0.04, tall),
                    draw(random, 9),
                )
            )
            left += width + between(random, 0.0, 0.15)
    return Piece("cabinet", solids, (x, y), height)


def floor_lamp(random: np.random.Generator) -> Piece:
    return _standing_lamp(random, between(random, 1.35, 1.75), between(random, 0.16, 0.24), between(random, 0.12, 0.16))


def table_lamp(random: np.random.Generator) -> Piece:
    return _standing_lamp(random, between(random, 0.42, 0.6), between(random, 0.12, 0.18), between(random, 0.07, 0.1))


def _standing_lamp(random: np.random.Generator, height: float, shade: float, foot: float) -> Piece:
    metal, cloth = draw(random, busy=0.2), draw(random, 8, 0.3)
    tall = height * (0.2 if height > 1 else 0.45)
    light = height - tall / 2 if random.random() < 0.6 else 0.0
    cloth = cloth._replace(glow=between(random, 0.8, 2.0) if light else 0.0)
    solids = [
        cone(0, 0, (0, 0.03), (foot, 0.9 * foot), metal),
        cone(0, 0, (0.03, height - 0.5 * tall), (0.018, 0.018), metal),
    ]
    if random.random() < 0.25:
        radius = shade * 0.9
        solids.append(ball((0, 0, height - radius), (radius, radius, radius), cloth))
    else:
        solids.append(cone(0, 0, (height - tall, height), (shade, shade * between(random, 0.35, 0.9)), cloth))
    if height < 1 and random.random() < 0.6:
        solids.append(ball((0, 0, 0.13), (0.75 * foot, 0.75 * foot, 0.12), metal))
    return Piece("lamp", solids, (shade, shade), height, light=light)


def pendant_lamp(random: np.random.Generator) -> Piece:
    """Hangs from z = 0 downwards."""
    cord, cloth = plain((0.05, 0.05, 0.05)), draw(random, 8, 0.3)
    drop, radius = between(random, 0.35, 0.8), between(random, 0.14, 0.26)
    lit = random.random() < 0.6
    cloth = cloth._replace(glow=between(random, 0.8, 2.0) if lit else 0.0)
    solids = [cone(0, 0, (-drop, 0), (0.012, 0.012), cord), cone(0, 0, (-0.04, 0), (0.06, 0.06), cord)]
    if random.random() < 0.4:
        solids.append(ball((0, 0, -drop - radius), (radius, radius, radius), cloth))
    else:
        solids.append(cone(0, 0, (-drop - radius, -drop), (radius, 0.3 * radius), cloth))
    return Piece("lamp", solids, (radius, radius), 0.0, light=-drop - 0.5 * radius if lit else 0.0)


def clutter(random: np.random.Generator, small: bool = False) -> Piece:
    """A ball, vase, potted plant or stack of boxes: things that the segmentation leaves unlabelled."""
    scale, style = (0.55 if small else 1.0), random.random()
    one, two = draw(random, 8), draw(random, 8)
    if style < 0.25:
        r = scale * between(random, 0.11, 0.22)
        return Piece("clutter", [ball((0, 0, r), (r, r, r), one)], (r, r), 2 * r)
    if style < 0.5:
        r, h = scale * between(random, 0.09, 0.15), scale * between(random, 0.3, 0.5)
        solids = [cone(0, 0, (0, 0.5 * h), (0.6 * r, r), one), cone(0, 0, (0.5 * h, 0.85 * h), (r, 0.4 * r), one)]
        return Piece("clutter", [*solids, cone(0, 0, (0.85 * h, h), (0.4 * r, 0.6 * r), one)], (r, r), h)
    if style < 0.75:
        r, h = scale * between(random, 0.13, 0.2), scale * between(random, 0.25, 0.35)
        solids = [cone(0, 0, (0, h), (0.75 * r, r), one)]
        leaf = scale * between(random, 0.18, 0.3)
        for angle in np.arange(3) * 2.1 + random.random():
            x, y = 0.5 * leaf * np.cos(angle), 0.5 * leaf * np.sin(angle)
            solids.append(ball((float(x), float(y), h + 0.8 * leaf), (0.5 * leaf, 0.5 * leaf, leaf), two))
        return Piece("clutter", solids, (leaf, leaf), h + 1.8 * leaf)
    x, y, h = (scale * between(random, 0.12, 0.28) for _ in range(3))
    solids = [box((-x, x), (-y, y), (0, h), one)]
    if random.random() < 0.5:
        solids.append(box((-0.8 * x, 0.7 * x), (-0.7 * y, 0.8 * y), (h, 1.7 * h), two))
    return Piece("clutter", solids, (x, y), 1.7 * h)
