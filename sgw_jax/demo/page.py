"""The page, made of gradio's parts: a photograph, the view of its maps, and their arrays as a file."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, Literal

import gradio as gr

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.demo import uploads, view
from sgw_jax.pictures.panels import Drawn
from sgw_jax.prediction.arrays import write_npz
from sgw_jax.prediction.confidence_maps import confidence_maps
from sgw_jax.prediction.options import Options
from sgw_jax.prediction.predictor import Predictor

HERE = Path(__file__).parent
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")  # none from the web
SEEN: dict[str, Literal["fit", "native"]] = {"shrunk, in one look": "fit", "as it is, in tiles": "native"}
KEPT = 3600  # seconds that a visitor's files are kept, as the page says
WAITING = 20  # visitors in the queue; the next ones are told to come again


def build_page(predictor: Predictor, title: str) -> gr.Blocks:
    """The page of a network; nothing is served yet."""
    height, width = predictor.size
    remark = (
        f"The network sees {width} x {height} pixels at once. What you send goes to the machine that serves this page, "
        "and is deleted there after an hour."
    )
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(KEPT // 6, KEPT)) as page:
        gr.HTML(view.heading(title, predictor.tasks, remark), js_on_load=None, elem_id="sgw-heading")
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                photo = gr.Image(
                    label="Photograph",
                    sources=["upload", "webcam", "clipboard"],
                    type="filepath",
                    elem_id="sgw-photo",
                    height=300,
                    buttons=[],
                    webcam_options=gr.WebcamOptions(mirror=False),  # left is left in what the network sees
                )
                seen = gr.Radio(list(SEEN), value=next(iter(SEEN)), label="The network sees it", elem_id="sgw-seen")
                sure = gr.Checkbox(label="Show how sure it is", elem_id="sgw-sure")
                download = gr.DownloadButton(
                    "Download arrays (npz)", size="md", interactive=False, elem_id="sgw-download"
                )
            with gr.Column(scale=4, min_width=300):
                result = gr.HTML(
                    view.EMPTY, js_on_load=(HERE / "page.js").read_text(encoding="utf-8"), elem_id="sgw-result"
                )

        def answer(upload: dict[str, Any] | None, seen: str, sure: bool) -> Iterator[tuple[Any, Any, Any]]:
            yield from answers(predictor, upload, seen, sure)

        private: dict[str, Any] = {"api_visibility": "private", "outputs": [photo, result, download]}
        gr.on(
            [photo.input, seen.input, sure.input],
            answer,
            [photo, seen, sure],
            # Gradio's own reading would decode whatever it is; that the file is an upload is checked without it, too.
            preprocess=False,
            trigger_mode="always_last",
            show_progress_on=[result],
            **private,
        )
        photo.clear(lambda: (gr.skip(), view.EMPTY, gr.DownloadButton(value=None, interactive=False)), **private)
    page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    return page


def answers(
    predictor: Predictor, upload: dict[str, Any] | None, seen: str, sure: bool
) -> Iterator[tuple[Any, Any, Any]]:
    """What the photograph, the view and the button become: the pictures first, then the arrays as a file.

    Args:
      upload: gradio's description of a file that it holds; None where there is none.
      seen: one of SEEN.
      sure: whether maps of how sure the network is are shown; they are measured over a mirror image, too.
    """
    if upload is None:
        yield gr.skip(), gr.skip(), gr.skip()
        return
    name = PurePath(upload["orig_name"] or "photograph").name
    try:
        photograph = uploads.read_upload(Path(upload["path"]), name)
    except InputError as error:
        yield None, view.refusal(str(error)), gr.DownloadButton(value=None, interactive=False)
        return
    image = uploads.shrunk(photograph)
    drawn: list[Drawn] = [*predictor.tasks, *(confidence_maps(predictor.tasks) if sure else [])]
    maps = predictor(image, Options(SEEN[seen], flip=bool(sure), confidence=bool(sure)))
    about = f"{name}, {'' if image is photograph else 'shrunk to '}{image.shape[1]} x {image.shape[0]}."
    waiting = gr.DownloadButton(value=None, interactive=False)
    yield gr.skip(), view.view(maps, drawn, about), waiting
    # Among gradio's own files, of which it serves and forgets what lies there.
    file = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"])) / f"{PurePath(name).stem}.npz"
    with file.open("wb") as opened:
        write_npz(opened, maps, drawn)
    yield gr.skip(), gr.skip(), gr.DownloadButton(value=file, interactive=True)


def look() -> dict[str, Any]:
    """What `launch` takes for the page's appearance."""
    theme = gr.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace"), primary_hue="slate")
    return {"theme": theme, "css_paths": [HERE / "page.css"]}
