"use strict";
// The completions browser. Every text goes in as textContent: nothing a model wrote is ever read as HTML.
var darBrowser = (() => {
  const PAGE = 60;
  const COLUMNS = [
    ["prompt", "prompt"], ["text", "completion"], ["reward", "reward"], ["gold", "gold"], ["advantage", "advantage"], ["weight", "weight"],
    ["kl_ref", "KL to π₀, nats"], ["length", "tokens"], ["ended", "EOS"],
  ];
  const TEXTS = ["prompt", "text"];
  const cache = new Map();

  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  function hostile(text, extra = "") {
    return make("div", { className: `hostile ${extra}`, dir: "auto", textContent: text });
  }

  function figure(value) {
    if (value === null || value === undefined) return "–";
    if (typeof value === "string") return value;
    if (typeof value === "boolean") return value ? "yes" : "no";
    const text = Number.isInteger(value) ? String(value) : Math.abs(value) >= 100 ? value.toFixed(1) : value.toFixed(3);
    return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
  }

  function picture(row, extra = "") {
    const onload = (event) => event.target.classList.toggle("pixels", event.target.naturalHeight < 64);
    return make("img", { className: `picture ${extra}`, alt: row.prompt, title: row.chunk.name, onload, src: `data:image/png;base64,${row.image}` });
  }

  async function unpack(id) {
    if (!cache.has(id)) {
      const packed = atob(document.getElementById(`chunk-${id}`).textContent);
      const bytes = Uint8Array.from(packed, (char) => char.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      cache.set(id, JSON.parse(await new Response(stream).text()));
    }
    return cache.get(id);
  }

  function rowsOf(chunk, data) {
    return data.text.map((text, index) => {
      const row = { chunk, data, index, text, prompt: data.prompts[data.prompt[index]], image: data.image?.[index] };
      for (const [key] of COLUMNS) if (!TEXTS.includes(key) && data[key]) row[key] = data[key][index];
      return row;
    });
  }

  function tokens(row) {
    const box = hostile("");
    row.data.tokens[row.index].forEach((id, at) => {
      const nats = row.data.ratio[row.index][at] * row.data.full / 2000;
      const shown = row.image ? nats.toPrecision(2).replace("-", "−") : figure(nats);
      const token = make("span", { textContent: row.data.vocabulary[id], title: `${shown} nats` });
      const strength = Math.min(Math.abs(nats) / row.data.full, 1) * 0.75;
      token.style.background = nats < 0 ? `rgba(0,114,178,${strength})` : `rgba(213,94,0,${strength})`;
      token.dataset.nats = shown;
      box.append(token);
    });
    const missing = row.length - row.data.tokens[row.index].length;
    if (missing > 0) box.append(make("span", { className: "muted", textContent: ` … ${missing} tokens more` }));
    return box;
  }

  // Of each prompt in each file the completion with the highest reward, or the lowest.
  function extremes(rows, sign) {
    const found = new Map();
    for (const row of rows) {
      const key = `${row.chunk.id} ${row.data.prompt[row.index]}`, best = found.get(key);
      if (row.reward !== null && row.reward !== undefined && (!best || sign * (row.reward - best.reward) > 0)) found.set(key, row);
    }
    return [...found.values()];
  }

  class Browser {
    constructor(root, chunks, state) {
      this.root = root;
      this.chunks = chunks;
      this.state = state;
      this.rows = [];
      this.shown = PAGE;
      this.opened = new Set();
      this.part = (role) => root.querySelector(`[data-role="${role}"]`);
    }

    async start() {
      const several = new Set(this.chunks.map((chunk) => chunk.run)).size > 1;
      const select = this.part("chunk");
      for (const chunk of this.chunks) {
        chunk.name = several ? `${chunk.run}: ${chunk.label}` : chunk.label;
        select.append(make("option", { value: chunk.id, textContent: `${chunk.name} (${chunk.rows})` }));
      }
      if (this.chunks.length > 1) select.append(make("option", { value: "all", textContent: "all of them" }));
      const ids = [...select.options].map((option) => option.value);
      // The newest is what one comes to see, unless something else was chosen before a refresh.
      select.value = ids.includes(this.state.chunk) ? this.state.chunk : this.chunks[this.chunks.length - 1].id;
      this.part("query").value = this.state.query ?? "";
      this.part("ratio").checked = this.state.ratio ?? false;
      this.part("kind").value = this.state.kind ?? "";
      this.asSheet = this.part("sheet");
      if (this.asSheet) Object.assign(this.asSheet, { checked: this.state.sheet ?? true, onchange: () => this.refresh() });
      const sort = this.part("sort");
      for (const [key, label] of [["", "order of the data"], ...COLUMNS.filter(([key]) => key !== (this.asSheet ? "ended" : "gold"))]) sort.append(make("option", { value: key, textContent: label }));
      sort.addEventListener("change", () => this.sortBy(sort.value));
      this.part("kind").addEventListener("change", () => this.refresh());
      select.addEventListener("change", () => this.load());
      this.part("prompt").addEventListener("change", () => this.refresh());
      this.part("query").addEventListener("input", () => this.refresh());
      this.part("ratio").addEventListener("change", () => this.render());
      this.part("more").addEventListener("click", () => { this.shown += 4 * PAGE; this.render(); });
      for (const touch of ["pointerover", "click"]) this.part("body").addEventListener(touch, (event) => {
        const nats = event.target.dataset.nats;
        if (!nats) return;
        this.part("token").textContent = `log π/π₀ of this token: ${nats} nats`;
        const shown = event.target.closest("td").querySelector(".nats");
        if (shown) shown.textContent = `“${event.target.textContent.trim()}”: log π/π₀ = ${nats} nats`;
      });
      await this.load(this.state.prompt);
    }

    async load(prompt) {
      const chosen = this.part("chunk").value;
      const mine = chosen === "all" ? this.chunks : this.chunks.filter((chunk) => chunk.id === chosen);
      this.part("status").textContent = "unpacking …";
      const found = [];
      for (const chunk of mine) found.push(...rowsOf(chunk, await unpack(chunk.id)));
      if (this.part("chunk").value !== chosen) return;
      this.rows = found;
      this.opened.clear();
      const prompts = this.part("prompt");
      const before = prompt ?? prompts.value;
      const names = [...new Set(found.map((row) => row.prompt))];
      prompts.replaceChildren(make("option", { value: "", textContent: `all ${names.length}` }));
      for (const name of names) {
        const short = name.length > 80 ? `${name.slice(0, 80)}…` : name;
        prompts.append(make("option", { value: name, textContent: short, dir: "auto" }));
      }
      prompts.value = names.includes(before) ? before : "";
      this.refresh();
    }

    refresh() {
      this.shown = PAGE;
      this.render();
    }

    visible() {
      const query = this.part("query").value.toLowerCase(), prompt = this.part("prompt").value;
      const kind = this.part("kind").value;
      const pool = kind === "best" ? extremes(this.rows, 1) : kind === "worst" ? extremes(this.rows, -1) : this.rows;
      const rows = pool.filter((row) =>
        (!prompt || row.prompt === prompt)
        && (kind !== "cut" || row.ended === false) && (kind !== "ended" || row.ended)
        && (!query || row.text.toLowerCase().includes(query) || row.prompt.toLowerCase().includes(query)));
      const { sort, down } = this.state;
      if (!sort) return rows;
      const value = (row) => (sort === "ended" ? Number(row.ended) : row[sort]);
      return rows.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || x === undefined) return 1;
        if (y === null || y === undefined) return -1;
        const order = typeof x === "string" ? x.localeCompare(y) : x - y;
        return down ? -order : order;
      });
    }

    render() {
      const ratio = this.part("ratio").checked;
      Object.assign(this.state, {
        chunk: this.part("chunk").value, prompt: this.part("prompt").value, query: this.part("query").value, ratio,
        kind: this.part("kind").value, sheet: this.asSheet?.checked,
      });
      const rows = this.visible();
      const isOne = this.state.prompt !== "";
      const columns = COLUMNS.filter(([key]) => (key === "prompt" ? !isOne : this.rows.some((row) => row[key] !== undefined)));
      this.part("sort").value = this.state.sort ?? "";
      this.part("legend").hidden = !ratio;
      this.part("status").textContent = `${rows.length} of ${this.rows.length} completions`;
      const isSheet = Boolean(this.state.sheet) && rows.every((row) => row.image), limit = isSheet ? 16 * this.shown : this.shown;
      this.root.classList.toggle("contacts", isSheet);
      this.part("head").replaceChildren(...isSheet ? [] : columns.map((column) => this.header(column)));
      const line = (row) => this.line(row, columns, ratio), shown = rows.slice(0, limit);
      this.part("body").replaceChildren(...isSheet ? this.sheet(shown, ratio) : shown.flatMap(line));
      this.part("more").hidden = rows.length <= limit;
    }

    // A row of images for each prompt and file, by prompt, each over the figure they are sorted by; below it what is opened.
    sheet(rows, ratio) {
      const groups = new Map(), name = (row) => `${row.chunk.id} ${row.prompt}`;
      for (const row of rows) groups.set(name(row), [...groups.get(name(row)) ?? [], row]);
      const key = rows.some((row) => typeof row[this.state.sort] === "number") ? this.state.sort : "reward";
      const order = ([a], [b]) => a.prompt.localeCompare(b.prompt, undefined, { numeric: true });
      return [...groups.values()].sort(order).flatMap((found) => [
        make("tr", {},
          make("td", { className: "prompt" }, hostile(found[0].prompt.slice(0, 200), "snippet"), make("small", { textContent: this.part("chunk").value === "all" ? found[0].chunk.name : "" })),
          make("td", { className: "text" }, make("div", { className: "sheet" }, ...found.map((row) => this.opener(row, picture(row), figure(row[key])))))),
        ...found.filter((row) => this.opened.has(row)).map((row) => this.detail(row, 2, ratio)),
      ]);
    }

    opener(row, ...content) {
      const open = make("button", { type: "button", className: "open" }, ...content);
      open.setAttribute("aria-expanded", String(this.opened.has(row)));
      open.addEventListener("click", () => {
        if (!this.opened.delete(row)) this.opened.add(row);
        this.render();
      });
      return open;
    }

    header([key, label]) {
      const sort = make("button", { type: "button", textContent: label });
      sort.addEventListener("click", () => this.sortBy(key));
      const cell = make("th", { className: TEXTS.includes(key) ? key : "", scope: "col" }, sort);
      cell.setAttribute("aria-sort", this.state.sort !== key ? "none" : this.state.down ? "descending" : "ascending");
      return cell;
    }

    sortBy(key) {
      this.state.down = this.state.sort === key ? !this.state.down : !TEXTS.includes(key);
      this.state.sort = key;
      this.refresh();
    }

    line(row, columns, ratio) {
      const cells = columns.map(([key, label]) => {
        if (key === "prompt") return make("td", { className: "prompt" }, hostile(row.prompt.slice(0, 200), "snippet"));
        if (key !== "text") {
          const cell = make("td", { textContent: figure(row[key]) });
          cell.dataset.label = label;
          return cell;
        }
        const content = row.image ? picture(row) : hostile(row.text.slice(0, 400), "snippet");
        return make("td", { className: "text" }, this.opener(row, content));
      });
      const line = make("tr", {}, ...cells);
      return this.opened.has(row) ? [line, this.detail(row, columns.length, ratio)] : [line];
    }

    detail(row, width, ratio) {
      const colored = ratio && row.data.tokens;
      const parts = Object.entries(row.data.parts).map(([name, values]) => [name, values[row.index]]);
      if (row.image) parts.unshift(...COLUMNS.filter(([key]) => typeof row[key] === "number").map(([key, label]) => [label, row[key]]));
      const list = make("dl", {}, ...parts.map(([name, value]) =>
        make("div", {}, make("dt", { textContent: name, dir: "auto" }), make("dd", { textContent: figure(value) }))));
      const group = make("button", { type: "button", textContent: "only this prompt" });
      group.addEventListener("click", () => { this.part("prompt").value = row.prompt; this.refresh(); });
      const omitted = row.data.omitted[row.index];
      const cell = make("td", { colSpan: width },
        make("h4", { textContent: `prompt, ${row.chunk.label}` }), hostile(row.prompt),
        make("h4", { textContent: "completion" }), ...row.image ? [picture(row, "large")] : [],
        ...colored ? [tokens(row)] : row.image ? [] : [hostile(row.text)]);
      if (colored) cell.append(make("p", { className: "muted nats", textContent: `Tap a ${row.image ? "step" : "token"}, or point at it.` }));
      if (omitted && !colored) cell.append(make("p", { className: "muted", textContent: `… ${omitted} characters more were left out of this page` }));
      if (ratio && !row.data.tokens) cell.append(make("p", { className: "muted", textContent: "No log-probabilities under π and π₀ were recorded here." }));
      cell.append(list, group);
      return make("tr", { className: "detail" }, cell);
    }
  }

  function start(root, chunks, state) {
    return new Browser(root, chunks, state).start();
  }

  return { start, forget: () => cache.clear() };
})();
