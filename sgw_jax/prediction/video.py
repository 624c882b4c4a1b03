"""Prediction over videos: a video of panels, or of one task, for each; few frames in memory, however long it is."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from sgw_jax.data_pipelines.consoles import messages, results
from sgw_jax.data_pipelines.errors import InputError, files_named
from sgw_jax.data_pipelines.progress import counted
from sgw_jax.data_pipelines.readers import first_few
from sgw_jax.pictures.film import Film
from sgw_jax.pictures.panels import Drawn
from sgw_jax.prediction.background import in_background
from sgw_jax.prediction.confidence_maps import confidence_maps
from sgw_jax.prediction.image_files import output_names
from sgw_jax.prediction.options import Options
from sgw_jax.prediction.outputs import check_output, check_targets
from sgw_jax.prediction.predictor import Predictor
from sgw_jax.prediction.shares import Share
from sgw_jax.prediction.slots import CarriedSlots
from sgw_jax.prediction.video_files import Frame, Video, read_frames, survey, writing

PANELS = "panels"
AHEAD = 2  # frames drawn before they are encoded

Maps = dict[str, np.ndarray]


def survey_all(
    files: Sequence[Path], console: Console, share: Share | None = None, skip_bad: bool = False
) -> dict[str, Video]:
    """Reads every video of a share to its end, before anything is predicted.

    Args:
      files: videos.
      console: of the progress.
      share: of them; None: all. Several processes of one program share them further.
      skip_bad: leave out videos that cannot be read, and say so on standard error.

    Returns:
      What is known of those that can be read, by the names of their results: the file's stem, with the folder before it
      where several files share one.

    Raises:
      ValueError: a video cannot be read to its end (with `skip_bad`: none can).
    """
    mine = (share or Share()).of_process().of(list(zip(output_names(files), files, strict=True)))
    videos, bad = {}, []
    for name, file in mine:
        try:
            videos[name] = survey(file, console)
        except InputError as error:
            bad.append(str(error))
    if bad and (not skip_bad or not videos):
        raise InputError(
            f"{len(bad)} of {len(mine)} videos cannot be read, and nothing was written: {first_few(bad, 3)}. Mend or "
            f"remove them{', or leave them out with --skip_bad' if videos else ''}."
        )
    errors = messages()
    for reason in bad:
        errors.print(f"left out: {reason}", soft_wrap=True)
    return videos


def predict_videos(
    predictor: Predictor,
    videos: Mapping[str, Video],
    output: Path | str,
    console: Console,
    *,
    show: str = PANELS,
    carry_slots: float | None = None,
    options: Options | None = None,
    inputs: Sequence[Path | str] = (),
) -> list[Path]:
    """Writes `<name>.mp4`, the panels of every frame, or `<name>_<task>.mp4`, the pictures of one task, of each video.

    Frames have the times of the video's, so that it runs as fast, with a variable rate too; sound is left out. Arrays
    are not kept: those of a minute are gigabytes. Layout and colours are the same in all frames (`Film`). A file
    appears when it is complete, in place of an earlier one.

    Args:
      predictor: of the network.
      videos: as `survey_all` found them, by names.
      output: directory for the results, made if missing.
      console: of progress and notes.
      show: "panels", or the name of a task, or of another map that the options ask for.
      carry_slots: the share of a frame's initial slots that comes from the frame before, see `CarriedSlots`; None: each
        frame is predicted by itself.
      options: of the prediction; None: `Options()`.
      inputs: as the user named them; results may go into none of their folders.

    Returns:
      The files' paths.

    Raises:
      ValueError: before anything is written: an unknown map; slots to carry through a network that has none, or with
        options that run it more than once a frame; results that would replace an input.
      FileError: a result cannot be written.
    """
    options = options or Options()
    drawn: list[Drawn] = [*predictor.tasks, *(confidence_maps(predictor.tasks) if options.confidence else [])]
    by_name = {about.name: about for about in drawn}
    if show != PANELS and show not in by_name:
        raise InputError(f"--video={show}: choose {PANELS}, or one of the network's maps: {', '.join(by_name)}.")
    if carry_slots is not None and (options.resolution != "fit" or options.flip):
        raise InputError(
            "--carry_slots carries the slots of one pass of the network from frame to frame; with --resolution or "
            "--flip there are several. Leave out one or the other."
        )
    carried = None if carry_slots is None else CarriedSlots(predictor.module, predictor.variables, carry_slots)
    seeing = predictor if carried is None else predictor.with_network(carried)
    targets = {name: Path(output) / f"{name}{'' if show == PANELS else f'_{show}'}.mp4" for name in videos}
    check_output(Path(output), inputs)
    check_targets(targets.values(), inputs, [*map(Path, inputs), *(video.path for video in videos.values())])
    with files_named("--output cannot be made"):
        Path(output).mkdir(parents=True, exist_ok=True)

    for name, video in videos.items():
        samples = predictor(list(video.samples), options)
        film = Film(video.size, drawn, {key: np.concatenate(maps) for key, maps in samples.items()}, video.path.name)

        def draw(item: tuple[Frame, Maps], film: Film = film) -> tuple[np.ndarray, int, int]:
            frame, maps = item
            picture = film.panel(frame.image, maps) if show == PANELS else film.picture(by_name[show], maps)
            return picture, frame.ticks, frame.lasts

        if carried is not None:
            carried.restart()
        size = film.size if show == PANELS else video.size
        pictures = in_background(draw, predicted(seeing, video.path, options), AHEAD)
        with writing(targets[name], size, video.rate, video.tick) as write:
            for picture, ticks, lasts in counted(pictures, f"predict {video.path.name}", video.frames, console):
                write(picture, ticks, lasts)
        for note in video.notes:
            console.print(f"{video.path.name}: {note}.", soft_wrap=True, markup=False)
    count = f"{len(videos)} video{'' if len(videos) == 1 else 's'}"
    line = f"{count} (mp4) in {output}, by step {predictor.step} of {predictor.origin}."
    results(console).print(line, soft_wrap=True, markup=False)
    return list(targets.values())


def predicted(predictor: Predictor, path: Path, options: Options | None = None) -> Iterator[tuple[Frame, Maps]]:
    """The frames of a video and their maps, in order; no more frames are held than the predictor takes at once.

    Args:
      predictor: which sees the frames one after another, in batches of its size.
      path: of the video.
      options: of the prediction.

    Returns:
      (frame, decoded maps of its height and width by task).
    """
    held: deque[Frame] = deque()  # frames that the network has and whose maps are still to come

    def images() -> Iterator[np.ndarray]:
        for frame in read_frames(path):
            held.append(frame)
            yield frame.image

    for maps in predictor.stream(images(), options):
        yield held.popleft(), maps
