"""The page's result as HTML: a picture per task with its legend, and the values that the script reads."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from sgw_jax.demo.codes import encode, sampled
from sgw_jax.pictures.panels import BARS, Drawn, colour_range, present
from sgw_jax.tasks.base import Legend
from sgw_jax.tasks.normals import AXES, Normals

LISTED = 12  # classes of a legend, the most frequent first
NARROWEST, WIDEST = 130, 250  # pixels that a column has at least, by the pictures' shape
COLUMNS = 3  # at most; of upright pictures twice as many
RAMP = 24  # colours of a bar

EMPTY = '<div class="sgw-note">Drop a photograph, paste one, or use the webcam.</div>'


def view(maps: Mapping[str, np.ndarray], drawn: Sequence[Drawn], about: str) -> str:
    """The pictures of all maps.

    Args:
      maps: by name, as `Predictor` returns them for one image.
      drawn: what they are: tasks, and how sure the network is of them.
      about: a line above them.
    """
    figures = "".join(_figure(shown, maps[shown.name]) for shown in drawn)
    hint = "Move over a picture, or tap it, to read what is there."
    height, width = maps[drawn[0].name].shape[:2]
    least = max(NARROWEST, min(WIDEST, round(WIDEST * width / height)))  # upright pictures stand closer together
    most = COLUMNS if width * 4 >= height * 3 else 2 * COLUMNS
    return (
        f'<div class="sgw-about">{text(about)} {hint}</div>'
        f'<div class="sgw-view" style="--sgw-least:{least}px;--sgw-most:{most}">{figures}</div>'
    )


def refusal(message: str) -> str:
    """What is shown in place of the pictures."""
    return f'<div class="sgw-note sgw-refusal" role="alert">{text(message)}</div>'


def heading(title: str, tasks: Sequence[Drawn], remark: str) -> str:
    """The page's first lines."""
    names = ", ".join(_title(task) for task in tasks).capitalize()
    return f'<div class="sgw-heading"><h1>{text(title)}</h1><p>{text(names)}. {text(remark)}</p></div>'


def text(words: str) -> str:
    """As HTML that is these words, in gradio's templates too, which give braces and dollars a meaning."""
    escaped = html.escape(words)
    for sign in "{}$`":
        escaped = escaped.replace(sign, f"&#{ord(sign)};")
    return escaped


def _title(task: Drawn) -> str:
    return task.name.replace("_", " ").capitalize()


def _figure(task: Drawn, values: np.ndarray) -> str:
    shown = sampled(values)
    picture = task.draw(shown, like=values)
    codes, kind = encode(shown), task.target["kind"]
    data = {
        "kind": kind,
        "unit": getattr(task, "unit", ""),
        "shape": list(codes.array.shape),
        "low": codes.low,
        "step": codes.step,
        "bytes": codes.array.itemsize,
        "signs": AXES[task.axes] if isinstance(task, Normals) else [],
        "classes": [[name, _css(colour)] for name, colour in task.legend()] if kind == "labels" else [],
    }
    name = text(_title(task))
    return (
        f'<figure class="sgw-map" data-task="{text(task.name)}" data-about="{text(json.dumps(data))}" '
        f'data-codes="{codes.packed()}">'
        f"<figcaption>{name}</figcaption>"
        f'<div class="sgw-picture"><img alt="{name}" src="{_source(picture)}"><i class="sgw-cross" hidden></i>'
        '<output class="sgw-reading"></output></div>'
        f'<div class="sgw-legend">{_legend(task, values)}</div></figure>'
    )


def _legend(task: Drawn, values: np.ndarray) -> str:
    kind = task.target["kind"]
    if kind in BARS:
        return _bar(task, values)
    legend = task.legend(values)
    if kind == "labels":
        legend = present(legend, values)
    return _swatches(legend)


def _swatches(legend: Legend) -> str:
    shown = "".join(f'<span><b style="background:{_css(colour)}"></b>{text(name)}</span>' for name, colour in legend)
    if len(legend) > LISTED:
        shown = _swatches(legend[: LISTED - 1]) + f"<span>+ {len(legend) - LISTED + 1} more</span>"
    return shown


def _bar(task: Drawn, values: np.ndarray) -> str:
    ends = colour_range(task, values)
    if ends is None:
        return "<span>no valid value</span>"
    colours = task.draw(np.linspace(*ends, RAMP, dtype=np.float32)[None], like=values)[0]
    ramp = ", ".join(_css(colour) for colour in colours.tolist())
    ticks = [tick for tick, _ in task.legend(values)]
    ticks = ticks[:: 1 if len(ticks) <= 3 else 2]  # evenly spaced; five do not fit a phone
    named = "".join(f"<span>{text(tick)}</span>" for tick in ticks)
    return f'<i class="sgw-bar" style="background:linear-gradient(to right, {ramp})"></i>{named}'


def _css(colour: Sequence[int]) -> str:
    red, green, blue = colour
    return f"rgb({red},{green},{blue})"


def _source(picture: np.ndarray) -> str:
    """A PNG inside the page: nothing is left on the disk."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG", compress_level=3)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
