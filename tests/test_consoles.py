"""Results on standard output, everything else on standard error, and no text is read as markup."""

import io

from rich.console import Console
from rich.text import Text

from sgw_jax.data_pipelines.consoles import messages, print_error, results
from sgw_jax.report.record import TaskDescription
from sgw_jax.report.tables import print_metrics

NAME = "[bold]a[/bold] [/x] :smile: \\[b]"  # what rich would take for markup, broken markup and an emoji


def test_each_has_its_stream_and_says_names_as_they_are(capsys):
    messages().print(NAME)
    results(messages()).print(NAME)
    assert capsys.readouterr() == (f"{NAME}\n", f"{NAME}\n")
    print_error(NAME)
    assert capsys.readouterr() == ("", f"error: {NAME}\n")
    messages(quiet=True).print(NAME)
    results(messages(quiet=True)).print(NAME)
    assert capsys.readouterr() == ("", "")


def test_another_console_is_for_both():
    own = Console(file=io.StringIO())
    assert results(own) is own


def test_tables_say_names_as_they_are(capsys):
    task = TaskDescription(NAME, "rmse", "m", False, {"rmse": "m"}, {"rmse": False})
    print_metrics(results(messages()), NAME, [task], {NAME: {"rmse": 0.5}})
    title, *table = capsys.readouterr().out.splitlines()
    assert title == NAME
    assert any(line.split("  rmse")[0].strip() == NAME for line in table)


def test_what_the_stream_cannot_say_is_written_as_its_code(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    results(messages()).print(Text("↑ \udcff", "bold"))
    stream.flush()
    assert stream.buffer.getvalue() == b"\\u2191 \\udcff\n"
