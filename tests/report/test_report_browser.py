"""The page in a real browser: no errors, search and order work, and hostile text does nothing."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
from support.run_folders import add_alert, write_run

from dar.record.folder import RunFolder
from dar.report.page import render_page
from dar.report.run import load_runs
from dar.report.server import ReportServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (dependency group dev)")

PATIENCE = 240_000
"""Milliseconds; a busy machine is slow, and that is no failure."""
HOSTILE = (
    "</script><script>window.planted = 1</script><img src=x onerror='window.planted = 1'>"
    "<b>bold</b>\u202eevil\x00\x07\x1b[31m\u2028\u2066 end"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        # A container's root cannot have Chromium's sandbox; the pages are our own.
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    """A page whose console must stay empty."""
    context = chromium.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(PATIENCE)
    found = context.new_page()
    complaints: list[str] = []
    found.on("console", lambda message: complaints.append(message.text))
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
    yield found
    context.close()
    assert not [line for line in complaints if not line.startswith("http://127.0.0.1:")]


def opened(page: Page, tmp_path: Path, *folders: Path) -> Page:
    file = tmp_path / "report.html"
    file.write_text(render_page(load_runs(folders)), encoding="utf-8")
    page.goto(file.as_uri())
    page.wait_for_selector("[data-browser] tbody tr")
    return page


def cells(page: Page, label: str) -> list[str]:
    return page.locator(f'tbody td[data-label="{label}"]').all_inner_texts()


def test_plots_are_drawn_when_they_are_seen(page: Page, tmp_path: Path) -> None:
    opened(page, tmp_path, write_run(tmp_path / "run", gold=True))
    names = page.eval_on_selector_all("[data-plot]", "all => all.map(one => one.dataset.plot)")
    assert {"reward", "kl", "overoptimization", "weights", "time"} <= set(names)
    for name in names:
        page.locator(f'[data-plot="{name}"]').scroll_into_view_if_needed()
        page.wait_for_selector(f'[data-plot="{name}"][data-drawn] .main-svg')
    drawn = page.evaluate("document.querySelector('[data-plot=reward]').data.map(line => [line.name, line.y])")
    rows = RunFolder(tmp_path / "run").metrics()
    assert drawn[0] == ["training batch", [row["reward"] for row in rows if "reward" in row]]
    assert drawn[1] == ["held-out", [row["eval/reward"] for row in rows if "eval/reward" in row]]


def test_any_metric_can_be_looked_at(page: Page, tmp_path: Path) -> None:
    opened(page, tmp_path, write_run(tmp_path / "run"))
    page.click("[data-metrics] summary")
    page.select_option('[data-role="metric"]', "loss")
    page.wait_for_selector("[data-metrics] .main-svg")
    drawn = page.evaluate("document.querySelector('[data-metrics] .plot').data[0].y")
    assert drawn == [row["loss"] for row in RunFolder(tmp_path / "run").metrics() if "loss" in row]


def test_completions_are_found_ordered_and_grouped(page: Page, tmp_path: Path) -> None:
    opened(page, tmp_path, write_run(tmp_path / "run"))
    # The newest: the evaluation after step 6, four prompts with three completions each, rewards 1 + p/100 + k/1000.
    status = page.locator('[data-role="status"]')
    assert status.inner_text() == "12 of 12 completions"
    page.click('thead button:text-is("reward")')
    rewards = cells(page, "reward")
    assert rewards == sorted(rewards, reverse=True)
    assert (rewards[0], rewards[-1]) == ("1.032", "1")
    page.click('thead button:text-is("reward")')
    assert cells(page, "reward") == rewards[::-1]
    assert page.get_attribute('th:has(button:text-is("reward"))', "aria-sort") == "ascending"

    page.fill('[data-role="query"]', "Number 2.")
    assert status.inner_text() == "3 of 12 completions"
    assert cells(page, "reward") == ["1.020", "1.021", "1.022"]
    page.fill('[data-role="query"]', "nothing has this")
    assert status.inner_text() == "0 of 12 completions"
    page.fill('[data-role="query"]', "")

    page.locator(".open").first.click()
    page.click('button:text-is("only this prompt")')
    assert cells(page, "reward") == ["1", "1.001", "1.002"]
    detail = page.locator(".detail").inner_text()
    assert "Write about rain, number 0." in detail
    assert "first" in detail

    page.select_option('[data-role="chunk"]', "all")
    playwright.expect(status).to_have_text("18 of 72 completions", timeout=PATIENCE)


def test_completions_stand_beside_their_prompts_and_the_best_or_unfinished_can_be_picked(
    page: Page, tmp_path: Path
) -> None:
    opened(page, tmp_path, write_run(tmp_path / "run"))
    assert page.locator("tbody td.prompt").first.inner_text() == "Write about rain, number 0."
    # Of each of four prompts completion k = 2 is the best, k = 0 the worst, and the one that was cut off.
    shown = {"best": ["1.002", "1.012", "1.022", "1.032"], "worst": ["1", "1.010", "1.020", "1.030"]}
    for kind, rewards in {**shown, "cut": shown["worst"]}.items():
        page.select_option('[data-role="kind"]', kind)
        assert cells(page, "reward") == rewards
    page.select_option('[data-role="prompt"]', "Write about tea, number 2.")
    assert cells(page, "reward") == ["1.020"]
    assert page.locator("tbody td.prompt").count() == 0


def test_on_a_phone_completions_are_sorted_and_tokens_read_by_tapping(chromium: Browser, tmp_path: Path) -> None:
    context = chromium.new_context(viewport={"width": 390, "height": 800}, has_touch=True)
    context.set_default_timeout(PATIENCE)
    page = opened(context.new_page(), tmp_path, write_run(tmp_path / "run"))
    assert not page.locator(".rows thead").is_visible()
    page.select_option('[data-role="sort"]', "reward")
    assert cells(page, "reward")[0].removeprefix("reward ") == "1.032"
    page.locator(".open").first.tap()
    page.locator('[data-role="ratio"]').tap()
    token = page.locator("[data-nats]").first
    token.tap()
    assert page.locator(".nats").inner_text().endswith(f"= {token.get_attribute('data-nats')} nats")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()


def test_tokens_show_their_log_ratio_when_asked(page: Page, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    opened(page, tmp_path, folder)
    page.locator(".open").first.click()
    assert page.locator("[data-nats]").count() == 0
    page.check('[data-role="ratio"]')
    (row, *_) = load_runs([folder])[0].completions[-1].read().to_pylist()
    shown = [float(text.replace("−", "-")) for text in page.eval_on_selector_all(
        "[data-nats]", "all => all.map(one => one.dataset.nats)"
    )]  # fmt: skip
    expected = [new - old for new, old in zip(row["logprobs"], row["ref_logprobs"], strict=True)]
    assert shown == pytest.approx(expected, abs=1e-3)
    assert page.locator("[data-nats]").all_text_contents() == row["tokens"]


def test_images_stand_on_a_contact_sheet_by_label_and_open(page: Page, tmp_path: Path) -> None:
    opened(page, tmp_path, write_run(tmp_path / "run", gold=True, image=(1, 8, 8)))
    sheet = page.locator(".sheet")
    # Four prompts, about bread, maps, rain and tea, with three images each, rewards 1 + p/100 + k/1000.
    assert sheet.count() == 4
    assert sheet.nth(3).inner_text().split() == ["1.020", "1.021", "1.022"]
    playwright.expect(page.locator("img.pixels")).to_have_count(12, timeout=PATIENCE)
    page.fill('[data-role="query"]', "number 2")
    page.select_option('[data-role="sort"]', "gold")
    assert sheet.all_inner_texts() == ["−0.520\n−0.521\n−0.522"]
    page.locator(".sheet .open").last.click()
    page.check('[data-role="ratio"]')
    detail = page.locator(".detail")
    assert "gold −0.522" in detail.locator("dl").inner_text().replace("\n", " ")
    playwright.expect(detail.locator("img.pixels")).to_have_count(1, timeout=PATIENCE)
    assert detail.locator("img").evaluate("image => [image.naturalWidth, image.alt]") == [
        8, "Write about tea, number 2."
    ]  # fmt: skip
    assert detail.locator("[data-nats]").count() == 5
    page.uncheck('[data-role="sheet"]')
    assert sheet.count() == 0
    assert cells(page, "gold") == ["−0.520", "−0.521", "−0.522"]
    assert page.locator("td.text img").count() == 3
    assert cells(page, "EOS") == cells(page, "tokens") == []


def test_planted_scripts_do_not_run_and_texts_stay_texts(page: Page, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "<img src=x onerror=window.planted=1>", text=HOSTILE, gain=2.0)
    add_alert(folder, message=HOSTILE)
    opened(page, tmp_path, folder)
    page.locator(".open").first.click()
    page.check('[data-role="ratio"]')
    page.uncheck('[data-role="ratio"]')
    assert page.evaluate("window.planted") is None
    assert page.locator("main img, main b:text-is('bold')").count() == 0
    text = page.locator(".detail .hostile").nth(1).text_content()
    assert text is not None
    assert text.startswith("</script><script>window.planted = 1</script>")
    assert "[RLO]evil␀␇␛[31m" in text
    assert page.evaluate("getComputedStyle(document.querySelector('.hostile')).unicodeBidi") == "isolate"


def test_several_runs_have_a_page_too(page: Page, tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "all" / f"{name}-seed{seed}", algorithm=name, seed=seed, gain=1 + seed)
        for name in ("dar", "rloo")
        for seed in (0, 1)
    ]
    opened(page, tmp_path, *folders)
    page.wait_for_selector('[data-plot="frontier"][data-drawn] .main-svg')
    names = page.evaluate("document.querySelector('[data-plot=frontier]').data.map(line => line.name ?? '')")
    assert {"dar (2 seeds)", "rloo (2 seeds)"} <= set(names)


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1200, "dark")])
def test_nothing_is_wider_than_the_screen(
    chromium: Browser, tmp_path: Path, width: int, scheme: Literal["light", "dark"]
) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(PATIENCE)
    opened(context.new_page(), tmp_path, write_run(tmp_path / "run", gold=True))
    page = context.pages[0]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 26)" if scheme == "dark" else "rgb(245, 246, 247)")
    context.close()


def test_many_methods_fit_on_paper(page: Page, tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"online_dpo-lr{rate}e-05-seed0", optim={"learning_rate": rate * 1e-5})
        for rate in range(1, 18)
    ]
    opened(page, tmp_path, *folders)
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 within Chromium's margins
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    widths = "table => [table.scrollWidth, table.parentElement.clientWidth]"
    for table in page.locator("table.figures").all():
        if table.is_visible():
            width, room = table.evaluate(widths)
            assert width <= room
    # With a legend of seventeen lines, half the paper's width is too little for a plot.
    columns = page.locator("#curves .grid").evaluate("grid => getComputedStyle(grid).gridTemplateColumns")
    assert len(columns.split()) == 1


def test_a_watched_run_refreshes_and_keeps_what_was_chosen(page: Page, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=4, evaluations=(0,))
    with ReportServer([folder], "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            page.goto(server.url)
            page.wait_for_selector("[data-browser] tbody tr")
            page.fill('[data-role="query"]', "number 2")
            assert "4 of 6 steps done" in page.inner_text(".what")
            RunFolder(folder).append_metrics({"step": 5, "reward": 0.75, "loss": 0.25})
            playwright.expect(page.locator(".what")).to_contain_text("5 of 6 steps done", timeout=PATIENCE)
            page.wait_for_selector("[data-browser] tbody tr")
            assert page.input_value('[data-role="query"]') == "number 2"
            page.locator('[data-plot="reward"]').scroll_into_view_if_needed()
            page.wait_for_selector('[data-plot="reward"][data-drawn]')
            drawn = page.evaluate("document.querySelector('[data-plot=reward]').data[0].y")
            assert drawn[-1] == 0.75
        finally:
            server.shutdown()
            thread.join()
