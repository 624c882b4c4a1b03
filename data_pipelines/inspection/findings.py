"""Something found in a data set: an error, which stops, or a warning, with what is allowed and what to do."""

import dataclasses
from collections.abc import Iterable

from sgw_jax.data_pipelines.errors import InputError

SHOWN = 20  # errors in one message


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing found.

    error: whether it stops the command. where: file, folder or split, and task. found: what is there. allowed: what may
    be; empty where `found` says all. advice: what to do.
    """

    error: bool
    where: str
    found: str
    allowed: str
    advice: str

    def __str__(self) -> str:
        allowed = f"; allowed: {self.allowed}" if self.allowed else ""
        return f"{self.where}: {self.found}{allowed}. {self.advice}"


class DataError(InputError):
    """The data cannot be right; the message lists all that was found."""


def raise_errors(findings: Iterable[Finding]) -> None:
    """Raises one DataError for all the errors among the findings."""
    errors = [str(finding) for finding in findings if finding.error]
    if errors:
        more = [f"and {len(errors) - SHOWN} more"] if len(errors) > SHOWN else []
        lines = errors if len(errors) == 1 else ["the data has errors:", *errors[:SHOWN], *more]
        raise DataError("\n  ".join(lines))
