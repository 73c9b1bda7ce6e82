"""`dar report` and `dar watch`: the file, and a server that only reads and answers to nobody else's name."""

from __future__ import annotations

import http.client
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.run_folders import write_run

from dar.cli.app import main
from dar.errors import ConfigError
from dar.record.folder import RunFolder
from dar.report.server import ReportServer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", steps=4, evaluations=(0,))


@pytest.fixture
def server(folder: Path) -> Iterator[ReportServer]:
    with ReportServer([folder], "127.0.0.1", 0) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def ask(
    server: ReportServer, path: str, *, method: str = "GET", host: str | None = None
) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=300)
    connection.request(method, path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_the_page_and_its_version(server: ReportServer, folder: Path) -> None:
    status, headers, page = ask(server, "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "4 of 6 steps done" in page
    assert "connect-src &#39;self&#39;" in page
    version = ask(server, "/version")[2]
    assert f'"version":"{version}"' in page
    RunFolder(folder).append_metrics({"step": 5, "loss": 0.25})
    assert ask(server, "/version")[2] != version
    assert "5 of 6 steps done" in ask(server, "/")[2]


def test_head_has_headers_and_no_body(server: ReportServer) -> None:
    status, headers, body = ask(server, "/", method="HEAD")
    assert (status, body) == (200, "")
    assert int(headers["Content-Length"]) > 1_000_000
    assert (headers["X-Content-Type-Options"], headers["X-Frame-Options"]) == ("nosniff", "DENY")


@pytest.mark.parametrize(
    "path",
    [
        "/config.yaml",
        "/../run/config.yaml",
        "/%2e%2e/config.yaml",
        "//etc/passwd",
        "/?x",
        "/version/",
        "/metrics.jsonl",
    ],
)
def test_there_is_nothing_but_the_page(server: ReportServer, path: str) -> None:
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_nothing_can_be_written(server: ReportServer, method: str) -> None:
    assert ask(server, "/", method=method)[0] == 501


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8317", "localhost.evil.example", "127.0.0.1.evil.example"]
)
@pytest.mark.parametrize("path", ["/", "/version"])
def test_another_name_pointed_here_gets_nothing(server: ReportServer, host: str, path: str) -> None:
    status, _, body = ask(server, path, host=host)
    assert (status, body) == (403, "This server answers to its address and to localhost only.\n")


@pytest.mark.parametrize("host", ["localhost:1", "LOCALHOST", "127.0.0.1", "[::1]:80", "[::1]", "192.0.2.7:80"])
def test_addresses_and_localhost_are_answered(server: ReportServer, host: str) -> None:
    assert ask(server, "/version", host=host)[0] == 200


def test_a_damaged_run_is_said_and_does_not_end_the_server(server: ReportServer, folder: Path) -> None:
    (folder / "environment.json").write_text("{")
    status, _, body = ask(server, "/")
    assert status == 503
    assert "environment.json: it is not JSON" in body
    (folder / "environment.json").write_text("{}")
    assert ask(server, "/")[0] == 200


def test_a_port_that_is_taken(server: ReportServer, folder: Path) -> None:
    port = server.server_address[1]
    with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1, port {port}: .*Choose another with --port"):
        ReportServer([folder], "127.0.0.1", port)


def dar(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["dar", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def test_report_writes_into_the_run_folder_or_where_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    assert dar(monkeypatch, "report", folder) in (0, None)
    assert f"{(folder / 'report.html').as_uri()} (" in capsys.readouterr().out
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    target = tmp_path / "new" / "page.html"
    assert dar(monkeypatch, "report", folder, "-o", target, "--png", tmp_path / "png") in (0, None)
    assert target.is_file()
    assert (tmp_path / "png" / "reward.png").is_file()
    assert "pictures in" in capsys.readouterr().out


def test_report_of_nothing_ends_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    assert dar(monkeypatch, "report", tmp_path / "nothing") == 2
    assert "nothing is not there" in capsys.readouterr().err
    assert dar(monkeypatch, "report", folder, "-o", tmp_path) == 2
    assert "is a folder: -o is the file to write" in capsys.readouterr().err
    assert dar(monkeypatch, "watch", tmp_path / "nothing") == 2
    assert "nothing is not there" in capsys.readouterr().err
