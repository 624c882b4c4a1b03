"""Names of files that stand beside the ones expected: another suffix, other case, a word before or behind the id."""

import os
import re
from collections.abc import Collection, Iterable, Iterator

# What holds pictures or arrays; notes and lists that lie beside them are nobody's labels.
CONTENTS = {
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2", ".exr", ".pfm"),
    *(".npy", ".npz", ".mat", ".h5"),
}
LITTER = frozenset(("thumbs.db", "desktop.ini"))  # of file managers


def visible(names: Iterable[str]) -> list[str]:
    """The names without hidden files and what file managers leave behind, sorted."""
    return sorted(name for name in names if not name.startswith(".") and name.lower() not in LITTER)


def near_names(wanted: Collection[str], names: Iterable[str]) -> dict[str, str]:
    """id -> the file that was probably meant by it, of the ids that have one.

    Args:
      wanted: ids that lack a file.
      names: the files that belong to no id.

    >>> near_names(["a", "b", "007"], ["a.PNG", "b_mask.png", "7.png", "c.png"])
    {'a': 'a.PNG', 'b': 'b_mask.png', '007': '7.png'}
    """
    ids = {_alike(id_): id_ for id_ in wanted}
    found: dict[str, str] = {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in CONTENTS:
            id_ = next((ids[part] for part in map(_alike, _parts(stem)) if part in ids), None)
            if id_ is not None:
                found.setdefault(id_, name)
    return {id_: found[id_] for id_ in wanted if id_ in found}


def _alike(id_: str) -> str:
    """Equal for ids that differ in case, or in leading zeros of a number."""
    return str(int(id_)) if id_.isascii() and id_.isdigit() else id_.casefold()


def _parts(stem: str) -> Iterator[str]:
    """The stem; then its beginnings and ends at a separator, the longest first."""
    yield stem
    places = [match.span() for match in re.finditer(r"[-_. ]+", stem)]
    yield from sorted([stem[:start] for start, _ in places] + [stem[end:] for _, end in places], key=len, reverse=True)
