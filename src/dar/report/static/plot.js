"use strict";
// Draws the plots of the report from plain records (dar.report.plots.Plot), in the colors of the page's theme.
var darPlot = (() => {
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const MARKERS = ["circle", "diamond", "square", "triangle-up", "triangle-down", "cross", "x"];
  const CONFIG = {
    responsive: true, displaylogo: false, showTips: false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    toImageButtonOptions: { format: "png", scale: 3 },
  };

  function css(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function isDark() {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function withAlpha(hex, alpha) {
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    return `rgba(${r},${g},${b},${alpha})`;
  }

  function mapped(axis, values) {
    return axis.scale === "sqrt" ? values.map((value) => Math.sqrt(Math.max(value, 0))) : values;
  }

  // plotly reads a few HTML tags and %{fields} in names; a run's name is not to be one.
  function plain(text) {
    return text.replaceAll("<", "‹").replaceAll(">", "›").replaceAll("&", "＆").replaceAll("%{", "％{");
  }

  function axisLayout(axis, values, side, ticks) {
    const layout = {
      title: { text: plain(axis.title), standoff: side === "x" ? 8 : 6, font: { size: 12 } },
      gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true, fixedrange: side === "y",
      tickfont: { size: 11 },
    };
    if (axis.is_share) layout.tickformat = ".0%";
    if (axis.is_whole && Math.max(...values) - Math.min(...values) < 10) layout.dtick = 1;
    if (axis.scale === "sqrt") {
      const top = Math.max(...values.map((value) => Math.sqrt(Math.max(value, 0))), 0.1);
      Object.assign(layout, { tickvals: ticks.map(Math.sqrt), ticktext: ticks.map(String), range: [-0.03 * top, 1.05 * top] });
    }
    return layout;
  }

  function hover(plot, series) {
    const format = plot.y.is_share ? ".1%" : ".4~f";
    const x = plot.x.is_share ? `${plain(plot.x.title)} %{x:.1%}` : plot.x.scale === "sqrt" ? "KL %{customdata:.4~f} nats" : `${plain(plot.x.title)} %{x}`;
    return `${x}<br>%{y:${format}}<extra>${plain(series.name)}</extra>`;
  }

  function band(plot, series, color) {
    const x = mapped(plot.x, series.x);
    return {
      x: [...x, ...[...x].reverse()], y: [...series.high, ...[...series.low].reverse()],
      fill: "toself", fillcolor: withAlpha(color, 0.16), line: { width: 0 }, mode: "lines",
      hoverinfo: "skip", showlegend: false, type: "scatter",
    };
  }

  function traces(plot, series, palette) {
    const color = palette[series.color % palette.length];
    const dash = DASHES[series.color % DASHES.length], symbol = MARKERS[series.color % MARKERS.length];
    const base = {
      name: plain(series.name), x: mapped(plot.x, series.x), y: series.y, customdata: series.x,
      hovertemplate: hover(plot, series),
    };
    if (series.style === "bars") return [{ ...base, type: "bar", marker: { color, line: { width: 0 } } }];
    const line = {
      ...base, type: "scatter",
      mode: { line: "lines", points: "markers", "line+points": "lines+markers" }[series.style],
      line: { color, width: series.style === "line" && !series.is_faint ? 2 : 1, dash },
      marker: { color, symbol, size: series.x.length > 40 ? 5 : 8 },
      opacity: series.is_faint ? 0.4 : 1, showlegend: series.in_legend,
    };
    if (!series.low) return [line];
    if (series.is_band) return [band(plot, series, color), line];
    line.error_y = {
      type: "data", symmetric: false, thickness: 1.2, width: 3, color,
      array: series.high.map((high, i) => high - series.y[i]),
      arrayminus: series.low.map((low, i) => series.y[i] - low),
    };
    return [line];
  }

  function heatTrace(plot, map) {
    return {
      type: "heatmap", x: map.x, y: map.y, z: map.z, colorscale: [[0, css("--card")], [0.5, "#3f8fc4"], [1, isDark() ? "#bfe3ff" : "#00365c"]], zmin: 0,
      colorbar: { title: { text: map.label, font: { size: 11 } }, tickformat: ".0%", thickness: 10, outlinewidth: 0, tickfont: { size: 11 } },
      hovertemplate: `${plain(plot.x.title)} %{x}<br>${plain(plot.y.title)} %{y}<br>%{z:.1%}<extra></extra>`,
    };
  }

  function draw(element, plot) {
    const palette = [0, 1, 2, 3, 4, 5, 6, 7].map((place) => css(`--c${place}`));
    const data = plot.heatmap ? [heatTrace(plot, plot.heatmap)] : plot.series.flatMap((s) => traces(plot, s, palette));
    const all = (pick) => plot.series.flatMap(pick);
    const layout = {
      margin: { l: 52, r: 12, t: 8, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: css("--ink"), size: 12 },
      xaxis: axisLayout(plot.x, all((s) => s.x), "x", plot.ticks), yaxis: axisLayout(plot.y, [], "y", []),
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--muted"), activecolor: css("--accent") },
      barmode: "stack", bargap: 0.1, hovermode: "closest",
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
      showlegend: data.filter((trace) => trace.showlegend !== false).length > 1 && !plot.heatmap,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", maxheight: 0.8, font: { size: 11 }, bgcolor: "rgba(0,0,0,0)" },
      shapes: plot.marks.map((step) => ({
        type: "line", x0: step, x1: step, y0: 0, y1: 1, yref: "paper", line: { color: css("--warn"), width: 1, dash: "dot" },
      })),
    };
    if (plot.heatmap) {
      layout.xaxis.type = layout.yaxis.type = "category"; // a column is a recorded step, wherever its neighbours are
      layout.yaxis.title.standoff = 14;
    }
    // A legend of many names takes its height from the page, not from the curves.
    const named = data.filter((trace) => trace.showlegend !== false).length;
    element.style.height = "";
    if (named > 6) {
      const lines = Math.ceil(named / Math.max(1, Math.floor(element.clientWidth / 150)));
      element.style.height = `${element.clientHeight + 20 * lines}px`;
    }
    // The window keeps its size when the page is printed, so that plotly sees no reason to measure again.
    if ("paper" in document.documentElement.dataset) {
      Object.assign(layout, { width: element.clientWidth, height: element.clientHeight });
    }
    return Plotly.react(element, data, layout, CONFIG);
  }

  return { draw };
})();
