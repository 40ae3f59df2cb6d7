// Prompts beside their counterfactuals. data: {words, roles, attributes, total, rows: [{tokens, places, values, answer,
// distractor, held_out, template}], edits: {attribute: [{changes: [[token, word]], value, answer, distractor}]}}; tokens
// are numbers in `words`, places are token numbers in the order of `roles`
"use strict";
sage.register("task_browser", (root, data, tools) => {
  const {el, empty, word, plural, choices, select, search, tokens, tint, say} = tools;
  const PER_PAGE = 8;
  const ANY = "(any)";
  const SETS = [["", "all"], ["train", "training"], ["test", "held out"]];
  const kinds = Object.keys(data.edits);
  const chosen = tools.state({change: kinds[0] || "", value: ANY, set: "", text: "", page: "1"}, () => draw());
  const controls = el("div", {class: "controls"});
  const values = el("div", {class: "control-slot"});
  const count = el("p", {class: "soft count"});
  const list = el("ol", {class: "prompts"});
  const pager = el("div", {class: "controls pager"});

  const change = () => chosen.among("change", kinds);
  const valuesOf = (name) => [...new Set(data.rows.map((row) => row.values[name]))].sort((a, b) => a.localeCompare(b));
  const strings = (row) => row.tokens.map((i) => data.words[i]);
  function edited(row, edit) {
    const there = strings(row);
    for (const [place, i] of edit.changes) there[place] = data.words[i];
    return there;
  }
  const texts = {};  // kind of change → the text of each pair, made once
  function textOf(kind, i) {
    texts[kind] = texts[kind] || data.rows.map((row, j) => {
      const edit = data.edits[kind]?.[j];
      return [strings(row), edit ? edited(row, edit) : []].map((some) => some.join("")).join("\n").toLowerCase();
    });
    return texts[kind][i];
  }
  const filters = () => ({
    set: chosen.among("set", SETS.map(([id]) => id)),
    value: data.attributes.includes(change()) ? chosen.among("value", [ANY, ...valuesOf(change())]) : ANY,
    text: chosen.get("text").toLowerCase(),
  });
  function shown() {
    const {set, value, text} = filters();
    return data.rows.map((_, i) => i).filter((i) => {
      const row = data.rows[i];
      return (!set || row.held_out === (set === "test")) && (value === ANY || row.values[change()] === value) &&
        (!text || textOf(change(), i).includes(text));
    });
  }

  function marks(row, differs) {
    const found = Object.fromEntries(differs.map((i) => [i, {differs: true}]));
    row.places.forEach((place, role) => {
      const before = found[place]?.role;
      found[place] = {...found[place], style: tint(role), role: before ? `${before}, ${data.roles[role]}` : data.roles[role]};
    });
    return found;
  }
  // of a prompt: its answer; of a counterfactual: its own, and which two tokens patching compares
  function answers(row, edit = null) {
    const soft = (text) => el("span", {class: "soft"}, text);
    const own = [soft("answer "), el("b", {}, word((edit || row).answer))];
    const rest = edit ? [soft("; patching compares "), word(row.answer), soft(" with "), word(edit.distractor)]
      : [soft(" rather than "), word(row.distractor)];
    return el("p", {class: "answers"}, own, rest);
  }
  function side(name, some, row, differs, edit) {
    return el("div", {class: "side"}, el("p", {class: "name soft"}, name), tokens(some, marks(row, differs)), answers(row, edit));
  }
  function item(i) {
    const row = data.rows[i];
    const edit = data.edits[change()]?.[i];
    const differs = edit ? edit.changes.map(([place]) => place) : [];
    const own = Object.entries(row.values).map(([name, value]) => el("span", {class: name === change() ? "value now" : "value"},
      word(name, {limit: 20}), " ", el("b", {}, word(value, {limit: 24}))));
    const [was, is] = edit ? [row.values[change()], edit.value] : [];
    const name = edit ? ["counterfactual", is ? [": ", word(was ?? ""), " → ", word(is)] : ": nothing that matters"] : null;
    return el("li", {},
      el("p", {class: "facts"}, el("span", {class: "soft"}, `prompt ${row.number + 1}, ${row.held_out ? "held out" : "training"}`), own),
      el("div", {class: edit ? "pair" : "pair alone"}, side("prompt", strings(row), row, differs),
        edit ? side(name, edited(row, edit), row, differs, edit) : null));
  }

  function fill() {
    const rows = shown();
    const pages = Math.max(1, Math.ceil(rows.length / PER_PAGE));
    const page = Math.round(Math.min(chosen.number("page", 1, pages), pages));
    const first = (page - 1) * PER_PAGE;
    const now = rows.slice(first, first + PER_PAGE);
    const range = rows.length ? `${first + 1}–${first + now.length} of ${plural(rows.length, "prompt")}` : "no prompt is like that";
    const sample = data.rows.length < data.total ? `; ${data.rows.length} of the task's ${data.total} are in this page` : "";
    empty(count, range + sample);
    empty(list, now.map(item));
    const turn = (to, text) => el("button", {type: "button", disabled: to < 1 || to > pages, onclick: () => {
      chosen.set({page: String(to)}, {quiet: true});
      fill();
      const again = [...pager.querySelectorAll("button")].find((b) => b.textContent === text && !b.disabled);
      (again || pager.querySelector("button:not(:disabled)"))?.focus();
      list.scrollIntoView({block: "nearest"});
    }}, text);
    empty(pager, turn(page - 1, "← before"), el("span", {class: "soft"}, `page ${page} of ${pages}`), turn(page + 1, "next →"));
    pager.hidden = pages === 1;
    say(range);
  }
  function drawValues() {
    const known = data.attributes.includes(change());
    const pick = (value) => refilter({value});
    empty(values, known ? select(`Value of ${change()}`, [ANY, ...valuesOf(change())], filters().value, pick) : null);
  }
  function refilter(changes) {
    chosen.set({page: "1", ...changes}, {quiet: true});
    fill();
  }
  function draw() {
    const turn = (kind) => {
      chosen.set({change: kind, value: ANY, page: "1"}, {quiet: true});
      drawValues();
      fill();
    };
    empty(controls,
      kinds.length ? choices("Counterfactual in", kinds.map((kind) => [kind, kind || "nothing that matters"]), change(), turn) : null,
      values, select("Prompts", SETS, filters().set, (set) => refilter({set})),
      search("Text", chosen.get("text"), (text) => refilter({text})));
    drawValues();
    fill();
  }
  const legend = el("p", {class: "roles"}, el("span", {class: "soft"}, "Positions: "),
    data.roles.map((role, i) => el("span", {class: "role", style: tint(i)}, word(role, {limit: 24}))),
    el("span", {class: "soft"}, " Underlined: what the counterfactual changes."));
  root.append(controls, legend, count, list, pager);
  draw();
});
