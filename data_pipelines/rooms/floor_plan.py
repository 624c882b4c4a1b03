"""The floor plan of a room while it is being furnished: its size, the camera, and what may still stand where."""

import math
from typing import NamedTuple

import numpy as np

from sgw_jax.data_pipelines.rooms.furniture import Piece


class Placed(NamedTuple):
    piece: Piece
    x: float
    y: float
    z: float
    yaw: float

    def at(self, right: float, forward: float) -> tuple[float, float]:
        """The floor point that lies (right, forward) in the object's own frame."""
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        return self.x + c * right - s * forward, self.y + s * right + c * forward


def turned_half(half: tuple[float, float], yaw: float) -> tuple[float, float]:
    """Half sides of the upright rectangle around a turned one."""
    c, s = abs(math.cos(yaw)), abs(math.sin(yaw))
    return c * half[0] + s * half[1], s * half[0] + c * half[1]


class FloorPlan:
    """The floor plan while it is being filled: where the camera looks, and which rectangles are taken."""

    def __init__(self, random: np.random.Generator):
        self.random = random
        self.size = (self.between(3.2, 5.6), self.between(3.4, 5.8), self.between(2.35, 2.9))
        length, width, _ = self.size
        self.field_of_view = math.radians(self.between(58, 80))
        self.eye = (self.between(0.12, 0.88) * length, self.between(0.25, 0.7), self.between(1.15, 1.75))
        target = (length / 2 + self.between(-0.22, 0.22) * length, self.between(0.6, 0.9) * width)
        self.yaw = math.atan2(target[1] - self.eye[1], target[0] - self.eye[0])
        self.pitch = math.radians(self.between(-17, 3) - 9 * (self.eye[2] - 1.15))
        self.placed: list[Placed] = []
        self.taken: list[tuple[float, float, float, float]] = []

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.random.random()

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def in_view(self, x: float, y: float, margin: float = 0.0) -> bool:
        bearing = math.atan2(y - self.eye[1], x - self.eye[0]) - self.yaw
        return abs(math.remainder(bearing, 2 * math.pi)) < self.field_of_view / 2 + margin

    def free(self, x: float, y: float, half: tuple[float, float], clear: float) -> bool:
        """Whether a rectangle lies in the room, off everything placed and `clear` metres off the camera."""
        a, b = half
        if not (a <= x <= self.size[0] - a and b <= y <= self.size[1] - b):
            return False
        gap_x, gap_y = max(abs(self.eye[0] - x) - a, 0.0), max(abs(self.eye[1] - y) - b, 0.0)
        if math.hypot(gap_x, gap_y) < clear:
            return False
        return not any(abs(x - u) < a + c and abs(y - v) < b + d for u, v, c, d in self.taken)

    def put(
        self, piece: Piece, x: float, y: float, yaw: float, z: float = 0.0, reserve: tuple[float, float] | None = None
    ) -> Placed:
        """At a given place, whatever stands there; `reserve` keeps a rectangle of floor free of what comes later."""
        self.placed.append(Placed(piece, x, y, z, yaw))
        if reserve is not None:
            self.taken.append((x, y, *reserve))
        return self.placed[-1]

    def stand(self, piece: Piece, clear: float = 0.9, margin: float = -0.05, tries: int = 14) -> Placed | None:
        """Somewhere on the free floor in view, turned at random."""
        for _ in range(tries):
            x, y, yaw = self.between(0, self.size[0]), self.between(0, self.size[1]), self.between(-math.pi, math.pi)
            if self.chance(0.4):
                yaw = round(yaw / (math.pi / 2)) * (math.pi / 2)
            half = turned_half(piece.half, yaw)
            if self.in_view(x, y, margin) and self.free(x, y, half, clear):
                return self.put(piece, x, y, yaw, reserve=(half[0] + 0.02, half[1] + 0.02))
        return None

    def lean(self, piece: Piece, tries: int = 14, z: float = 0.0, clear: float = 0.7) -> Placed | None:
        """With its back to one of the three walls in view."""
        for _ in range(tries):
            wall = int(self.random.random() * 3)
            depth, along = piece.half[1] + 0.005, self.random.random()
            length, width, _ = self.size
            if wall == 0:
                x, y, yaw = along * length, width - depth, math.pi
            elif wall == 1:
                x, y, yaw = depth, along * width, -math.pi / 2
            else:
                x, y, yaw = length - depth, along * width, math.pi / 2
            half = turned_half(piece.half, yaw)
            if self.in_view(x, y, 0.1) and self.free(x, y, half, clear):
                return self.put(piece, x, y, yaw, z, (half[0] + 0.02, half[1] + 0.02))
        return None
