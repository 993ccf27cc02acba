// Sorting, charts and pictures of the report: plain DOM, no library; text from the data only ever becomes text nodes.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const MANY = 6; // lines, from where bands of all of them hide one another
  const FIRST = 9; // cards at first

  function make(name, attributes = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else node.setAttribute(key, value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  function draw(name, attributes = {}, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  // Rows of one method share its colour and differ in their dashes; data.styles is made by leaderboards/method_colours.py.
  const colour = (label) => data.styles[label].colour;
  const dash = (label) => ["", "7 4", "2 3"][data.styles[label].variant % 3];

  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
  function text(x, span = 1) {
    if (x === null) return "not scored";
    if (x !== 0 && Math.abs(x) >= 1000) return compact.format(x);
    const digits = Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(span || 1))));
    return x.toFixed(Math.abs(x) >= 10 && span >= 10 ? 0 : digits);
  }
  const fixed = (x) => (x === null ? "not scored" : Math.abs(x) >= 1000 ? compact.format(x) : String(Number(x.toPrecision(3))));
  const interval = (e) => (e[1] === null || e[1] === e[2] ? fixed(e[0]) : `${fixed(e[0])} [${fixed(e[1])}, ${fixed(e[2])}]`);

  function options(select, names, chosen, change) {
    names.forEach((name, k) => select.append(make("option", { value: k }, name)));
    select.value = String(Math.max(0, chosen));
    select.addEventListener("change", change);
  }

  // Light and dark

  const theme = at("theme");
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const remember = (value) => { try { localStorage.setItem("gpobench-theme", value); } catch { /* a file may be denied it */ } };
  const recall = () => { try { return localStorage.getItem("gpobench-theme"); } catch { return null; } };
  if (["light", "dark"].includes(recall())) root.dataset.theme = recall();
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => theme.setAttribute("aria-pressed", String(dark()));
  theme.hidden = false;
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; remember(root.dataset.theme); show(); });
  system.addEventListener("change", show);
  show();

  // Sorting

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const now = head.getAttribute("aria-sort");
        const other = { ascending: "descending", descending: "ascending" };
        const order = other[now] ?? head.dataset.first;
        heads.forEach((h) => { if (h.hasAttribute("aria-sort")) h.setAttribute("aria-sort", "none"); });
        head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const value = (row) => {
          const raw = row.cells[column].dataset.v;
          if (raw === "" || raw === "nan") return null;
          return Number.isNaN(Number(raw)) ? raw : Number(raw);
        };
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === null || y === null) return (x === null) - (y === null);
          return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
        });
        table.tBodies[0].append(...rows);
      });
    });
    heads[0].setAttribute("aria-sort", "ascending");
  }

  // One block of several

  for (const select of document.querySelectorAll("select.chooser")) {
    const choose = () => {
      for (const block of document.querySelectorAll(`[data-block="${select.dataset.of}"]`)) block.hidden = block.dataset.value !== select.value;
    };
    select.addEventListener("change", choose);
    choose();
  }
  const differ = at("settings-differ");
  differ.addEventListener("change", () => {
    for (const row of at("settings-table").querySelectorAll("tr.same")) row.hidden = differ.checked;
  });

  // Charts

  function ticks(low, high, count) {
    const raw = (high - low) / count;
    const size = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * size).find((s) => s >= raw * 0.999);
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
    return found;
  }

  // Ticks of a logarithmic axis: 1, 2, 5 times powers of ten where there is room, else the powers of ten, or some of them.
  function powers(low, high, most) {
    const every = [];
    for (let k = Math.floor(Math.log10(low)); 10 ** k <= high; k++) every.push(...[1, 2, 5].map((m) => m * 10 ** k));
    const inside = every.filter((x) => x >= low * 0.999 && x <= high * 1.001);
    if (inside.length <= most) return inside;
    const tens = inside.filter((x) => Number.isInteger(Math.round(1e6 * Math.log10(x)) / 1e6));
    return tens.filter((x, k) => k % Math.ceil(tens.length / most) === 0);
  }

  function range(values, zero = false) {
    const known = values.filter((x) => x !== null && Number.isFinite(x));
    if (!known.length) return [0, 1];
    let [low, high] = [Math.min(...known), Math.max(...known)];
    if (high - low < 1e-12) { const half = Math.abs(high) * 0.05 || 0.5; low -= half; high += half; }
    const pad = 0.05 * (high - low);
    return [zero && low >= 0 && low < 0.3 * high ? 0 : low - pad, high + pad];
  }

  let charts = 0;
  // log: the x axis is logarithmic.
  function frame(host, xs, ys, xName, yName, label, right = 14, log = false) {
    const width = Math.max(280, host.clientWidth - 18);
    const height = Math.round(Math.min(460, Math.max(300, width * 0.5)));
    const span = ys[1] - ys[0];
    const yTicks = ticks(...ys, 6);
    const step = yTicks.length > 1 ? yTicks[1] - yTicks[0] : span;
    const tick = (x, s) => (Math.abs(x) >= 1000 ? compact.format(x) : x.toFixed(Math.min(6, Math.max(0, -Math.floor(Math.log10(s) + 1e-9)))));
    const left = 14 + 7.2 * Math.max(...yTicks.map((y) => tick(y, step).length));
    const box = { left, right: width - right, top: 26, bottom: height - 40 };
    const scale = log ? Math.log10 : (x) => x;
    const X = (x) => box.left + ((scale(x) - scale(xs[0])) / (scale(xs[1]) - scale(xs[0]))) * (box.right - box.left);
    const Y = (y) => box.bottom - ((y - ys[0]) / (ys[1] - ys[0])) * (box.bottom - box.top);
    const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label });
    const clip = `plot-${++charts}`;
    picture.append(draw("clipPath", { id: clip }, draw("rect", { x: box.left, y: box.top - 6, width: box.right - box.left + 6, height: box.bottom - box.top + 7 })));
    for (const y of yTicks) {
      picture.append(draw("line", { class: "grid", x1: box.left, x2: box.right, y1: Y(y), y2: Y(y) }));
      picture.append(draw("text", { x: box.left - 7, y: Y(y) + 4, "text-anchor": "end" }, tick(y, step)));
    }
    const most = Math.max(2, Math.min(8, Math.floor((box.right - box.left) / 80)));
    const xTicks = log ? powers(...xs, most) : ticks(...xs, most);
    const xStep = xTicks.length > 1 ? xTicks[1] - xTicks[0] : 1;
    for (const x of xTicks) {
      picture.append(draw("line", { class: "grid", x1: X(x), x2: X(x), y1: box.top, y2: box.bottom }));
      picture.append(draw("text", { x: X(x), y: box.bottom + 17, "text-anchor": "middle" }, tick(x, xStep)));
    }
    picture.append(draw("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
    picture.append(draw("text", { x: (box.left + box.right) / 2, y: height - 5, "text-anchor": "middle" }, xName));
    picture.append(draw("text", { x: 2, y: 13 }, yName));
    const inner = draw("g", { "clip-path": `url(#${clip})` });
    picture.append(inner);
    const tip = make("div", { class: "tip", "aria-hidden": "true" });
    host.replaceChildren(picture, tip);
    const tell = (x, y, lines) => {
      tip.replaceChildren(...lines.flatMap((line, k) => (k ? [make("br"), line] : [line])));
      tip.style.visibility = "visible";
      const across = Math.min(Math.max(4, x + 14), host.clientWidth - tip.offsetWidth - 4);
      tip.style.left = `${across}px`;
      tip.style.top = `${Math.max(4, y - tip.offsetHeight - 10)}px`;
    };
    const hush = () => { tip.style.visibility = "hidden"; };
    const place = (event) => {
      const corner = picture.getBoundingClientRect();
      const scale = width / corner.width;
      return [(event.clientX - corner.left) * scale, (event.clientY - corner.top) * scale];
    };
    return { X, Y, box, width, picture, inner, tell, hush, place };
  }

  // Labels in a column, pushed apart until none overlaps.
  function spread(places, low, high, gap) {
    const sorted = [...places].sort((a, b) => a.y - b.y);
    sorted.forEach((p, k) => { p.at = Math.max(p.y, k ? sorted[k - 1].at + gap : low); });
    for (let k = sorted.length - 1; k >= 0; k--) sorted[k].at = Math.min(sorted[k].at, k === sorted.length - 1 ? high : sorted[k + 1].at - gap);
    return sorted;
  }

  const short = (name, letters) => (name.length > letters ? `${name.slice(0, letters - 1)}…` : name);
  const redraws = [];

  if (data.curves.length) {
    const keys = [...new Set(data.curves.flatMap((c) => Object.keys(c.scores)))];
    const currencies = [...new Set(data.curves.flatMap((c) => Object.keys(c.spent)))];
    const [pickKey, pickCurrency, bands] = [at("curve-key"), at("curve-currency"), at("curve-bands")];
    const hidden = new Set();
    let out = null; // the line that is brought out

    const lines = () => {
      const [key, currency] = [keys[pickKey.value], currencies[pickCurrency.value]];
      return data.curves.filter((c) => c.scores[key] && c.spent[currency]).map((c) => ({
        label: c.label,
        points: c.scores[key].map((e, k) => ({ x: c.spent[currency][k], e })).filter((p) => p.e[0] !== null && p.x !== null),
      }));
    };

    function redraw() {
      const [key, currency] = [keys[pickKey.value], currencies[pickCurrency.value]];
      const all = lines();
      const seen = all.filter((l) => !hidden.has(l.label) && l.points.length);
      const points = seen.flatMap((l) => l.points);
      const host = at("curve-chart");
      const roomy = host.clientWidth > 640;
      const named = roomy ? Math.min(190, 30 + 6.8 * Math.max(6, ...seen.map((l) => Math.min(24, l.label.length)))) : 14;
      const ys = range(points.flatMap((p) => (bands.value === "none" ? [p.e[0]] : p.e)));
      const xs = [0, Math.max(1e-9, ...points.map((p) => p.x)) * 1.01];
      const f = frame(host, xs, ys, `spent: ${currency}`, key, `${key} against ${currency}, ${seen.length} lines; the numbers are in the table below`, named);
      const group = new Map();
      for (const l of seen) {
        const g = draw("g");
        const path = (pick) => l.points.map((p) => `${f.X(p.x).toFixed(1)},${f.Y(pick(p)).toFixed(1)}`);
        const whole = l.points.filter((p) => p.e[1] !== null);
        if (bands.value !== "none" && whole.length > 1) {
          const edge = (k, list) => list.map((p) => `${f.X(p.x).toFixed(1)},${f.Y(p.e[k]).toFixed(1)}`);
          g.append(draw("polygon", { points: [...edge(2, whole), ...edge(1, [...whole].reverse())].join(" "), fill: colour(l.label), class: "band" }));
        }
        g.append(draw("polyline", { points: path((p) => p.e[0]).join(" "), fill: "none", stroke: colour(l.label), "stroke-width": 2, "stroke-dasharray": l.points.length < 3 ? "1 5" : dash(l.label), "stroke-linejoin": "round", "stroke-linecap": l.points.length < 3 ? "round" : "butt" }));
        for (const p of l.points) g.append(draw("circle", { cx: f.X(p.x), cy: f.Y(p.e[0]), r: 2.4, fill: colour(l.label) }));
        f.inner.append(g);
        group.set(l.label, g);
      }
      const names = new Map();
      if (roomy) {
        const ends = seen.map((l) => ({ label: l.label, x: f.X(l.points.at(-1).x), y: f.Y(l.points.at(-1).e[0]) }));
        for (const p of spread(ends, f.box.top + 4, f.box.bottom - 2, 15)) {
          const g = draw("g", {},
            draw("polyline", { points: `${p.x + 4},${p.y} ${f.box.right + 12},${p.at} ${f.box.right + 18},${p.at}`, fill: "none", stroke: colour(p.label), opacity: 0.6 }),
            draw("text", { x: f.box.right + 22, y: p.at + 4, class: "name" }, short(p.label, 24)));
          f.picture.append(g);
          names.set(p.label, g);
        }
      }
      const bring = (label) => {
        out = label;
        for (const map of [group, names]) {
          for (const [name, g] of map) g.setAttribute("class", label !== null && name !== label ? "faint" : "");
        }
        for (const [name, g] of group) {
          const band = g.querySelector(".band");
          const lone = label ?? (bands.value === "one" ? seen[0].label : null);
          if (band) band.setAttribute("opacity", name === lone ? 0.2 : bands.value === "one" ? 0 : seen.length > MANY ? 0.05 : 0.14);
        }
      };
      redraw.bring = bring;
      bring(null);
      f.picture.addEventListener("pointermove", (event) => {
        const [x, y] = f.place(event);
        let best = null;
        for (const l of seen) for (const p of l.points) {
          const d = Math.hypot(f.X(p.x) - x, f.Y(p.e[0]) - y);
          if (!best || d < best.d) best = { d, l, p };
        }
        if (best && best.d < 50) {
          bring(best.l.label);
          f.tell(f.X(best.p.x), f.Y(best.p.e[0]), [best.l.label, interval(best.p.e), `${currency} ${compact.format(best.p.x)}`]);
        } else { bring(null); f.hush(); }
      });
      f.picture.addEventListener("pointerleave", () => { bring(null); f.hush(); });

      const table = make("table", {}, make("thead", {}, make("tr", {}, ...["Row", `spent: ${currency}`, key].map((name, k) => make("th", { scope: "col", class: k ? "num" : "" }, name)))));
      const body = make("tbody");
      for (const l of all) for (const p of l.points) {
        body.append(make("tr", {}, make("td", {}, l.label), make("td", { class: "num" }, compact.format(p.x)), make("td", { class: "num" }, interval(p.e))));
      }
      table.append(body);
      at("curve-table").replaceChildren(table);
    }

    options(pickKey, keys, keys.indexOf(data.key), redraw);
    options(pickCurrency, currencies, currencies.indexOf(data.clock), redraw);
    bands.value = data.curves.length > MANY ? "one" : "all";
    bands.addEventListener("change", redraw);
    for (const c of data.curves) {
      const sample = draw("svg", { viewBox: "0 0 22 10", "aria-hidden": "true" }, draw("line", { x1: 0, x2: 22, y1: 5, y2: 5, stroke: colour(c.label), "stroke-width": 2.5, "stroke-dasharray": dash(c.label) }));
      const chip = make("button", { type: "button", "aria-pressed": "true" }, sample, c.label);
      chip.addEventListener("click", () => {
        if (!hidden.delete(c.label)) hidden.add(c.label);
        chip.setAttribute("aria-pressed", String(!hidden.has(c.label)));
        redraw();
      });
      const bring = (label) => { if (out !== label) redraw.bring(label); };
      for (const [on, label] of [["pointerenter", c.label], ["focus", c.label], ["pointerleave", null], ["blur", null]]) {
        chip.addEventListener(on, () => bring(hidden.has(c.label) ? null : label));
      }
      at("curve-legend").append(chip);
    }
    redraws.push(redraw);
  }

  for (const [number, frontier] of data.frontiers.entries()) {
    const host = at(`frontier-chart-${number}`);
    const served = (row, images) => frontier.nfe + row.spent / images;
    const dots = (row) => data.served.map((images) => ({ images, nfe: served(row, images) }));

    function redraw() {
      const known = frontier.rows.filter((row) => row.gain[0] !== null && row.spent !== null);
      const gains = [...frontier.points.map((p) => p.gain), ...known.map((row) => row.gain)].flat();
      const costs = [frontier.nfe, ...frontier.points.map((p) => p.nfe), ...known.flatMap((row) => dots(row).map((d) => d.nfe))].filter((x) => x !== null);
      const xs = [Math.min(...costs) / 1.15, Math.max(...costs) * 1.15];
      const roomy = host.clientWidth > 640;
      const names = [frontier.label, ...known.map((row) => row.label)];
      const named = roomy ? Math.min(190, 30 + 6.8 * Math.max(6, ...names.map((name) => Math.min(24, name.length)))) : 14;
      const title = `gain in ${frontier.key} against nfe per served image: ${frontier.label} and ${known.length} trained rows; the numbers are in the tables below`;
      const f = frame(host, xs, range(gains), "nfe per served image", `gain in ${frontier.key}`, title, named, true);
      const hits = [];
      const shown = frontier.points.filter((p) => p.gain[0] !== null && p.nfe !== null);
      const c = colour(frontier.label);
      const at2 = (p, k) => `${f.X(p.nfe).toFixed(1)},${f.Y(p.gain[k]).toFixed(1)}`;
      const whole = shown.filter((p) => p.gain[1] !== null);
      if (whole.length > 1) f.inner.append(draw("polygon", { class: "band", fill: c, opacity: 0.14, points: [...whole.map((p) => at2(p, 2)), ...[...whole].reverse().map((p) => at2(p, 1))].join(" ") }));
      else for (const p of whole) f.inner.append(draw("line", { x1: f.X(p.nfe), x2: f.X(p.nfe), y1: f.Y(p.gain[1]), y2: f.Y(p.gain[2]), stroke: c, opacity: 0.5 }));
      f.inner.append(draw("polyline", { class: "search", points: shown.map((p) => at2(p, 0)).join(" "), fill: "none", stroke: c, "stroke-width": 2.5 }));
      for (const p of shown) {
        f.inner.append(draw("circle", { cx: f.X(p.nfe), cy: f.Y(p.gain[0]), r: 3.5, fill: c }));
        hits.push({ x: f.X(p.nfe), y: f.Y(p.gain[0]), lines: [`${frontier.label}, ${fixed(p.candidates)} candidates`, interval(p.gain), `nfe ${compact.format(p.nfe)}`] });
      }
      const ends = shown.length ? [{ label: frontier.label, x: f.X(shown.at(-1).nfe), y: f.Y(shown.at(-1).gain[0]) }] : [];
      for (const row of known) {
        const y = f.Y(row.gain[0]);
        const places = dots(row);
        const [dear, cheap] = [f.X(places[0].nfe), f.X(places.at(-1).nfe)];
        f.inner.append(draw("line", { class: "trained", x1: cheap, x2: dear, y1: y, y2: y, stroke: colour(row.label), "stroke-width": 2, "stroke-dasharray": dash(row.label) }));
        if (row.gain[1] !== null) f.inner.append(draw("line", { x1: cheap, x2: cheap, y1: f.Y(row.gain[1]), y2: f.Y(row.gain[2]), stroke: colour(row.label), opacity: 0.5 }));
        for (const place of places) {
          f.inner.append(draw("circle", { cx: f.X(place.nfe), cy: y, r: 2.8, fill: colour(row.label) }));
          hits.push({ x: f.X(place.nfe), y, lines: [`${row.label}, ${compact.format(place.images)} images served`, interval(row.gain), `nfe ${compact.format(place.nfe)}`] });
        }
        ends.push({ label: row.label, x: dear, y });
      }
      if (roomy) {
        for (const p of spread(ends, f.box.top + 4, f.box.bottom - 2, 15)) {
          f.picture.append(draw("polyline", { points: `${p.x + 5},${p.y} ${f.box.right + 12},${p.at} ${f.box.right + 18},${p.at}`, fill: "none", stroke: colour(p.label), opacity: 0.4 }),
            draw("text", { x: f.box.right + 22, y: p.at + 4, class: "name" }, short(p.label, 24)));
        }
      } else {
        for (const p of ends) f.picture.append(draw("text", { x: Math.min(p.x, f.box.right - 4), y: p.y - 6, "text-anchor": "end", class: "name" }, short(p.label, 14)));
      }
      f.picture.addEventListener("pointermove", (event) => {
        const [x, y] = f.place(event);
        const near = hits.map((h) => ({ h, d: Math.hypot(h.x - x, h.y - y) })).sort((a, b) => a.d - b.d)[0];
        if (near && near.d < 40) f.tell(near.h.x, near.h.y, near.h.lines); else f.hush();
      });
      f.picture.addEventListener("pointerleave", f.hush);
    }
    redraws.push(redraw);
  }

  {
    const [pickX, pickY] = [at("trade-x"), at("trade-y")];
    const better = (m) => (m.less ? "less is better" : "more is better");

    function redraw() {
      const [x, y] = [data.measures[pickX.value], data.measures[pickY.value]];
      const points = data.labels.filter((l) => x.values[l] && y.values[l] && x.values[l][0] !== null && y.values[l][0] !== null)
        .map((label) => ({ label, x: x.values[label], y: y.values[label] }));
      const xs = range(points.flatMap((p) => p.x), true);
      const ys = range(points.flatMap((p) => p.y));
      const f = frame(at("trade-chart"), xs, ys, `${x.name}: ${better(x)}`, `${y.name}: ${better(y)}`, `${y.name} against ${x.name} for ${points.length} rows`, 22);
      const beats = (a, b) => {
        const gain = [x.less ? b.x[0] - a.x[0] : a.x[0] - b.x[0], y.less ? b.y[0] - a.y[0] : a.y[0] - b.y[0]];
        return Math.min(...gain) >= 0 && Math.max(...gain) > 0;
      };
      const front = points.filter((p) => !points.some((q) => beats(q, p))).sort((a, b) => a.x[0] - b.x[0]);
      f.inner.append(draw("polyline", { class: "front", points: front.map((p) => `${f.X(p.x[0])},${f.Y(p.y[0])}`).join(" ") }));
      const taken = points.map((p) => ({ x: f.X(p.x[0]) - 7, y: f.Y(p.y[0]) - 7, w: 14, h: 14 }));
      const dots = [];
      for (const p of points) {
        const [cx, cy, c] = [f.X(p.x[0]), f.Y(p.y[0]), colour(p.label)];
        const g = draw("g");
        if (p.x[1] !== null) g.append(draw("line", { x1: f.X(p.x[1]), x2: f.X(p.x[2]), y1: cy, y2: cy, stroke: c, opacity: 0.35 }));
        if (p.y[1] !== null) g.append(draw("line", { x1: cx, x2: cx, y1: f.Y(p.y[1]), y2: f.Y(p.y[2]), stroke: c, opacity: 0.35 }));
        g.append(p.label === "base" ? draw("rect", { x: cx - 4.5, y: cy - 4.5, width: 9, height: 9, fill: c }) : draw("circle", { cx, cy, r: 5, fill: c }));
        f.inner.append(g);
        dots.push({ p, cx, cy, g });
      }
      // A name stands where it hides neither a point nor another name; far ones get a line to their point.
      const letters = f.width < 500 ? 16 : 30;
      for (const { p, cx, cy } of dots) {
        const said = short(p.label, letters);
        const w = 6.9 * said.length + 4;
        const spots = [];
        for (const d of [9, 20, 34, 50, 70, 95, 125]) {
          for (const [dx, dy] of [[d, 4], [-d - w, 4], [-w / 2, -d], [-w / 2, d + 9], [d, -d], [d, d + 6], [-d - w, -d], [-d - w, d + 6]]) spots.push({ x: cx + dx, y: cy + dy - 11, w, h: 15, d });
        }
        const inside = (s) => s.x >= f.box.left && s.x + s.w <= f.width && s.y >= f.box.top - 8 && s.y + s.h <= f.box.bottom;
        const free = (s) => !taken.some((t) => s.x < t.x + t.w && t.x < s.x + s.w && s.y < t.y + t.h && t.y < s.y + s.h);
        const spot = spots.find((s) => inside(s) && free(s));
        if (!spot) continue;
        taken.push(spot);
        if (spot.d > 9) f.picture.append(draw("line", { class: "lead", x1: cx, y1: cy, x2: Math.min(Math.max(cx, spot.x), spot.x + spot.w), y2: spot.y > cy ? spot.y + 1 : spot.y + spot.h }));
        f.picture.append(draw("text", { class: "name", x: spot.x, y: spot.y + 12 }, said));
      }
      f.picture.addEventListener("pointermove", (event) => {
        const [px, py] = f.place(event);
        const near = dots.map((d) => ({ ...d, r: Math.hypot(d.cx - px, d.cy - py) })).sort((a, b) => a.r - b.r)[0];
        for (const d of dots) d.g.setAttribute("class", near && near.r < 24 && d.p !== near.p ? "faint" : "");
        if (near && near.r < 24) f.tell(near.cx, near.cy, [near.p.label, `${y.name}: ${interval(near.p.y)}`, `${x.name}: ${interval(near.p.x)}`]);
        else f.hush();
      });
      f.picture.addEventListener("pointerleave", () => { f.hush(); for (const d of dots) d.g.setAttribute("class", ""); });
    }

    const names = data.measures.map((m) => m.name);
    options(pickX, names, data.across[0], redraw);
    options(pickY, names, data.across[1], redraw);
    redraws.push(redraw);
  }

  const redrawAll = () => redraws.forEach((redraw) => redraw());
  let wide = 0;
  new ResizeObserver(() => {
    const now = at("trade-chart").clientWidth;
    if (now !== wide) { wide = now; redrawAll(); }
  }).observe(at("trade-chart"));
  wide = at("trade-chart").clientWidth;
  redrawAll();

  // Pictures

  if (data.album) {
    const album = data.album;
    const labels = data.labels.filter((label) => album.frames[label]);
    const scored = [...new Set([data.key, ...data.training])];
    const pick = at("album-row");
    const dialog = at("album-dialog");
    let open = 0;
    let opener = null;
    let every = album.noises.length <= FIRST + 3;

    const picture = (k, alt) => make("img", { src: album.pictures[k], alt, class: Math.max(...album.size) <= 160 ? "sharp" : "" });
    const scorer = (key) => key.slice(0, key.indexOf("/"));
    const verdict = (key, x) => (/\/(exact|correct)$/.test(key) && x !== null ? (x === 1 ? "good" : "bad") : "");
    function caption(title, frame, phase, keys) {
      const said = make("figcaption", {}, title);
      for (const key of keys.filter((k) => frame.scores[k])) {
        const x = frame.scores[key][phase];
        const sign = { good: "✓ ", bad: "✗ ", "": "" }[verdict(key, x)];
        const note = frame.notes[scorer(key)]?.[phase];
        said.append(make("br"), `${key} `, make("span", { class: verdict(key, x) }, sign + fixed(x)), note && key === keys.find((k) => scorer(k) === scorer(key)) ? ` “${note}”` : "");
      }
      return said;
    }

    const words = ([p, o, t]) => t || `prompt ${p}, image ${o}`;

    function cards() {
      const label = labels[pick.value];
      at("album-cards").replaceChildren(...album.noises.slice(0, every ? undefined : FIRST).map((noise, k) => {
        const frame = album.frames[label][k];
        const sides = ["before", "after"].map((title, phase) => {
          const which = frame.pictures[phase];
          const look = which === null ? make("div", { class: "none" }, "not stored")
            : make("button", { type: "button", class: "look", "aria-haspopup": "dialog", "aria-label": `Enlarge: ${title}, ${words(noise)}`, onclick: (event) => { opener = event.currentTarget; enlarge(k); } }, picture(which, `${title}: ${words(noise)}`));
          return make("figure", {}, look, caption(title, frame, phase, scored));
        });
        return make("li", { class: "card" }, make("p", {}, words(noise), make("span", { class: "soft" }, ` · image ${noise[1]}`)), make("div", { class: "pair" }, ...sides));
      }));
    }

    function enlarge(k) {
      open = (k + album.noises.length) % album.noises.length;
      const label = labels[pick.value];
      const frame = album.frames[label][open];
      const keys = Object.keys(frame.scores);
      at("album-title").textContent = `${words(album.noises[open])} · image ${album.noises[open][1]}`;
      const shot = (title, frame, phase, some) => make("figure", {}, frame.pictures[phase] === null ? make("div", { class: "none" }, "not stored") : picture(frame.pictures[phase], `${title}: ${words(album.noises[open])}`), caption(title, frame, phase, some));
      at("album-main").replaceChildren(shot("before", frame, 0, keys), shot(`after: ${label}, seed ${album.seeds[label]}`, frame, 1, keys));
      at("album-others").hidden = labels.length < 2;
      at("album-shots").replaceChildren(...(labels.length < 2 ? [] : labels.map((l) => shot(`${l}, seed ${album.seeds[l]}`, album.frames[l][open], 1, scored))));
      if (!dialog.open) { dialog.showModal(); at("album-close").focus(); }
      dialog.scrollTop = 0;
    }

    at("album-close").addEventListener("click", () => dialog.close());
    at("album-previous").addEventListener("click", () => enlarge(open - 1));
    at("album-next").addEventListener("click", () => enlarge(open + 1));
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") enlarge(open - 1);
      if (event.key === "ArrowRight") enlarge(open + 1);
    });
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
    dialog.addEventListener("close", () => opener?.focus());
    options(pick, labels, 0, cards);
    at("album-all").hidden = every;
    at("album-all").addEventListener("click", () => {
      const seen = at("album-cards").children.length;
      every = true;
      cards();
      at("album-all").hidden = true;
      at("album-cards").children[seen].querySelector("button")?.focus();
    });
    cards();
  }
})();
