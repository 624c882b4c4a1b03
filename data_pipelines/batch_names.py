"""What a batch holds beside the targets of its tasks, by name: for pipelines and steps, without what those import."""

SOURCE = "source"  # of a mixture's training: which source a row is of, int32 (batch,)
RESERVED = ("image", "item", "geometry", "zoom", SOURCE)  # no target may be called so
TAPS = "taps/"  # what precedes the name of a frozen backbone's tap (tap_cache.py)
