// Many SAEs on several tasks: a table, SAE × task, a number against L0 with its front, and which differences are real.
// data: {level, correction, numbers: ["score", …parts], boards: [{model, pairs_of, saes: [{name, width}],
//        tasks: [{name, n, seeds, real, compared, alone, corrected}], cells: [sae][task] of {numbers: [[v, lo, hi], v, …],
//        margin, l0, passes, seconds, seeds, front: [number]} or null, pairs: [task] of [[i, j, d, lo, hi, q], …]}]}
"use strict";
sage.register("leaderboard", (root, data, tools) => {
  const {el, svg, empty, word, cut, number, plural, select, search, choices, sortable, roving, scroll, tip, heading} = tools;
  const GREY = "var(--soft)";
  const models = data.boards.map((board) => board.model);
  const state = tools.state({model: models[0], task: "", query: "", number: data.numbers[0], a: "", b: "", sort: "score",
    down: "yes", show: "all"}, draw);
  const missing = (x) => x === null || x === undefined;
  const fixed = (x) => (missing(x) ? "–" : x.toFixed(2).replace(/^-(0\.00)$/, "$1").replace("-", "−"));
  const signed = (x) => (x > 0 && fixed(x) !== "0.00" ? "+" : "") + fixed(x);
  const short = (x) => fixed(x).replace(/^(−?)0\./, "$1.");
  const said = (e) => (e && !missing(e[0]) ? `${fixed(e[0])} [${fixed(e[1])}, ${fixed(e[2])}]` : "–");
  const room = () => Math.max(260, Math.min(640, plot.clientWidth || 480));

  // What is chosen

  const board = () => data.boards[models.indexOf(state.among("model", models))];
  const taskNames = () => board().tasks.map((task) => task.name);
  const taskIndex = () => taskNames().indexOf(state.among("task", taskNames()));
  const numberIndex = () => data.numbers.indexOf(state.among("number", data.numbers));
  const value = (cell, k) => (cell ? (k === 0 ? cell.numbers[0][0] : cell.numbers[k]) : null);
  const cellOf = (i, t = taskIndex()) => board().cells[i][t];
  const range = (n) => Array.from({length: n}, (_, i) => i);
  const down = (t, k) => (i, j) => (value(cellOf(j, t), k) ?? -1) - (value(cellOf(i, t), k) ?? -1);
  // SAEs by index: those whose name has all the words, best first
  function shown() {
    const words = String(state.get("query")).toLowerCase().split(/\s+/).filter(Boolean);
    const has = (i) => words.every((w) => board().saes[i].name.toLowerCase().includes(w));
    return range(board().saes.length).filter(has).sort(down(taskIndex(), 0));
  }
  // the two that are compared: as chosen, else the two best of those that are compared
  function two() {
    const names = board().saes.map((sae) => sae.name);
    const best = range(Math.max(board().compared, Math.min(2, names.length))).sort(down(taskIndex(), 0));
    const found = ["a", "b"].map((side) => names.indexOf(String(state.get(side))));
    const a = found[0] >= 0 ? found[0] : best.find((i) => i !== found[1]) ?? 0;
    const b = found[1] >= 0 ? found[1] : best.find((i) => i !== a) ?? a;
    return [a, b];
  }
  const mark = (i) => {
    const [a, b] = two();
    return i === a ? tools.line(0) : i === b ? tools.line(1) : GREY;
  };
  const isMarked = (i) => two().includes(i);
  const dot = (i) => svg("svg", {viewBox: "0 0 12 12", width: 12, height: 12, "aria-hidden": "true"},
    svg("circle", {cx: 6, cy: 6, r: 5, style: `fill:${isMarked(i) ? mark(i) : "none"};stroke:${mark(i)}`}));
  // names without what all of them begin with, where there is little room
  function common() {
    const names = board().saes.map((sae) => sae.name);
    if (names.length < 2) return 0;
    let n = 0;
    while (n < 200 && n < names[0].length && names.every((name) => name[n] === names[0][n])) n += 1;
    return Math.max(...["-", "_", "/", " ", "."].map((mark) => names[0].lastIndexOf(mark, n - 1) + 1));
  }
  const begin = () => (common() ? `, whose names begin with ${cut(board().saes[0].name.slice(0, common()), 60)}` : "");
  const brief = (i, limit) => {
    const {name} = board().saes[i];
    return word(name.slice(common()) || name, {limit, title: cut(name, 400)});
  };
  const costs = (cell) => `${number(cell.passes, 0)} passes, ${number(cell.seconds, cell.seconds < 10 ? 1 : 0)} s`;

  // The table

  function strip(cell, i) {
    if (!cell) return "–";
    const [v, lo, hi] = cell.numbers[0];
    const x = (share) => 4 + 72 * Math.min(Math.max(share, 0), 1);
    const ink = isMarked(i) ? mark(i) : GREY;
    const picture = svg("svg", {viewBox: "0 0 80 18", width: 80, height: 18, "aria-hidden": "true"},
      svg("line", {class: "guide", x1: x(0), x2: x(1), y1: 9, y2: 9}),
      [0, 0.5, 1].map((share) => svg("line", {class: "guide", x1: x(share), x2: x(share), y1: 5, y2: 13})),
      svg("rect", {x: x(lo), y: 5, width: Math.max(x(hi) - x(lo), 1), height: 8, rx: 2, style: `fill:${ink}`, opacity: 0.4}),
      svg("circle", {cx: x(v), cy: 9, r: 3.2, style: `fill:${ink}`}));
    return el("span", {class: "strip beside"}, picture, el("span", {class: "number"}, said(cell.numbers[0])));
  }
  const plain = (x, text) => el("span", {}, missing(x) ? "–" : text(x));
  function table() {
    const t = taskIndex();
    const rows = shown().map((i) => ({i, name: board().saes[i].name, cell: cellOf(i, t), width: board().saes[i].width}));
    const of = (key, name, text, help) => ({key, name, help, number: true, show: (_, row) => plain(row.cell && row.cell[key], text),
      order: (row) => (row.cell ? row.cell[key] : null)});
    const columns = [
      {key: "name", name: "SAE", show: (_, row) => el("span", {class: "method"}, dot(row.i), brief(row.i, 48))},
      {key: "score", name: "score", number: true, help: "1 is what the ground truth reaches; with its 95 % interval",
        show: (_, row) => strip(row.cell, row.i), order: (row) => value(row.cell, 0)},
      of("margin", "margin", signed, "how far above the best baseline that knows no feature"),
      ...data.numbers.slice(1).map((part, k) => ({key: part, name: part, number: true,
        show: (_, row) => plain(value(row.cell, k + 1), fixed), order: (row) => value(row.cell, k + 1)})),
      of("l0", "L0", (x) => number(x, 1), "mean number of active latents"),
      {key: "width", name: "width", number: true, help: "latents of one SAE", show: (x) => plain(x, String)},
      of("passes", "passes", (x) => number(x, 1), "through the model, of all prompts"),
      of("seconds", "seconds", (x) => number(x, 1), "on the clock"),
      of("seeds", "seeds", String, "draws of prompts that were averaged"),
    ];
    const keys = columns.map((column) => column.key);
    return sortable({
      caption: `${taskNames()[t]} on ${board().model}: ${plural(rows.length, "SAE")}${begin()}`, columns, rows,
      sort: keys.includes(state.get("sort")) ? state.get("sort") : null, descending: state.get("down") === "yes",
      rowOf: (row) => (isMarked(row.i) ? {class: "chosen"} : {}),
      sorted: (by, isDown) => {
        state.set({sort: by, down: isDown ? "yes" : "no"}, {quiet: true});
        const {name} = columns.find((column) => column.key === by);
        tools.say(`sorted by ${name}, ${isDown ? "highest" : "lowest"} first`);
      },
    });
  }

  // SAE × task

  function heatmap() {
    const [k, t] = [numberIndex(), taskIndex()];
    const header = el("tr", {}, el("th", {scope: "col"}, "SAE"), board().tasks.map((task) =>
      el("th", {scope: "col", class: "upright"}, word(task.name, {limit: 22}))));
    const rows = shown().sort(down(t, k)).map((i) => el("tr", {class: isMarked(i) ? "chosen" : null},
      el("th", {scope: "row"}, el("span", {class: "method"}, dot(i), brief(i, 32))),
      board().tasks.map((task, column) => el("td", {}, square(i, column, task, k, column === t)))));
    const found = el("table", {class: "cells board"},
      el("caption", {}, word(`${data.numbers[k]}, SAE × task, sorted by the chosen task; a cell chooses the SAE and the task`, {limit: 200})),
      el("thead", {}, header), el("tbody", {}, rows));
    return scroll(`${data.numbers[k]} of each SAE on each task`, roving(found));
  }
  function square(i, column, task, k, isChosen) {
    const [cell, {name}] = [cellOf(i, column), board().saes[i]];
    const x = value(cell, k);
    const label = `${cut(name, 60)} on ${cut(task.name, 40)}: ${data.numbers[k]} ${cell && k === 0 ? said(cell.numbers[0]) : fixed(x)}`;
    const button = el("button", {type: "button", class: "cell", style: tools.sequential(x), "aria-label": label,
      "aria-pressed": String(isChosen && i === two()[0]), "data-cell": `${i},${column}`,
      onclick: () => {
        const [, b] = two();
        state.set({task: task.name, a: name, ...(b === i ? {b: ""} : {})});
        tools.say(label);
        refocus(heat, `${i},${column}`);
      }}, missing(x) ? "–" : short(x));
    return tip(button, cell ? `${label}\nL0 ${number(cell.l0, 1)}, ${costs(cell)}` : `${label}: not scored`);
  }
  const refocus = (place, key) => place.querySelector(`[data-cell="${key}"]`)?.focus();

  // Against L0

  function scales(known, k) {
    const logs = known.map((i) => Math.log2(Math.max(cellOf(i).l0, 0.01)));
    const [low, high] = [Math.floor(Math.min(...logs) - 0.3), Math.ceil(Math.max(...logs) + 0.3)];
    const ends = known.flatMap((i) => (k === 0 ? cellOf(i).numbers[0] : [value(cellOf(i), k)]));
    const top = [0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1].find((nice) => nice >= Math.max(...ends)) || 1;
    return {low, high, top};
  }
  function againstL0() {
    const k = numberIndex();
    const known = shown().filter((i) => cellOf(i) && !missing(cellOf(i).l0) && !missing(value(cellOf(i), k)));
    if (!known.length) return el("p", {class: "soft"}, "No mean number of active latents is known.");
    const {low, high, top} = scales(known, k);
    const [width, height, left, right, upper, bottom] = [room(), 330, 46, 16, 14, 282];
    const x = (l0) => left + (width - left - right) * (Math.log2(Math.max(l0, 0.01)) - low) / (high - low);
    const y = (v) => bottom - (bottom - upper) * Math.min(Math.max(v, 0), top) / top;
    const step = Math.ceil((high - low) / 8);
    const picture = svg("svg", {viewBox: `0 0 ${width} ${height}`, width, height, role: "group",
      "aria-label": `${data.numbers[k]} against mean number of active latents`},
      range(5).map((n) => (n * top) / 4).map((tick) => [
        svg("line", {class: "guide", x1: left, x2: width - right, y1: y(tick), y2: y(tick)}),
        svg("text", {x: left - 8, y: y(tick) + 4, "text-anchor": "end", class: "soft"}, fixed(tick)),
      ]),
      range(high - low + 1).filter((n) => n % step === 0).map((n) => 2 ** (low + n)).map((tick) => [
        svg("line", {class: "guide", x1: x(tick), x2: x(tick), y1: upper, y2: bottom}),
        svg("text", {x: x(tick), y: bottom + 17, "text-anchor": "middle", class: "soft"}, number(tick)),
      ]),
      svg("text", {x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle"}, "mean number of active latents (L0)"),
      front(k, x, y, width - right));
    for (const i of [...known].sort((p, q) => isMarked(p) - isMarked(q))) picture.append(point(i, k, x, y));
    return picture;
  }
  const onFront = (i, k) => Boolean(cellOf(i)) && cellOf(i).front.includes(k);
  function front(k, x, y, end) {
    const best = range(board().saes.length).filter((i) => onFront(i, k)).sort((p, q) => cellOf(p).l0 - cellOf(q).l0);
    const corners = best.flatMap((i, n) => {
      const [here, high] = [x(cellOf(i).l0), y(value(cellOf(i), k))];
      return n ? [[here, y(value(cellOf(best[n - 1]), k))], [here, high]] : [[here, high]];
    });
    if (best.length) corners.push([end, y(value(cellOf(best.at(-1)), k))]);
    return svg("polyline", {class: "front", points: corners.map((corner) => corner.join(",")).join(" "), fill: "none",
      stroke: "var(--ink)", "stroke-width": 1.5, "stroke-dasharray": "5 4", "aria-hidden": "true"});
  }
  function point(i, k, x, y) {
    const [cell, {name}] = [cellOf(i), board().saes[i]];
    const [cx, cy, best] = [x(cell.l0), y(value(cell, k)), onFront(i, k)];
    const label = `${cut(name, 60)}: ${data.numbers[k]} ${k === 0 ? said(cell.numbers[0]) : fixed(value(cell, k))} with L0 ${number(cell.l0, 1)}` +
      (best ? ", on the front" : "");
    const ink = isMarked(i) ? mark(i) : best ? "var(--ink)" : GREY;
    const bar = k === 0 && svg("line", {x1: cx, x2: cx, y1: y(cell.numbers[0][1]), y2: y(cell.numbers[0][2]), style: `stroke:${ink}`,
      "stroke-width": isMarked(i) ? 3 : 1.5, opacity: 0.6});
    const shape = svg("g", {tabindex: 0, role: "img", "aria-label": label, onclick: () => pick(i)}, bar,
      svg("circle", {cx, cy, r: isMarked(i) ? 6 : 4.5, style: `fill:${best || isMarked(i) ? ink : "var(--paper)"};stroke:${ink}`,
        "stroke-width": 1.6}));
    return tip(shape, label);
  }
  function pick(i) {
    const [a] = two();
    if (i === a) return;
    state.set({b: board().saes[a].name, a: board().saes[i].name});
    sayWords();
  }

  // Which differences are real

  function pairOf(i, j) {
    for (const [p, q, d, lo, hi, adjusted] of board().pairs[taskIndex()]) {
      if (p === i && q === j) return {d, lo, hi, q: adjusted};
      if (p === j && q === i) return {d: -d, lo: -hi, hi: -lo, q: adjusted};
    }
    return null;
  }
  const isReal = (pair) => pair.q < data.level;
  const q = (x) => (x < 0.001 ? "below 0.001" : x.toFixed(x < 0.1 ? 3 : 2));
  function words() {
    const [a, b] = two();
    const [one, other] = [board().saes[a].name, board().saes[b].name];
    if (a === b) return "Choose two different SAEs.";
    const pair = pairOf(a, b);
    if (!pair) {
      return [word(one), " and ", word(other), " were not compared here: not both were scored on this task, or there are more SAEs than " +
        "are compared on a page. In Python, comparisons(…, saes=[first, second]) compares any."];
    }
    const [better, worse] = pair.d >= 0 ? [one, other] : [other, one];
    const by = [Math.abs(pair.d), ...[Math.min(Math.abs(pair.lo), Math.abs(pair.hi)), Math.max(Math.abs(pair.lo), Math.abs(pair.hi))]];
    if (isReal(pair)) return [word(better), " scores higher than ", word(worse), `, by ${said(by)}: real after correction, adjusted p ${q(pair.q)}.`];
    const alone = pair.lo > 0 || pair.hi < 0;
    return [word(one), " and ", word(other), ` cannot be told apart: the difference is ${said([pair.d, pair.lo, pair.hi])}, adjusted p ${q(pair.q)}.`,
      alone ? ` Its own interval leaves out 0, as some of ${board().family} would by chance.` : ""];
  }
  function matrix() {
    const order = shown().filter((i) => i < board().compared && cellOf(i));
    if (order.length < 2) return el("p", {class: "soft"}, "There are no two SAEs to compare.");
    const header = el("tr", {}, el("th", {scope: "col"}, "row minus column"), order.map((i) =>
      el("th", {scope: "col", class: "upright"}, brief(i, 22))));
    const rows = order.map((i) => el("tr", {},
      el("th", {scope: "row"}, el("span", {class: "method"}, dot(i), brief(i, 32))),
      order.map((j) => el("td", {}, i === j ? el("span", {class: "self", "aria-hidden": "true"}) : versus(i, j)))));
    const found = el("table", {class: "cells board versus"},
      el("caption", {}, "Row minus column, best first. A number: a real difference. A dot: they cannot be told apart."),
      el("thead", {}, header), el("tbody", {}, rows));
    return scroll("Differences of any two SAEs", roving(found));
  }
  function versus(i, j) {
    const [pair, a, b] = [pairOf(i, j), board().saes[i].name, board().saes[j].name];
    const real = pair && isReal(pair);
    const text = !pair ? "" : real ? short(pair.d) : "·";
    const verdict = !pair ? "not compared" : real ? "real" : "cannot be told apart";
    const label = `${cut(a, 50)} minus ${cut(b, 50)}: ${pair ? said([pair.d, pair.lo, pair.hi]) : "–"}, ${verdict}`;
    const [first, second] = two();
    return tip(el("button", {type: "button", class: "cell", style: real ? tools.diverging(pair.d, board().largest) : "background:var(--paper);color:var(--ink)",
      "aria-label": label, "aria-pressed": String(i === first && j === second), "data-cell": `${i},${j}`,
      onclick: () => {
        state.set({a, b});
        sayWords();
        refocus(against, `${i},${j}`);
      }}, text), label);
  }
  function told() {
    const task = board().tasks[taskIndex()];
    const of = `On ${task.n} held-out prompts${task.seeds > 1 ? ` of each of ${task.seeds} seeds` : ""}`;
    const smallest = missing(task.alone) ? "" : ` ${of}, a difference of ${fixed(task.alone)} would be found four times in five if it ` +
      `were the only question, one of ${fixed(task.corrected)} among all these.`;
    return `${task.real} of ${plural(task.compared, "difference")} on ${task.name} ${task.real === 1 ? "is" : "are"} real. Corrected for all ` +
      `${board().family} comparisons of ${board().model} after ${data.correction}: of what is called real, at most ` +
      `${Math.round(100 * data.level)} % is expected not to be.${smallest}`;
  }

  // The page

  const [card, heat, plot, sentence, count, against, pickers, tasks] = range(8).map(() => el("div"));
  function draw() {
    empty(tasks, select("Task", taskNames(), state.among("task", taskNames()), (task) => {
      state.set({task});
      tools.say(`numbers of ${task}`);
      tasks.querySelector("select").focus();
    }));
    empty(card, table());
    empty(heat, heatmap());
    drawWide();
    empty(count, el("p", {class: "count"}, told()));
    const names = board().saes.map((sae) => sae.name);
    const [a, b] = two();
    const picker = (name, side, i) => select(name, names, names[i], (chosen) => {
      state.set({[side]: chosen});
      sayWords();
      pickers.querySelectorAll("select")[side === "a" ? 0 : 1].focus();
    });
    empty(pickers, el("div", {class: "controls"}, picker("First", "a", a), picker("Second", "b", b)));
    empty(sentence, el("p", {class: "words"}, words()));
    empty(against, matrix());
  }
  const drawWide = () => empty(plot, againstL0());
  const sayWords = () => tools.say(sentence.textContent);
  root.append(
    el("div", {class: "controls"},
      models.length > 1 ? select("Model", models, state.among("model", models), (model) => {
        state.set({model, task: "", a: "", b: ""});
        tools.say(`${plural(board().saes.length, "SAE")} of ${model}`);
      }) : null,
      tasks,
      search("Filter by name", state.get("query"), (query) => {
        state.set({query});
        tools.say(plural(shown().length, "SAE"));
      })),
    card,
    heading("SAE × task, and against the number of active latents"),
    el("div", {class: "controls"}, choices("Number", data.numbers, state.among("number", data.numbers), (chosen) => {
      state.set({number: chosen});
      tools.say(`${chosen} of each SAE on each task`);
    })),
    el("div", {class: "halves"}, heat, el("div", {}, plot,
      el("p", {class: "soft"}, "Filled and on the dashed line: no SAE has as few active latents and a higher value. ",
        "The front is of the values, not of their intervals."))),
    heading("Which differences are real?"),
    count, pickers, sentence, against);
  draw();
  let width = 0; // the plot is drawn again where its place gets wider
  new ResizeObserver(([entry]) => {
    if (Math.round(entry.contentRect.width) === width) return;
    width = Math.round(entry.contentRect.width);
    drawWide();
  }).observe(plot);
});
