"""What the names of a folder's files say: labels taken for missing, files and lists that nothing reads."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from sgw_jax.data_pipelines.file_names import near_names, visible
from sgw_jax.data_pipelines.folder import IMAGE_SUFFIXES, TARGET_SUFFIXES, Folder
from sgw_jax.data_pipelines.inspection.findings import Finding
from sgw_jax.data_pipelines.readers import first_few

# What others call our splits.
OTHER_NAMES = {
    **dict.fromkeys(("val", "valid", "dev", "eval"), "validation"),
    **dict.fromkeys(("training", "trn"), "train"),
    **dict.fromkeys(("testing", "tst"), "test"),
}


def folder_findings(folders: Mapping[str, Folder]) -> list[Finding]:
    """What is odd about the names of one folder's files; ``folders`` are its splits, by their names."""
    one = next(iter(folders.values()))
    found = list(_lists(one.root / "splits", set(folders)))
    for folder in one.found:
        found += _files(one.root / folder, folder, folders)
    return found


def _lists(directory: Path, used: set[str]) -> Iterator[Finding]:
    """Lists of ids that no split reads."""
    for name in visible(os.listdir(directory)):
        stem, suffix = os.path.splitext(name)
        if name in {f"{split}.txt" for split in used} or suffix.lower() not in (".txt", ".lst", ".csv", ""):
            continue
        lower = stem.lower()
        meant = OTHER_NAMES.get(lower, lower)
        allowed = "train.txt, validation.txt, test.txt"
        if meant in ("train", "validation", "test") and meant not in used:
            advice = f"Rename it to {meant}.txt, or take it away."
            yield Finding(True, str(directory / name), "a list of images that no run reads", allowed, advice)
        else:
            yield Finding(False, str(directory / name), "no run reads it", allowed, "It is left alone.")


def _files(directory: Path, folder: str, folders: Mapping[str, Folder]) -> Iterator[Finding]:
    """Files that no split lists, and among them those that an image's labels were probably meant to be."""
    one = next(iter(folders.values()))
    suffixes = IMAGE_SUFFIXES if folder == "images" else TARGET_SUFFIXES[one.targets[folder].kind]
    used = {file for source in folders.values() for file in source.found[folder].values()}
    rest = [name for name in visible(os.listdir(directory)) if name not in used]
    lacking = [id_ for source in folders.values() for id_ in source.ids if id_ not in source.found[folder]]
    pictured = {os.path.splitext(name)[0] for name in os.listdir(one.root / "images")}
    nobodys = [name for name in rest if os.path.splitext(name)[0] not in pictured - set(lacking)]
    near = near_names(dict.fromkeys(lacking), nobodys)
    for form in sorted({os.path.splitext(name)[1] for name in near.values()}):
        names = {id_: name for id_, name in near.items() if os.path.splitext(name)[1] == form}
        id_, name = next(iter(names.items()))
        right = next((s for s in suffixes if s == form.lower()), None)
        advice = f"Rename it to {id_}{right}" if right else f"Store it as {id_}{suffixes[0]}"
        count = f", and {len(names) - 1:,} more like it" if len(names) > 1 else ""
        yield Finding(
            True,
            str(directory / name) + count,
            f"image {id_!r} would count as one without labels of {folder!r}, for this is not the name of its file",
            f"<id> with one of {', '.join(suffixes)}",
            f"{advice}{' and so on' if count else ''}, or take it away.",
        )
    unused = [name for name in rest if name not in near.values()]
    if unused:
        found = f"files that no split lists: {first_few(unused, 5)}"
        yield Finding(
            False, str(directory), found, "", "They are not read; add their ids to a split if they are meant."
        )
