"""What a run found: gathered (`results`), as a table in the terminal (`tables`) and as a page (`page`)."""

from sgw_jax.report.page import write_report
from sgw_jax.report.tables import print_table

__all__ = ["print_table", "write_report"]
