"""A jointed human figure of ellipsoids and capsules in a random standing, walking or sitting pose; faces +y."""

import math

import numpy as np

from sgw_jax.data_pipelines.rooms.furniture import Piece
from sgw_jax.data_pipelines.rooms.materials import Material, colour, draw, plain
from sgw_jax.data_pipelines.rooms.solids import Solid, Vector, ball, limb

HEAD, TORSO, UPPER_ARMS, LOWER_ARMS, UPPER_LEGS, LOWER_LEGS = range(1, 7)


def _step(start: Vector, length: float, side: float, forward: float, outward: float) -> Vector:
    """The far joint of a limb hanging from `start`, swung `forward` and `outward` (radians) to its `side` (+-1)."""
    x, y, z = start
    return (
        x + side * length * math.sin(outward),
        y + length * math.cos(outward) * math.sin(forward),
        z - length * math.cos(outward) * math.cos(forward),
    )


def _towards(start: Vector, end: Vector, beyond: float) -> Vector:
    """The point `beyond` metres past `end` on the line from `start`."""
    length = math.dist(start, end)
    x, y, z = (b + (b - a) * beyond / length for a, b in zip(start, end, strict=True))
    return x, y, z


def _lean(angle: float) -> tuple[float, ...]:
    """Row-major rotation into the frame of something that leans forward by `angle`."""
    c, s = math.cos(angle), math.sin(angle)
    return (1.0, 0.0, 0.0, 0.0, c, -s, 0.0, s, c)


def person(random: np.random.Generator, seat: float = 0.0) -> Piece:
    """A figure 1.5 to 1.9 m tall, its feet at z = 0; with `seat` > 0 it sits at that height above the origin."""
    tall = 1.5 + 0.4 * random.random()
    tone = 0.25 + 0.75 * random.random()
    skin = plain((0.75 * tone**1.2, 0.52 * tone**1.6, 0.40 * tone**1.9), 0.15)
    shirt, trousers = draw(random, 7), draw(random, 6, busy=0.4)
    shoes, hair = plain(colour(random)), plain(colour(random, 0.05, 0.7))
    sleeves, shorts = random.random() < 0.5, random.random() < 0.25
    legs, sole = _legs(random, tall, seat, trousers, skin if shorts else trousers, shoes)
    hip = (0.0, 0.0, seat + 0.06 * tall if seat else -sole)
    solids = [*legs, *_trunk(random, tall, bool(seat), shirt, trousers, skin, hair, shirt if sleeves else skin)]
    raised = [s._replace(centre=(s.centre[0], s.centre[1], s.centre[2] + hip[2])) for s in solids]
    reach = (0.2 * tall, 0.2 * tall if not seat else 0.4 * tall)
    return Piece("person", raised, reach, tall if not seat else seat + 0.55 * tall)


def _legs(
    random: np.random.Generator, tall: float, seat: float, upper: Material, lower: Material, shoes: Material
) -> tuple[list[Solid], float]:
    """Both legs below hips at the origin, and the height of the lower sole."""
    solids, sole = [], 0.0
    stride = 0.5 * random.random() if random.random() < 0.5 else 0.05
    for side in (-1.0, 1.0):
        if seat:
            swing, bend = 1.35 + 0.2 * random.random(), 1.2 + 0.5 * random.random()
        else:
            swing = side * stride
            bend = 0.08 + (0.7 * stride if swing < 0 else 0.2 * stride)
        spread = 0.04 + 0.14 * random.random()
        hip = (side * 0.058 * tall, 0.0, -0.01 * tall)
        knee = _step(hip, 0.235 * tall, side, swing, spread)
        ankle = _step(knee, 0.225 * tall, side, swing - bend, 0.3 * spread)
        toe = (ankle[0] + 0.02 * side, ankle[1] + 0.075 * tall, ankle[2] - 0.018 * tall)
        heel = (ankle[0], ankle[1] - 0.01 * tall, ankle[2] - 0.018 * tall)
        solids.append(limb(hip, knee, 0.048 * tall, upper, UPPER_LEGS))
        solids.append(limb(knee, ankle, 0.034 * tall, lower, LOWER_LEGS))
        solids.append(limb(heel, toe, 0.026 * tall, shoes, LOWER_LEGS))
        sole = min(sole, toe[2] - 0.026 * tall)
    return solids, sole


def _trunk(
    random: np.random.Generator,
    tall: float,
    sitting: bool,
    shirt: Material,
    trousers: Material,
    skin: Material,
    hair: Material,
    sleeve: Material,
) -> list[Solid]:
    """Torso, head and arms above hips at the origin."""
    lean = 0.25 * (random.random() - 0.4)
    turn = _lean(lean)

    def up(height: float, x: float = 0.0, y: float = 0.0) -> Vector:
        return (
            x * tall,
            (y * math.cos(lean) + height * math.sin(lean)) * tall,
            (height * math.cos(lean) - y * math.sin(lean)) * tall,
        )

    solids = [
        ball(up(0.015), (0.105 * tall, 0.075 * tall, 0.075 * tall), trousers, turn, TORSO),
        ball(up(0.165), (0.115 * tall, 0.075 * tall, 0.165 * tall), shirt, turn, TORSO),
        limb(up(0.275, -0.085), up(0.275, 0.085), 0.042 * tall, shirt, TORSO),
        limb(up(0.29), up(0.36), 0.032 * tall, skin, TORSO),
        ball(up(0.405, 0, 0.012), (0.05 * tall, 0.058 * tall, 0.068 * tall), skin, turn, HEAD),
        ball(up(0.422, 0, -0.006), (0.055 * tall, 0.06 * tall, 0.06 * tall), hair, turn, HEAD),
    ]
    for side in (-1.0, 1.0):
        forward, outward = (1.3 * random.random() - 0.3, 0.1 + 0.5 * random.random() ** 2)
        if random.random() < 0.12:
            forward, outward = 2.5 * random.random() + 0.3, 0.3  # reaching or waving
        bend = 0.1 + 1.5 * random.random() + (0.5 if sitting else 0.0)
        shoulder = up(0.275, side * 0.118)
        elbow = _step(shoulder, 0.165 * tall, side, forward, outward)
        wrist = _step(elbow, 0.145 * tall, side, forward + bend, 0.4 * outward)
        solids.append(limb(shoulder, elbow, 0.031 * tall, shirt, UPPER_ARMS))
        solids.append(limb(elbow, wrist, 0.025 * tall, sleeve, LOWER_ARMS))
        solids.append(limb(wrist, _towards(elbow, wrist, 0.04 * tall), 0.026 * tall, skin, LOWER_ARMS))
    return solids
