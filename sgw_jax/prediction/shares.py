"""The share of a list that one of several processes has."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Self, TypeVar

import jax

from sgw_jax.data_pipelines.errors import InputError

FORM = re.compile(r"(\d{1,9})/(\d{1,9})", re.ASCII)

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Share:
    """Every count-th item, from the index-th on; of the whole list, whatever of it is done, so that shares of processes
    that start at any time are disjoint.

    Args:
      index: from 0 to count - 1, as Kubernetes' JOB_COMPLETION_INDEX and Slurm's arrays count.
      count: of the processes.

    Raises:
      ValueError: an index beyond the count.

    >>> from sgw_jax.prediction.shares import Share
    >>> Share.parse("1/3").of("abcdefgh")
    'beh'
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(
                f"share {self.index}/{self.count}: of {self.count} shares the first is 0/{self.count} and the last "
                f"{max(self.count, 1) - 1}/{self.count}."
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """The share "INDEX/COUNT".

        Args:
          text: it.

        Returns:
          The share.

        Raises:
          ValueError: another form, or an index beyond the count.
        """
        found = FORM.fullmatch(text)
        if found is None:
            raise InputError(f"share {text!r}: give INDEX/COUNT, such as 0/8 for the first of eight.")
        return cls(int(found[1]), int(found[2]))

    def of_process(self) -> "Share":
        """This process's part of the share, where several processes form one program."""
        return Share(self.index * jax.process_count() + jax.process_index(), self.count * jax.process_count())

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items of this share, in order."""
        return items[self.index :: self.count]
