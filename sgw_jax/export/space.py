"""A Space of the Hugging Face hub: the page of `sgw-jax demo` for everybody, with a model inside or by its name."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

import sgw_jax
from sgw_jax.data_pipelines.atomic import new_directory
from sgw_jax.data_pipelines.errors import InputError, files_named
from sgw_jax.export.card import CARD, check_license
from sgw_jax.export.folder import check_free, save_folder
from sgw_jax.export.hub import is_hub_name
from sgw_jax.export.trained import Trained

APP, REQUIREMENTS, MODEL = "app.py", "requirements.txt", "model"
SDK = "6.31.0"  # of gradio: the version that the browser's tests ran with
PYTHON = "3.11"

SCRIPT = '''\
"""The page of the Space. Here: pip install -r requirements.txt && python app.py, then http://127.0.0.1:7860."""

import os
{imports}
import sgw_jax
from sgw_jax.demo.server import serve

serve(
    sgw_jax.from_pretrained({model}),
    title={title},
    host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),
    port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
)
'''


def save_space(
    trained: Trained,
    output: Path | str,
    *,
    license: str | None = None,
    pictures: bool = True,
    model: str | None = None,
    console: Console | None = None,
) -> Path:
    """Writes the directory of a Space; it appears whole or not at all.

    app.py, requirements.txt and README.md with the hub's metadata, and model/, the network's folder, unless the page is
    to load one of the hub.

    Args:
      output: a directory that does not exist or is empty.
      license: of the Space and of the model inside, as the hub spells it.
      pictures: as of `save_folder`.
      model: "org/name" of the hub, in place of model/.
      console: as of `save_folder`.

    Returns:
      The directory.

    Raises:
      FileError: the directory holds something, or cannot be written.
      InputError: a licence or a model's name that can be none; a network without a configuration.
    """
    output = Path(output).absolute()
    check_license(license)
    if model is not None and not is_hub_name(model):
        raise InputError(f"--model: {model!r} is no name of a model on the hub; give org/name.")
    check_free(output)
    title = output.name if model is None else model.partition("/")[2]
    with files_named(str(output)), new_directory(output) as partial:
        if model is None:
            save_folder(trained, partial / MODEL, license=license, pictures=pictures, console=console)
        for name, text in _files(title, license, model).items():
            (partial / name).write_text(text, encoding="utf-8")
    return output


def _files(title: str, license: str | None, model: str | None) -> dict[str, str]:
    """Name -> text."""
    imports, source = (
        ("", f'"{model}"') if model else ("from pathlib import Path\n", f'Path(__file__).parent / "{MODEL}"')
    )
    return {
        APP: SCRIPT.format(imports=imports, model=source, title=json.dumps(title)),
        REQUIREMENTS: f"sgw_jax[demo]=={sgw_jax.__version__}\n",
        CARD: _card(title, license, model),
    }


def _card(title: str, license: str | None, model: str | None) -> str:
    values: dict[str, Any] = {"title": title, "sdk": "gradio", "sdk_version": SDK, "app_file": APP}
    values["python_version"] = PYTHON
    if license is not None:
        values["license"] = license
    if model is not None:
        values["models"] = [model]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    source = f"the model {model} of the hub" if model else f"the model in {MODEL}/, whose card is {MODEL}/{CARD}"
    return "\n".join(["---", *lines, "---", "", f"A page that shows what {source}, predicts for a photograph.", ""])
