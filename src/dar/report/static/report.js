"use strict";
// Starts the page: plots when they come into view, the browser, the theme; where the page is served, asks for news.
(() => {
  const THEMES = ["auto", "light", "dark"];
  const state = { browser: {}, metric: null, open: {} };
  let data, observer;

  function drawNow(element) {
    const plot = data.plots[element.dataset.plot];
    if (plot) darPlot.draw(element, plot).then(() => { element.dataset.drawn = "yes"; });
  }

  function startPlots() {
    observer = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        observer.unobserve(entry.target);
        drawNow(entry.target);
      }
    }, { rootMargin: "400px" });
    for (const element of document.querySelectorAll("[data-plot]")) observer.observe(element);
  }

  function startMetrics() {
    const box = document.querySelector("[data-metrics]");
    if (!box) return;
    const select = box.querySelector('[data-role="metric"]'), target = box.querySelector('[data-role="plot"]');
    for (const name of Object.keys(data.metrics)) select.append(new Option(name, name));
    if (state.metric in data.metrics) select.value = state.metric;
    const draw = () => {
      state.metric = select.value;
      const [x, y] = data.metrics[select.value];
      darPlot.draw(target, {
        name: "metric", x: { title: "step", scale: "linear" }, y: { title: select.value, scale: "linear" },
        series: [{ name: select.value, x, y, color: 0, style: x.length > 1 ? "line" : "points", in_legend: true }], heatmap: null, marks: [], ticks: [],
      });
    };
    select.addEventListener("change", draw);
    box.addEventListener("toggle", () => { state.open.metrics = box.open; if (box.open) draw(); });
    box.open = state.open.metrics ?? false;
  }

  function start() {
    data = JSON.parse(document.getElementById("report-data").textContent);
    startPlots();
    startMetrics();
    const browser = document.querySelector("[data-browser]");
    if (browser) darBrowser.start(browser, data.chunks, state.browser);
  }

  function redraw() {
    for (const element of document.querySelectorAll("[data-drawn]")) drawNow(element);
    const box = document.querySelector("[data-metrics]");
    if (box && box.open) box.dispatchEvent(new Event("toggle"));
  }

  function startTheme() {
    const button = document.getElementById("theme");
    button.addEventListener("click", () => {
      const now = document.documentElement.dataset.theme ?? "auto";
      const next = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
      if (next === "auto") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = next;
      button.textContent = `theme: ${next}`;
      redraw();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    let before;
    addEventListener("beforeprint", () => {
      before = document.documentElement.dataset.theme;
      document.documentElement.dataset.theme = "light";
      document.documentElement.dataset.paper = "";
      for (const element of document.querySelectorAll("[data-plot]")) drawNow(element);
    });
    addEventListener("afterprint", () => {
      delete document.documentElement.dataset.paper;
      if (before) document.documentElement.dataset.theme = before; else delete document.documentElement.dataset.theme;
      redraw();
    });
  }

  // The new page is read as a document whose scripts never run; its texts are as harmless as this one's.
  async function replaceBy(html) {
    const fresh = new DOMParser().parseFromString(html, "text/html");
    const main = fresh.querySelector("main");
    if (!main) return;
    observer.disconnect();
    for (const element of document.querySelectorAll("[data-drawn]")) Plotly.purge(element);
    const top = scrollY;
    document.querySelector("main").replaceWith(document.importNode(main, true));
    for (const old of document.querySelectorAll('[id^="chunk-"], #report-data')) old.remove();
    for (const block of fresh.querySelectorAll('[id^="chunk-"], #report-data')) document.body.append(document.importNode(block, true));
    darBrowser.forget();
    start();
    scrollTo(0, top);
  }

  async function askForNews() {
    try {
      const answer = await fetch("/version", { cache: "no-store" });
      const version = answer.ok ? await answer.text() : data.version;
      if (version !== data.version) {
        const page = await fetch("/", { cache: "no-store" });
        if (page.ok) await replaceBy(await page.text());
      }
    } catch {
      document.getElementById("theme").title = "The server no longer answers; this is the last state it showed.";
    }
    setTimeout(askForNews, 2000);
  }

  startTheme();
  start();
  if (data.version) setTimeout(askForNews, 2000);
})();
