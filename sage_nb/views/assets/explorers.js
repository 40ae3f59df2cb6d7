// What every explorer shares. A script of a kind calls sage.register(kind, (root, data, tools) => { ... }).
// Words from data reach the page as text and attributes only, never as markup.
"use strict";
(() => {
  if (window.sage) return;
  const kinds = {};
  const SVG = "http://www.w3.org/2000/svg";

  // Elements

  // el("button", {class: "cell", onclick: f, "aria-label": "…"}, "text", child, [more children])
  function build(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (typeof value === "function") element.addEventListener(name.replace(/^on/, ""), value);
      else if (name === "value") element.value = value;
      else if (name === "style") element.style.cssText = value;
      else if (/^on/i.test(name)) throw new Error(`${name} must be a function`);
      else element.setAttribute(name, value === true ? "" : String(value));
    }
    for (const child of children.flat(Infinity)) {
      if (child === null || child === undefined || child === false) continue;
      element.append(child instanceof Node ? child : String(child));
    }
    return element;
  }
  const el = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children);
  const empty = (element, ...children) => {
    element.replaceChildren();
    return build(element, {}, children);
  };

  // Text and numbers

  // at most `limit` characters, and whether something was cut off
  function cut(text, limit = 48) {
    const calm = String(text)
      .slice(0, 40 * limit)
      .replace(/(\p{M}{4})\p{M}+/gu, "$1"); // no towers of accents
    const letters = Array.from(calm.slice(0, 4 * limit + 4));
    return letters.length <= limit ? calm : letters.slice(0, limit - 1).join("") + "…";
  }
  // a word in an element of its own: cut, and whole (as far as anyone reads) in its title
  function word(text, {limit = 48, tag = "bdi", ...attributes} = {}) {
    const short = cut(text, limit);
    const title =
      short === String(text) || !short.endsWith("…") ? null : `${cut(text, 400)} (${String(text).length} characters)`;
    return el(tag, {title, ...attributes}, short);
  }
  // whole numbers as they are, others with two decimals, or in powers of ten where those would say nothing; with so
  // many decimals, where they are given
  function number(x, digits = null) {
    if (x === null || x === undefined || Number.isNaN(x)) return "–";
    const size = Math.abs(x);
    const powers = size >= 1e6 || (digits === null && size !== 0 && size < 0.005);
    const whole = digits === null && Number.isInteger(x);
    const text = powers ? x.toExponential(1) : whole ? String(x) : x.toFixed(digits ?? 2);
    return text.replace(/^-(0\.?0*)$/, "$1").replace(/-/g, "−");
  }
  // an estimate {value, lo, hi}: 0.42 [0.31, 0.55]
  function estimate(e, digits = 2) {
    if (!e || e.value === null || e.value === undefined) return "–";
    const known = e.lo !== null && e.lo !== undefined && e.hi !== null && e.hi !== undefined;
    return number(e.value, digits) + (known ? ` [${number(e.lo, digits)}, ${number(e.hi, digits)}]` : "");
  }
  const percent = (x, digits = 0) => (x === null || x === undefined ? "–" : `${number(100 * x, digits)} %`);
  const plural = (n, one, many) => `${n} ${n === 1 ? one : many || one + "s"}`;

  // Colours: blue above 0 and red below, one green, eight tints; each is safe for colour-blind readers, and what is
  // written on it is black or white, whichever can be read

  const SCALES = {
    above: {light: ["#f6f7f8", "#92c5de", "#2b78b3", "#053061"], dark: ["#262b31", "#1f4f7a", "#3f8fd0", "#b9dcff"]},
    below: {light: ["#f6f7f8", "#f4a582", "#c8433f", "#67001f"], dark: ["#262b31", "#7a3026", "#d9654d", "#ffd0be"]},
    amount: {light: ["#f6f7f8", "#a6dba8", "#2f8f5b", "#00441b"], dark: ["#262b31", "#1d5738", "#35a06a", "#b5f0c8"]},
  };
  const parse = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  function mix(stops, share) {
    const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    const i = Math.min(Math.floor(place), stops.length - 2);
    const [a, b] = [parse(stops[i]), parse(stops[i + 1])];
    return a.map((from, c) => Math.round(from + (b[c] - from) * (place - i)));
  }
  function luminance(rgb) {
    const [r, g, b] = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  const hex = (rgb) => "#" + rgb.map((c) => c.toString(16).padStart(2, "0")).join("");
  const inkOn = (rgb) => (luminance(rgb) > 0.179 ? "#000000" : "#ffffff");
  const both = (of, scale, share) => `light-dark(${["light", "dark"].map((t) => of(mix(SCALES[scale][t], share)))})`;
  const around = (x, limit) => [x < 0 ? "below" : "above", Math.abs(x) / (limit || 1)];
  const upTo = (x, limit) => ["amount", x / (limit || 1)];
  const missing = (x) => x === null || x === undefined || Number.isNaN(x);
  // a style for el(…, {style}) by a number around 0 whose largest size is `limit`, or by a number from 0 on …
  const shaded =
    (scale) =>
    (x, limit = 1) =>
      missing(x) ? "" : `background:${both(hex, ...scale(x, limit))};color:${both(inkOn, ...scale(x, limit))}`;
  const [diverging, sequential] = [shaded(around), shaded(upTo)];
  // … and the colour alone, for what is drawn
  const painted =
    (scale) =>
    (x, limit = 1) =>
      missing(x) ? "none" : both(hex, ...scale(x, limit));
  const [divergingFill, sequentialFill] = [painted(around), painted(upTo)];
  const TINTS = [
    ["#ffd8a8", "#6b4310"],
    ["#b9e4ff", "#134a6e"],
    ["#c3f0c8", "#1c5930"],
    ["#f0c9fb", "#5c2a6d"],
    ["#fff0a0", "#5c5108"],
    ["#ffc9c9", "#732828"],
    ["#b8efe6", "#0e534a"],
    ["#dcd4fb", "#43357f"],
  ];
  const tint = (i) => {
    const [light, dark] = TINTS[i % TINTS.length];
    return `background:light-dark(${light},${dark});color:light-dark(#000000,#ffffff)`;
  };
  const LINES = [
    ["#0b57c2", "#8ab8ff"],
    ["#b5460b", "#ffab73"],
    ["#0b7a55", "#5fd0a5"],
    ["#9a2e86", "#f09be0"],
    ["#6b5d00", "#d8c64a"],
    ["#5b3fc4", "#bba8ff"],
    ["#a3203c", "#ff97a8"],
    ["#3d5566", "#a9c3d4"],
  ];
  const line = (i) => `light-dark(${LINES[i % LINES.length].join(",")})`;

  // Tokens: spaces stay, line breaks and other controls are shown, a long token is cut

  const SHOWN = {"\n": "↵", "\r": "↵", "\t": "⇥"};
  function tokenText(text, limit = 32) {
    return cut(text, limit).replace(/[\u0000-\u001f\u007f]/g, (c) => SHOWN[c] || "\ufffd");
  }
  // strings → one line of tokens; marks: index → {style, role, title, differs, onclick, label}
  function tokens(strings, marks = {}, {limit = 32} = {}) {
    return el(
      "p",
      {class: "tokens"},
      strings.map((text, i) => {
        const mark = marks[i] || {};
        const long = Array.from(String(text).slice(0, 4 * limit)).length > limit;
        const title = mark.title || (long ? `${cut(text, 400)} (${text.length} characters)` : null);
        const names = ["token", (mark.style || mark.role) && "marked", mark.differs && "differs"].filter(Boolean);
        const space = names.length > 1 && /^ ./.test(text) ? " " : ""; // stands before the mark, not in it
        return [
          space,
          el(
            "span",
            {class: names.join(" "), style: mark.style, title},
            tokenText(text.slice(space.length), limit),
            mark.role ? el("sub", {}, cut(mark.role, 16)) : null,
          ),
        ];
      }),
    );
  }

  // Controls: real inputs with a label each

  const control = (name, input) => el("label", {class: "control"}, el("span", {class: "name"}, name), input);
  // options: values, or [value, text] pairs
  function select(name, options, value, change) {
    const pairs = options.map((option) => (Array.isArray(option) ? option : [option, option]));
    const input = el(
      "select",
      {onchange: () => change(input.value)},
      pairs.map(([id, text]) => el("option", {value: id}, cut(text, 60))),
    );
    input.value = value;
    return control(name, input);
  }
  // a few options as buttons, of which one is pressed
  function choices(name, options, value, change) {
    const pairs = options.map((option) => (Array.isArray(option) ? option : [option, option]));
    const buttons = pairs.map(([id, text]) =>
      el(
        "button",
        {
          type: "button",
          "aria-pressed": String(String(id) === String(value)),
          onclick: (event) => {
            for (const b of buttons) b.setAttribute("aria-pressed", String(b === event.currentTarget));
            change(id);
          },
        },
        word(text, {limit: 40}),
      ),
    );
    return el(
      "fieldset",
      {class: "control"},
      el("legend", {class: "name"}, name),
      el("div", {class: "choices"}, buttons),
    );
  }
  function slider(name, {min = 0, max, step = 1, value, text = String}, change) {
    const shown = el("output", {}, text(value));
    const input = el("input", {
      type: "range",
      min,
      max,
      step,
      value,
      "aria-valuetext": text(value),
      oninput: () => {
        shown.textContent = text(Number(input.value));
        input.setAttribute("aria-valuetext", text(Number(input.value)));
        change(Number(input.value));
      },
    });
    input.value = value;
    return control(name, el("span", {class: "slider"}, input, shown));
  }
  function search(name, value, change) {
    const input = el("input", {type: "search", value, autocomplete: "off", oninput: () => change(input.value)});
    return control(name, input);
  }

  // Tables

  // arrow keys, Home and End among the buttons in a table's rows; one of them is in the tab order
  function roving(table) {
    const rows = () => [...table.rows].map((row) => [...row.querySelectorAll("button")]).filter((row) => row.length);
    const all = () => rows().flat();
    const enter = (button) => {
      for (const other of all()) other.tabIndex = other === button ? 0 : -1;
    };
    const first = all().find((b) => b.getAttribute("aria-pressed") === "true") || all()[0];
    if (first) enter(first);
    table.addEventListener("focusin", (event) => event.target.matches("button") && enter(event.target));
    table.addEventListener("keydown", (event) => {
      const grid = rows();
      const y = grid.findIndex((row) => row.includes(document.activeElement));
      if (y < 0) return;
      const x = grid[y].indexOf(document.activeElement);
      const clamp = (i, n) => Math.min(Math.max(i, 0), n - 1);
      const at = (row, column) => grid[clamp(row, grid.length)][clamp(column, grid[clamp(row, grid.length)].length)];
      const next = {
        ArrowLeft: () => at(y, x - 1),
        ArrowRight: () => at(y, x + 1),
        ArrowUp: () => at(y - 1, x),
        ArrowDown: () => at(y + 1, x),
        Home: () => at(event.ctrlKey ? 0 : y, 0),
        End: () => at(event.ctrlKey ? grid.length : y, Infinity),
      }[event.key];
      if (!next) return;
      event.preventDefault();
      next().focus();
    });
    return table;
  }
  const scroll = (label, ...children) =>
    el("div", {class: "scroll", role: "group", tabindex: 0, "aria-label": cut(label, 200)}, children);

  // columns: {key, name, help, number: true, show: (value, row) => text or element, order: (row) => what sorts}
  function sortable({caption, columns, rows, sort = null, descending = true, rowOf = null, sorted = null}) {
    const body = el("tbody");
    const heads = columns.map((column) => {
      const button = el(
        "button",
        {class: "sort", type: "button", onclick: () => turn(column)},
        word(column.name, {limit: 40}),
      );
      return el(
        "th",
        {scope: "col", class: column.number ? "number" : null, title: column.help ? cut(column.help, 400) : null},
        button,
      );
    });
    let [by, down] = [columns.find((column) => column.key === sort) || null, descending];
    const key = (row) => (by.order ? by.order(row) : row[by.key]);
    function compared(a, b) {
      const [x, y] = [key(a), key(b)];
      const [missingX, missingY] = [x, y].map((value) => value === null || value === undefined);
      if (missingX || missingY) return missingX - missingY;
      const ahead = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
      return down ? -ahead : ahead;
    }
    function turn(column) {
      down = by === column ? !down : Boolean(column.number);
      by = column;
      fill();
      if (sorted) sorted(by.key, down);
    }
    function fill() {
      heads.forEach((head, i) => {
        if (columns[i] === by) head.setAttribute("aria-sort", down ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      });
      const order = by ? [...rows].sort(compared) : rows;
      empty(
        body,
        order.map((row) =>
          el(
            "tr",
            rowOf ? rowOf(row) : {},
            columns.map((column, i) => {
              const value = column.show ? column.show(row[column.key], row) : row[column.key];
              const shown =
                typeof value === "number" ? number(value) : value instanceof Node ? value : word(value ?? "–");
              const tag = i === 0 ? "th" : "td";
              return el(tag, {scope: i === 0 ? "row" : null, class: column.number ? "number" : null}, shown);
            }),
          ),
        ),
      );
    }
    fill();
    const table = el(
      "table",
      {},
      el("caption", {}, word(caption, {limit: 300})),
      el("thead", {}, el("tr", {}, heads)),
      body,
    );
    return scroll(caption, table);
  }

  // Tooltips: on hover and on focus, gone by Escape

  function tips(root) {
    const box = el("div", {class: "tip", role: "tooltip", hidden: true, id: `${root.id}-tip`});
    root.append(box);
    let owner = null;
    function hide() {
      if (owner) owner.removeAttribute("aria-describedby");
      owner = null;
      box.hidden = true;
    }
    function show(element, text) {
      hide();
      owner = element;
      box.textContent = text;
      box.hidden = false;
      element.setAttribute("aria-describedby", box.id);
      const at = element.getBoundingClientRect();
      const room = {x: document.documentElement.clientWidth - box.offsetWidth - 4, y: window.innerHeight};
      const below = at.bottom + 8 + box.offsetHeight < room.y || at.top < box.offsetHeight + 8;
      box.style.left = `${Math.max(4, Math.min(at.left + at.width / 2 - box.offsetWidth / 2, room.x))}px`;
      box.style.top = `${below ? at.bottom + 8 : at.top - box.offsetHeight - 8}px`;
    }
    root.addEventListener("keydown", (event) => event.key === "Escape" && hide());
    window.addEventListener("scroll", hide, true);
    // tools.tip(element, () => text)
    return (element, text) => {
      const say = () => show(element, typeof text === "function" ? text() : text);
      element.addEventListener("mouseenter", say);
      element.addEventListener("focus", () => element.matches(":focus-visible") && say());
      element.addEventListener("mouseleave", hide);
      element.addEventListener("blur", hide);
      return element;
    };
  }

  // Charts: values with intervals against x, as lines or as points; drawn again when their place gets wider

  function ticks(min, max, n = 5) {
    const rough = (max - min || 1) / n;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((size) => size >= rough);
    const first = Math.ceil(min / step - 1e-9);
    return Array.from({length: Math.floor(max / step + 1e-9) - first + 1}, (_, i) =>
      Number(((first + i) * step).toFixed(10)),
    );
  }
  function extent(values, {min, max} = {}) {
    const known = values.filter((v) => v !== null && v !== undefined);
    const [low, high] = [Math.min(...known, min ?? Infinity), Math.max(...known, max ?? -Infinity)];
    return low === high ? [low - 0.5, high + 0.5] : [low, high];
  }
  // {label: what is to be seen, x: {name, ticks, log, min, max}, y: {name, min, max, digits}, height, points: true,
  //  series: [{name, colour, points: [{x, value, lo, hi, text, strong}]}]}
  function chartWith(tip) {
    return (spec) => {
      const holder = el("div", {class: "chart"});
      const draw = () => empty(holder, chartAt(spec, Math.max(holder.clientWidth, 220), tip));
      new ResizeObserver((entries) => {
        const width = Math.round(entries[0].contentRect.width);
        if (width && String(width) !== holder.dataset.width) {
          holder.dataset.width = width;
          draw();
        }
      }).observe(holder);
      draw(); // at once, so that nothing is missing before the page is laid out
      return holder;
    };
  }
  function chartAt({label, x, y, series, height = 220, points = false}, width, tip) {
    const all = series.flatMap((s) => s.points);
    const scaled = (v) => (x.log ? Math.log2(v) : v);
    const [x0, x1] = extent(
      all.map((p) => scaled(p.x)),
      x,
    );
    const [y0, y1] = extent(
      all.flatMap((p) => [p.value, p.lo, p.hi]),
      y,
    );
    const box = {left: 62, right: width - 14, top: 12, bottom: height - 42};
    const atX = (v) => box.left + ((scaled(v) - x0) / (x1 - x0)) * (box.right - box.left);
    const atY = (v) => box.bottom - ((v - y0) / (y1 - y0)) * (box.bottom - box.top);
    const text = (value, attributes) => svg("text", {"font-size": 12, ...attributes}, value);
    const steps = ticks(y0, y1);
    const digits = y.digits ?? Math.max(...steps.map((v) => (String(v).split(".")[1] || "").length));
    const grid = steps.map((v) => [
      svg("line", {class: v === 0 ? "axis" : "guide", x1: box.left, x2: box.right, y1: atY(v), y2: atY(v)}),
      text(number(v, digits), {x: box.left - 7, y: atY(v) + 4, "text-anchor": "end"}),
    ]);
    const below = (x.ticks || ticks(x0, x1)).map((v) =>
      text(number(v), {x: atX(v), y: box.bottom + 17, "text-anchor": "middle"}),
    );
    const middle = (box.top + box.bottom) / 2;
    const names = [
      text(x.name, {class: "soft", x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle"}),
      text(y.name, {class: "soft", x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})`}),
    ];
    const drawn = series.map(({colour = line(0), points: some}) => {
      const known = some.filter((p) => p.value !== null && p.value !== undefined);
      const ranged = known.filter((p) => p.lo !== null && p.lo !== undefined && p.hi !== null && p.hi !== undefined);
      const spot = (p, side) => `${atX(p.x)},${atY(p[side])}`;
      const band = [...ranged.map((p) => spot(p, "hi")), ...[...ranged].reverse().map((p) => spot(p, "lo"))].join(" ");
      const bars = ranged.map((p) =>
        svg("line", {
          x1: atX(p.x),
          x2: atX(p.x),
          y1: atY(p.lo),
          y2: atY(p.hi),
          style: `stroke:${colour}`,
          "stroke-width": 1.5,
        }),
      );
      const path = svg("polyline", {
        points: known.map((p) => spot(p, "value")).join(" "),
        fill: "none",
        style: `stroke:${colour}`,
        "stroke-width": 2,
      });
      const dots = known.map((p) => {
        const dot = svg("circle", {
          cx: atX(p.x),
          cy: atY(p.value),
          r: p.strong ? 6 : 4,
          style: `fill:${colour}`,
          stroke: "var(--ink)",
          "stroke-width": p.strong ? 2 : 0,
        });
        return p.text ? tip(dot, p.text) : dot;
      });
      return points
        ? [bars, dots]
        : [svg("polygon", {points: band, style: `fill:${colour}`, opacity: 0.18}), path, dots];
    });
    return svg(
      "svg",
      {role: "img", "aria-label": label, width, height, viewBox: `0 0 ${width} ${height}`},
      grid,
      svg("line", {class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom}),
      below,
      names,
      drawn,
    );
  }

  // State: what is chosen, by name, as strings. In a page of its own it is also in the address, so that a view can be
  // linked; in a frame it is not.

  const alone = () => window.self === window.top;
  function stateOf(prefix, defaults, changed) {
    const values = {...defaults};
    const known = (name) => Object.prototype.hasOwnProperty.call(defaults, name);
    function read() {
      for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
        if (name.startsWith(prefix) && known(name.slice(prefix.length))) values[name.slice(prefix.length)] = value;
      }
    }
    function write() {
      const all = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
      for (const [name, value] of Object.entries(values)) {
        if (String(value) === String(defaults[name])) all.delete(prefix + name);
        else all.set(prefix + name, value);
      }
      const text = all.toString();
      history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
    }
    if (alone()) {
      read();
      window.addEventListener("hashchange", () => {
        Object.assign(values, defaults);
        read();
        changed();
      });
    }
    return {
      get: (name) => values[name],
      // the value if it is one of the options, else the first
      among: (name, options) => {
        const texts = options.map(String);
        return texts.includes(String(values[name])) ? String(values[name]) : texts[0];
      },
      number: (name, min, max) => {
        const value = Number(values[name]);
        return Number.isFinite(value) ? Math.min(Math.max(value, min), max) : Number(defaults[name]);
      },
      set: (changes, {quiet = false} = {}) => {
        Object.assign(values, changes);
        if (alone()) write();
        if (!quiet) changed();
      },
    };
  }

  // Light or dark as the page around is: what stands behind the explorer decides

  function behind(element) {
    for (let e = element; e; e = e.parentElement) {
      const [r, g, b, a = 1] = (getComputedStyle(e).backgroundColor.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
      if (a > 0.5) return luminance([r, g, b]) > 0.4 ? "light" : "dark";
    }
    return null;
  }
  function frameAround() {
    try {
      return window.frameElement;
    } catch {
      return null;
    } // a page of another origin says nothing
  }
  function followTheme(root) {
    const frame = frameAround();
    const own = document.body.classList.contains("sage-page");
    const outside = frame || (own ? null : root.parentElement);
    if (!outside) return;
    const set = () => {
      const theme = behind(outside);
      for (const e of own ? [root, document.body] : [root]) {
        if (theme) e.dataset.theme = theme;
        if (theme && e === document.body) e.style.colorScheme = theme;
      }
    };
    set();
    const page = outside.ownerDocument;
    const watch = new MutationObserver(() => requestAnimationFrame(set));
    for (const e of [page.documentElement, page.body]) watch.observe(e, {attributes: true});
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", set);
  }
  // a frame as high as what is in it
  function fitFrame() {
    const frame = frameAround();
    if (!frame || !frame.classList.contains("sage-frame")) return;
    const fit = () => {
      frame.style.height = `${Math.ceil(document.body.getBoundingClientRect().height) + 2}px`;
    };
    new ResizeObserver(fit).observe(document.body);
    fit();
  }

  // Start: the tables that stand there go into a fold, the explorer above them

  function start(root, i, several) {
    const kind = root.dataset.kind;
    const draw = kinds[kind];
    if (!draw || root.dataset.alive) return;
    root.dataset.alive = "yes";
    root.id = root.id || `sage-${i}`;
    followTheme(root);
    const tables = root.querySelector(".sage-static");
    const view = el("div", {class: "sage-view"});
    const tip = tips(root);
    const level = Number((root.querySelector("h1, h2, h3, h4")?.tagName || "H2")[1]) + 1;
    const live = el("p", {class: "hidden", role: "status", "aria-live": "polite"});
    const tools = {
      el,
      svg,
      empty,
      heading: (...children) => el(`h${level}`, {}, children),
      cut,
      word,
      number,
      estimate,
      percent,
      plural,
      tokens,
      tokenText,
      diverging,
      sequential,
      divergingFill,
      sequentialFill,
      tint,
      line,
      select,
      choices,
      slider,
      search,
      control,
      roving,
      scroll,
      sortable,
      tip,
      chart: chartWith(tip),
      id: root.id,
      say: (text) => {
        live.textContent = text;
      },
      state: (defaults, changed) => stateOf(several ? `${kind}.` : "", defaults, changed),
    };
    try {
      draw(view, JSON.parse(root.querySelector("script[type='application/json']").textContent), tools);
    } catch (error) {
      root.insertBefore(
        el("p", {class: "broken", role: "alert"}, `This explorer could not start: ${error.message}`),
        tables,
      );
      console.error(error);
      return;
    }
    const fold = el("details", {class: "static"}, el("summary", {}, "The same as tables"));
    root.insertBefore(view, tables);
    root.insertBefore(live, tables);
    root.insertBefore(fold, tables);
    fold.append(tables);
    if (!tables.textContent.trim()) fold.remove();
  }
  function startAll() {
    const roots = [...document.querySelectorAll(".sage-explorer[data-kind]")];
    roots.forEach((root, i) => start(root, i, roots.length > 1));
    fitFrame();
  }
  window.sage = {
    register: (kind, draw) => {
      kinds[kind] = draw;
      if (document.readyState !== "loading") startAll();
    },
  };
  document.addEventListener("DOMContentLoaded", startAll);
})();
