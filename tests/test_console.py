"""The terminal: what looks like markup, an emoji or an escape sequence is text, in lines, cells and logs."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from support.handmade import make_spec

import dar
from dar.cli.common import print_json
from dar.cli.judge import _summary
from dar.console import Console, LogHandler, waiting
from dar.run.display import Display
from dar.shown import keep_secret

HOSTILE = "[/INST] len[short] [red]x :smile: \x1b[31m\u202e\x9b\x07 1.5"
SHOWN = "[/INST] len[short] [red]x :smile: ␛[31m[RLO][U+009B]␇ 1.5"
SOURCE = Path(dar.__file__).parent


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)


def test_a_line_is_text(console: Console):
    console.print(HOSTILE, style="bold")
    assert SHOWN in written(console)
    assert "\x1b[31m" not in written(console)


def test_cells_titles_and_headings_are_text(console: Console):
    table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    assert written(console).count(SHOWN) == 4
    assert not set("\u202e\x9b\x07") & set(written(console))


def test_half_of_a_surrogate_pair_can_be_written(console: Console):
    console.print("caf\udce9")
    assert "caf\ufffd" in written(console)


def test_what_a_judge_says_is_text_in_the_summary(console: Console):
    console.print(_summary([{"failed": HOSTILE}], Path("[/rows].jsonl")))
    assert SHOWN in written(console)
    assert "[/rows].jsonl: 1 rows" in written(console)


def test_a_run_folder_and_a_reward_are_text_at_the_end_of_a_run(console: Console):
    figures = {"reward": 0.0, "rewards/len[short]/mean": 1.0, "rewards/:smile:/mean": 2.0}
    display = Display(num_steps=1, console=console)
    display.before_after(figures, figures, title="runs/[/v2]")
    display.side_by_side(0.304, [("[/INST]", "\x1b[2J", ":smile:")])
    display.note("[/INST]", style="dim")
    for text in ("runs/[/v2]", "len[short]", ":smile:", "␛[2J", "[/INST]", "drawn to be read at temperature 0.30"):
        assert text in " ".join(written(console).split())


def test_what_libraries_print_while_a_bar_is_waited_at_is_not_shown_and_what_they_raise_is(
    monkeypatch: pytest.MonkeyPatch,
):
    def convert() -> None:
        with waiting("converting [/b] {x}, once"):
            print("noise", file=sys.stderr)
            raise ValueError("broken")

    terminal, log = io.StringIO(), io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    for stream in terminal, log:
        monkeypatch.setattr(sys, "stderr", stream)
        with pytest.raises(ValueError, match="broken"):
            convert()
        print("heard again", file=sys.stderr)
        assert "noise" not in stream.getvalue()
        assert stream.getvalue().endswith("heard again\n")
    assert "converting [/b] {x}, once" in terminal.getvalue()
    assert "0:00:00" in terminal.getvalue()
    assert log.getvalue() == "heard again\n"


def test_log_records_are_text_and_bounded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    LogHandler().handle(logging.makeLogRecord({"msg": HOSTILE + "x" * 100_000, "levelname": "WARNING", "markup": True}))
    found = capsys.readouterr()
    assert (found.out, found.err[: len(SHOWN) + 8]) == ("", f"WARNING {SHOWN}")
    assert len(found.err) < 10_000


def test_json_is_ascii_and_tells_no_secret(capsys: pytest.CaptureFixture[str]):
    keep_secret("sk-told-to-nobody")
    print_json({"a": "\x1b\u202eπ\ud83d sk-told-to-nobody"})
    assert capsys.readouterr().out == '{\n  "a": "\\u001b\\u202e\\u03c0\\ud83d ***"\n}\n'


def dar_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["dar", *arguments])
    with pytest.raises(SystemExit) as caught:
        dar.cli.main()  # pyright: ignore[reportAttributeAccessIssue] - imported above
    return caught.value.code


def test_a_terminal_without_greek_letters_is_no_reason_to_die(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dar.config.recipe.load_recipe", lambda *_: make_spec(output_dir="π₀ → café"))
    monkeypatch.setattr("dar.assembly.plan.make_plan", lambda *_: None)
    monkeypatch.setattr("dar.cli.train._plan_table", lambda *_: "π₀ → café")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert dar_main(monkeypatch, "plan", "recipe.yaml") == 0
    stream.flush()
    assert stream.buffer.getvalue().startswith(b"\\u03c0\\u2080 \\u2192 caf\\xe9\n")  # pyright: ignore[reportAttributeAccessIssue]


def test_what_nobody_foresaw_is_a_traceback_that_does_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def broken(*_: object) -> None:
        raise RuntimeError(HOSTILE)

    monkeypatch.setattr("dar.config.recipe.load_recipe", broken)
    monkeypatch.setattr(sys.modules["dar.cli.app"], "raised_at", lambda error: "")
    assert dar_main(monkeypatch, "plan", "recipe.yaml") == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert f"RuntimeError: {SHOWN}" in err


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        (r"rich\.console|rich\.text|rich\.logging|from_markup|markup=", {"console.py"}),
        (r"(?<![\w.])print\(", set()),
        (r"\becho\(", {"cli/app.py", "cli/common.py"}),
    ],
)
def test_nothing_is_printed_any_other_way(pattern: str, allowed: set[str]):
    found = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if re.search(pattern, path.read_text(encoding="utf-8"))
    }
    assert found == allowed


def test_what_libraries_will_change_is_not_said_and_all_else_is():
    script = (
        "import warnings; from dar.cli.app import common; common(None); "
        "warnings.warn('later', FutureWarning); warnings.warn('now')"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert "now" in found.stderr
    assert "later" not in found.stderr
