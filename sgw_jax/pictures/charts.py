"""The report's line charts, as points and ticks for the template to draw as SVG."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

CURVE_POINTS = 160  # a training curve is averaged over this many intervals of steps
Values = Mapping[str, Any]
Record = dict[str, Any]
PLOT = {"width": 340.0, "height": 190.0, "left": 50.0, "right": 8.0, "top": 10.0, "bottom": 24.0}


def loss_curves(tasks: Sequence[str], history: Sequence[Values]) -> list[Record]:
    """A small chart for every loss, the gradient's norm and the learning rate; with task gradients also for the weights
    of the tasks, the share of conflicting pairs and the cosine of each pair."""
    names = {"loss": "all tasks, weighted"} | {f"loss/{task}": task for task in tasks}
    names |= {"grad_norm": "gradient norm", "learning_rate": "learning rate"}
    names |= {f"weight/{task}": f"weight of {task}" for task in tasks}
    names |= {"conflict_rate": "share of conflicting pairs"}
    names |= {f"cosine/{a}-{b}": f"cosine of {a} and {b}" for i, a in enumerate(tasks) for b in tasks[i + 1 :]}
    charts = []
    for key, title in names.items():
        train, validation = _series(history, "train", key), _series(history, "validation", key)
        if train or validation:
            last = max(step for step, _ in (*train, *validation))
            charts.append({"title": title, **_chart(_binned(train), validation, last)})
    return charts


def _series(history: Sequence[Values], split: str, key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in history if line["split"] == split and finite(line.get(key))]


def _binned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over equal numbers of neighbouring points, where there are too many to draw."""
    if len(points) <= CURVE_POINTS:
        return points
    means = [np.mean(part, axis=0) for part in np.array_split(np.asarray(points), CURVE_POINTS)]
    return [(float(step), float(value)) for step, value in means]


def _chart(train: Sequence[tuple[float, float]], validation: Sequence[tuple[float, float]], last: float) -> Record:
    """Points and ticks in the units of the drawing; the vertical axis is logarithmic where the values span decades."""
    everything = [*train, *validation]
    values = [value for _, value in everything]
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low > 10
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    bottom, top = scale(low), scale(high)
    margin = 0.05 * (top - bottom) or abs(top) * 0.1 or 1.0
    bottom, top = bottom - margin, top + margin
    last = last or 1
    inner_width = PLOT["width"] - PLOT["left"] - PLOT["right"]
    inner_height = PLOT["height"] - PLOT["top"] - PLOT["bottom"]

    def x(step: float) -> float:
        return round(PLOT["left"] + inner_width * step / last, 1)

    def y(value: float) -> float:
        return round(PLOT["top"] + inner_height * (top - scale(value)) / (top - bottom), 1)

    steps = [step for step in _ticks(0, last) if step == round(step)]  # none lies between two
    ticks = _log_ticks(bottom, top) if logarithmic else _ticks(bottom, top)
    return {
        **PLOT,
        "train": [(x(step), y(value)) for step, value in train],
        "validation": [(x(step), y(value)) for step, value in validation],
        "x_ticks": [(x(step), _step_text(step, last), _anchor(step / last)) for step in steps],
        "y_ticks": [(y(tick), _value_text(tick)) for tick in ticks],
        "last": ", ".join(
            f"{name} {points[-1][1]:.3g}" for name, points in (("train", train), ("validation", validation)) if points
        ),
        "logarithmic": logarithmic,
    }


def _ticks(low: float, high: float) -> list[float]:
    """Two to seven round numbers between low and high."""
    rough = (high - low) / 5.5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between 10^low and 10^high: powers of ten, with 2 and 5 between where there is room."""
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    decades = range(math.floor(low), math.floor(min(high, 307)) + 1, math.ceil((high - low) / 8))
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def _step_text(step: float, last: float) -> str:
    """In thousands where the numbers would meet."""
    return f"{step:,.0f}" if last < 100_000 or not step else f"{step / 1000:,.0f}k"


def _anchor(place: float) -> str:
    """How a label stands at its place, in [0, 1] of the axis: never beyond the drawing's edges, which would cut it."""
    return "start" if place < 0.08 else "end" if place > 0.92 else "middle"


def _value_text(value: float) -> str:
    """At most seven characters but for a sign: 0.0015, 1.25e-4."""
    plain = f"{value:.3g}"
    if len(plain) <= 6:
        return plain
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)
