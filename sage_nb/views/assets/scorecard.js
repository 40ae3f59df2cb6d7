// SAEs × parts with intervals; any two compared in words; score against L0.
"use strict";
sage.register("scorecard", (root, data, tools) => {
  const {el, svg, empty, word, number, select, choices, search, sortable, tip, heading} = tools;
  const GREY = "var(--soft)";
  const ROLES = {
    sae: "SAE", twin: "random twin", baseline: "baseline without features", floor: "floor: mean ablation",
    skyline: "skyline: the ground truth's own SAE",
  };
  const byName = new Map(data.methods.map((method) => [method.name, method]));
  const saes = data.methods.filter((method) => method.role === "sae");
  const of = (role) => data.methods.find((method) => method.role === role);
  const colour = ({colour: own}) => (own === null ? GREY : `light-dark(${own},color-mix(in srgb,${own},white 45%))`);
  const fixed = (x) => (x === null || x === undefined ? "–" : x.toFixed(2).replace("-", "−"));
  const said = (e) => (e ? `${fixed(e[0])} [${fixed(e[1])}, ${fixed(e[2])}]` : "–");
  const room = () => Math.min(520, Math.max(290, document.documentElement.clientWidth - 40));
  const at = (method, section, part) => (method ? (method.numbers[section] || {})[part] : null);
  const names = data.methods.map((method) => method.name);
  const state = tools.state({
    section: data.sections[0], show: "all", query: "", part: data.parts[0],
    a: names.includes(saes[0].name) ? saes[0].name : names[0], b: (saes[1] || of("baseline") || data.methods[0]).name,
    sort: "", down: "yes",
  }, draw);

  // One number with its interval, on an axis from 0 to 1

  function strip(method, part) {
    const section = state.among("section", data.sections);
    const numbers = at(method, section, part);
    const [value, lo, hi] = numbers || [null, null, null];
    const [width, left, right] = [136, 6, 130];
    const x = (share) => left + (right - left) * Math.min(Math.max(share, 0), 1);
    const twin = at(byName.get(method.twin), section, part);
    const [floor, sky] = [of("floor"), of("skyline")].map((edge) => at(edge, section, part));
    const picture = svg("svg", {viewBox: `0 0 ${width} 22`, width, height: 22, "aria-hidden": "true"},
      svg("line", {class: "guide", x1: x(0), x2: x(1), y1: 11, y2: 11}),
      [0, 0.5, 1].map((share) => svg("line", {class: "guide", x1: x(share), x2: x(share), y1: 7, y2: 15})),
      floor && svg("rect", {x: x(floor[0]) - 1.5, y: 3, width: 3, height: 16, fill: GREY, opacity: 0.55}),
      sky && svg("rect", {x: x(sky[0]) - 1.5, y: 3, width: 3, height: 16, fill: GREY}),
      twin && svg("path", {d: diamond(x(twin[0]), 11, 5), fill: "var(--paper)", stroke: colour(method), "stroke-width": 1.6}),
      value !== null && svg("rect", {x: x(lo), y: 6, width: Math.max(x(hi) - x(lo), 1), height: 10, rx: 2, fill: colour(method),
        opacity: 0.4}),
      value !== null && svg("circle", {cx: x(value), cy: 11, r: 3.2, fill: colour(method)}));
    const cell = el("span", {class: "strip"}, picture, el("span", {class: "number"}, said(numbers)));
    return tip(cell, `${method.name}, ${part}, ${section}: ${said(numbers)}${twin ? `\nrandom twin ${said(twin)}` : ""}`);
  }
  const diamond = (x, y, r) => `M${x - r} ${y}L${x} ${y - r}L${x + r} ${y}L${x} ${y + r}Z`;

  // The table

  const dot = (method) => svg("svg", {viewBox: "0 0 12 12", width: 12, height: 12, "aria-hidden": "true"},
    svg("circle", {cx: 6, cy: 6, r: 5, fill: method.colour === null ? "none" : colour(method), stroke: colour(method)}));
  function nameOf(name, method) {
    const l0 = method.l0 === null ? "" : `, L0 ${number(method.l0, 1)}`;
    const fit = method.fit && method.fit !== "good" ? `, fit ${method.fit}` : "";
    return el("span", {class: "method"}, dot(method), el("span", {}, word(name, {limit: 44}),
      el("small", {class: "soft"}, el("br"), ROLES[method.role] + l0 + fit)));
  }
  function shownMethods() {
    const [show, query] = [state.among("show", ["all", "saes"]), String(state.get("query")).trim().toLowerCase()];
    const wanted = data.methods.filter((m) => show === "all" || m.role === "sae");
    return wanted.filter((m) => `${m.name} ${ROLES[m.role]}`.toLowerCase().includes(query));
  }
  function table() {
    const section = state.among("section", data.sections);
    const rows = shownMethods();
    const columns = [{key: "name", name: "method", show: nameOf}, ...data.parts.map((part) => ({
      key: part, name: part, number: true, show: (_, method) => strip(method, part),
      order: (method) => (at(method, section, part) || [null])[0],
    }))];
    const made = sortable({
      caption: `${section}: ${tools.plural(rows.length, "method")}, each number with its 95 % interval`,
      columns, rows, sort: state.get("sort") || null, descending: state.get("down") === "yes",
      sorted: (by, down) => {
        state.set({sort: by, down: down ? "yes" : "no"}, {quiet: true});
        tools.say(`sorted by ${by}, ${down ? "highest" : "lowest"} first`);
      },
    });
    return made;
  }
  const legend = el("p", {class: "soft key"},
    "Dot and bar: value and 95 % interval. Open diamond: the SAE's random twin. Grey bars: floor and skyline.");

  // Two compared

  function pairOf(a, b) {
    for (const pair of data.pairs) {
      if (pair.a === a && pair.b === b) return {words: pair.words, sign: 1, parts: pair.parts};
      if (pair.a === b && pair.b === a) return {words: pair.words, sign: -1, parts: pair.parts};
    }
    return null;
  }
  function forest(pair, a, b) {
    const entries = Object.entries(pair.parts);
    const largest = Math.max(0.1, ...entries.flatMap(([, e]) => e.map(Math.abs)));
    const limit = [0.1, 0.2, 0.4, 0.6, 0.8, 1].find((nice) => nice >= largest) || 1;
    const [width, row, left] = [room(), 30, 92];
    const height = row * entries.length + 46;
    const x = (value) => left + (width - left - 12) * (value + limit) / (2 * limit);
    const picture = svg("svg", {viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
      "aria-label": `Difference of ${a} and ${b} in the score and its parts`},
      [-limit, -limit / 2, 0, limit / 2, limit].map((tick) => [
        svg("line", {class: tick === 0 ? "axis" : "guide", x1: x(tick), x2: x(tick), y1: 6, y2: height - 40}),
        svg("text", {x: x(tick), y: height - 26, "text-anchor": "middle", class: "soft"}, fixed(tick)),
      ]),
      svg("text", {x: x(0) - 8, y: height - 6, "text-anchor": "end"}, "← second is higher"),
      svg("text", {x: x(0) + 8, y: height - 6}, "first is higher →"));
    entries.forEach(([part, [value, lo, hi]], i) => {
      const y = 22 + row * i;
      const [from, to] = [lo * pair.sign, hi * pair.sign].sort((p, q) => p - q);
      const sure = from > 0 || to < 0;
      const winner = byName.get(value * pair.sign > 0 ? a : b);
      const ink = sure ? colour(winner) : GREY;
      picture.append(svg("text", {x: left - 10, y: y + 4, "text-anchor": "end"}, part),
        svg("line", {x1: x(from), x2: x(to), y1: y, y2: y, stroke: ink, "stroke-width": 3}),
        svg("circle", {cx: x(value * pair.sign), cy: y, r: 5, fill: sure ? ink : "var(--paper)", stroke: ink, "stroke-width": 2}));
    });
    return picture;
  }
  function comparison() {
    const [a, b] = [state.among("a", names), state.among("b", names)];
    if (a === b) return [el("p", {class: "words"}, "Choose two different methods.")];
    const pair = pairOf(a, b);
    if (!pair) {
      return [el("p", {class: "words"}, "This pair was not compared: there were more pairs than are kept here. ",
        "In Python, report.compare(first, second) compares any two.")];
    }
    return [el("p", {class: "words"}, pair.words), forest(pair, a, b),
      el("p", {class: "soft"}, "Paired over the same prompts, over all sections. Filled: the interval leaves out 0.")];
  }

  // A part of the score against the number of active latents

  function againstL0() {
    const [part, section] = [state.among("part", data.parts), state.among("section", data.sections)];
    const known = saes.filter((method) => method.l0 !== null && at(method, section, part));
    if (!known.length) return el("p", {class: "soft"}, "No mean number of active latents is known.");
    const logs = known.map((method) => Math.log2(Math.max(method.l0, 0.01)));
    const [low, high] = [Math.floor(Math.min(...logs) - 0.4), Math.ceil(Math.max(...logs) + 0.4)];
    const [width, height, left, bottom, top] = [room(), 270, 44, 224, 12];
    const x = (l0) => left + (width - left - 130) * (Math.log2(Math.max(l0, 0.01)) - low) / (high - low);
    const y = (value) => bottom - (bottom - top) * value;
    const picture = svg("svg", {viewBox: `0 0 ${width} ${height}`, width, height, role: "group",
      "aria-label": `${part} against mean number of active latents`},
      [0, 0.25, 0.5, 0.75, 1].map((tick) => [
        svg("line", {class: "guide", x1: left, x2: width - 70, y1: y(tick), y2: y(tick)}),
        svg("text", {x: left - 8, y: y(tick) + 4, "text-anchor": "end", class: "soft"}, fixed(tick)),
      ]),
      Array.from({length: high - low + 1}, (_, i) => low + i).map((power) => [
        svg("line", {class: "guide", x1: x(2 ** power), x2: x(2 ** power), y1: top, y2: bottom}),
        svg("text", {x: x(2 ** power), y: bottom + 17, "text-anchor": "middle", class: "soft"}, number(2 ** power)),
      ]),
      svg("text", {x: (left + width - 70) / 2, y: height - 8, "text-anchor": "middle"}, "mean number of active latents (L0)"));
    for (const edge of [of("floor"), of("skyline")]) {
      const e = at(edge, section, part);
      if (!e) continue;
      picture.append(svg("line", {x1: left, x2: width - 70, y1: y(e[0]), y2: y(e[0]), stroke: GREY, "stroke-width": 1.5,
        "stroke-dasharray": "5 4"}),
      svg("text", {x: width - 64, y: y(e[0]) + 4, class: "soft"}, edge.role));
    }
    for (const method of known) picture.append(point(method, section, part, x, y));
    return [picture, el("p", {class: "keys"}, known.map((method) => el("span", {class: "method"}, dot(method), word(method.name))))];
  }
  function point(method, section, part, x, y) {
    const [value, lo, hi] = at(method, section, part);
    const twin = at(byName.get(method.twin), section, part);
    const [cx, ink] = [x(method.l0), colour(method)];
    const label = `${method.name}: ${part} ${said([value, lo, hi])} with L0 ${number(method.l0, 1)}`;
    const mark = svg("g", {tabindex: 0, role: "img", "aria-label": label},
      twin && svg("line", {x1: cx, x2: cx, y1: y(value), y2: y(twin[0]), stroke: ink, "stroke-width": 1, "stroke-dasharray": "2 3"}),
      twin && svg("path", {d: diamond(cx, y(twin[0]), 6), fill: "var(--paper)", stroke: ink, "stroke-width": 1.6}),
      svg("line", {x1: cx, x2: cx, y1: y(lo), y2: y(hi), stroke: ink, "stroke-width": 3}),
      svg("circle", {cx, cy: y(value), r: 6, fill: ink}));
    return tip(mark, label + (twin ? `\nrandom twin ${said(twin)}` : ""));
  }

  // The page

  const [card, two, plot] = [el("div"), el("div"), el("div")];
  const options = names.map((name) => [name, name]);
  function draw() {
    empty(card, table());
    empty(two, comparison());
    empty(plot, againstL0());
  }
  const sayWords = () => tools.say(two.querySelector(".words").textContent);
  root.append(
    el("div", {class: "controls"},
      select("Cross-section", data.sections, state.among("section", data.sections), (section) => {
        state.set({section});
        tools.say(`numbers of ${section}`);
      }),
      choices("Show", [["all", "all methods"], ["saes", "SAEs only"]], state.among("show", ["all", "saes"]),
        (show) => { state.set({show}); tools.say(tools.plural(shownMethods().length, "method")); }),
      search("Filter by name", state.get("query"), (query) => {
        state.set({query});
        tools.say(tools.plural(shownMethods().length, "method"));
      })),
    card, legend,
    heading("Two compared"),
    el("div", {class: "controls"},
      select("First", options, state.among("a", names), (a) => { state.set({a}); sayWords(); }),
      select("Second", options, state.among("b", names), (b) => { state.set({b}); sayWords(); })),
    two,
    heading("Against the number of active latents"),
    el("div", {class: "controls"}, select("Part", data.parts, state.among("part", data.parts), (part) => {
      state.set({part});
      tools.say(`${part} against L0`);
    })),
    plot);
  draw();
  window.addEventListener("resize", () => { empty(two, comparison()); empty(plot, againstL0()); });
});
