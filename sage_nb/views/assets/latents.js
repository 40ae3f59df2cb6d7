// Latents × values of one cross-section; the chosen latent's prompts, tokens and effect.
"use strict";
sage.register("latents", (root, data, tools) => {
  const {el, empty, word, cut, percent, plural, diverging, sequential, select, choices, roving, scroll, tip, heading} = tools;
  const fixed = (x) => (x === null || x === undefined ? "–" : x.toFixed(2).replace("-", "−"));
  const unique = (list) => [...new Set(list)];
  const sets = unique(data.panels.map((panel) => panel.sae));
  const sections = unique(data.panels.map((panel) => panel.section));
  const state = tools.state({sae: sets[0], section: sections[0], measure: "f1", of: "", latent: "", value: ""}, draw);
  const [grid, about, pattern, controls] = [el("div"), el("div", {class: "panel"}), el("div"), el("div", {class: "controls"})];

  const short = (name) => name.replace(/\.resid_pre /, " ");
  function panelNow() {
    const [sae, section] = [state.among("sae", sets), state.among("section", sections)];
    return data.panels.find((p) => p.sae === sae && p.section === section);
  }
  // the columns: values of the section's attribute by what becomes of them, or those of another attribute
  function columnsOf(panel) {
    const other = panel.others.find((o) => o.attribute === state.get("of"));
    if (other) {
      return other.values.map((name, i) => ({name, form: null, at: (_, row) => other.f1[row][i], kind: "f1"}));
    }
    const measure = state.among("measure", ["f1", "effect"]);
    return panel.values.map((value, i) => ({...value, at: (latent) => latent[measure][i], kind: measure, i}));
  }
  function chosen(panel) {
    const row = panel.latents.findIndex((latent) => latent.name === state.get("latent"));
    const column = panel.values.findIndex((value) => value.name === state.get("value"));
    return {row: row < 0 ? 0 : row, column: column < 0 ? null : column};
  }

  // The matrix

  function groups(columns) {
    const runs = [];
    for (const column of columns) {
      const last = runs[runs.length - 1];
      if (last && last.form === column.form) last.n += 1;
      else runs.push({form: column.form, n: 1});
    }
    return runs;
  }
  function cell(panel, latent, row, column, now) {
    const x = column.at(latent, row);
    const digits = Math.abs(x) < 0.995 ? fixed(x) : tools.number(x, 1);
    const shown = x === null || Math.abs(x) < 0.095 ? "" : digits.replace(/^(−?)0\./, "$1.");
    const named = column.latent === latent.name;
    const pressed = now.row === row && (column.i === undefined ? column.name === state.get("value") : now.column === column.i);
    const said = `${column.kind === "f1" ? "F1" : "effect"} ${digits}`;  // holds what is shown
    const button = el("button", {
      type: "button", class: named ? "cell named" : "cell", "aria-pressed": String(pressed),
      style: column.kind === "f1" ? sequential(x) : diverging(x), "aria-label": `${latent.name}, ${column.name}: ${said}`,
      onclick: () => choose(panel, latent, column),
    }, shown);
    return el("td", {}, tip(button, () => `${latent.name} and ${cut(column.name, 40)}: ${said}` +
      (column.i === undefined ? "" : `\nprecision ${fixed(latent.precision[column.i])}, recall ${fixed(latent.recall[column.i])}, ` +
        `without it ${fixed(latent.effect[column.i])}`) + (named ? "\nhas the value's name" : "")));
  }
  function choose(panel, latent, column) {
    state.set({latent: latent.name, value: column ? column.name : ""}, {quiet: true});
    refresh(panel);
    const best = about.querySelector("p");
    tools.say(`${latent.name}: ${best ? best.textContent : ""}`);
  }
  function matrix(panel) {
    const [columns, now] = [columnsOf(panel), chosen(panel)];
    const runs = groups(columns);
    const grouped = runs.some((run) => run.form);
    const table = el("table", {class: "cells matrix"},
      el("caption", {class: "hidden"}, `${panel.sae} in ${panel.section}: latents by values`),
      el("thead", {},
        grouped && el("tr", {}, el("td", {}), runs.map((run) => el("th", {colspan: run.n, scope: "colgroup", class: "form", title: run.form},
          run.form || "not judged"))),
        el("tr", {}, el("td", {}), columns.map((column) => el("th", {scope: "col", class: "upright"},
          word(column.name, {limit: 14}))))),
      el("tbody", {}, panel.latents.map((latent, row) => el("tr", {},
        el("th", {scope: "row"}, el("button", {type: "button", class: "row", "aria-pressed": String(now.row === row && now.column === null),
          title: latent.name, onclick: () => choose(panel, latent, null)}, short(latent.name))),
        columns.map((column) => cell(panel, latent, row, column, now))))));
    return scroll("Latents by values", roving(table));
  }
  // marks anew what is chosen, and says what is known of it, without building the matrix again
  function refresh(panel) {
    const now = chosen(panel);
    const columns = columnsOf(panel);
    [...grid.querySelectorAll("tbody tr")].forEach((tr, row) => {
      const [head, ...cells] = tr.querySelectorAll("button");
      const isAll = !columns.some((column) => column.name === state.get("value"));
      head.setAttribute("aria-pressed", String(now.row === row && isAll));
      cells.forEach((button, i) => {
        button.setAttribute("aria-pressed", String(now.row === row && columns[i].name === state.get("value")));
      });
    });
    empty(about, latentOf(panel, panel.latents[now.row]));
    empty(pattern, valueOf(panel, now.column));
  }

  // What is known of one value, and of one latent

  function valueOf(panel, column) {
    if (column === null) {
      const forms = unique(panel.values.map((value) => value.form).filter(Boolean));
      if (!forms.length) return null;
      return el("dl", {class: "forms"}, forms.map((form) => {
        const n = panel.values.filter((value) => value.form === form).length;
        return [el("dt", {}, `${form}: ${plural(n, "value")}`), el("dd", {}, data.patterns[form] || "")];
      }));
    }
    const value = panel.values[column];
    const words = value.reason ? ` ${value.reason}.` : "";
    const name = value.latent ? ` Its name has ${value.latent}.` : " No latent has its name.";
    return el("p", {}, el("b", {}, `${panel.attribute} = `, word(value.name)), ` (${plural(value.prompts, "held-out prompt")}):`,
      words, name, value.form ? ` How it looks: ${data.patterns[value.form] || ""}` : "");
  }
  function latentOf(panel, latent) {
    if (!latent) return el("p", {}, "No latent is on in these prompts.");
    const best = latent.f1.indexOf(Math.max(...latent.f1));
    const value = panel.values[best];
    const strongest = Math.max(0, ...latent.acts.map(([, , a]) => Math.abs(a)));
    return [
      heading(word(latent.name)),
      el("p", {}, `On in ${percent(latent.on)} of the held-out prompts. Answers best to `, word(value.name),
        `: F1 ${fixed(latent.f1[best])}, precision ${fixed(latent.precision[best])}, recall ${fixed(latent.recall[best])}. ` +
        (latent.effect[best] === null ? "" : `Taken out there, it does ${fixed(latent.effect[best])} of what the true counterfactual does.`)),
      latent.promotes.length > 0 && el("p", {}, "Its direction promotes: ",
        latent.promotes.map((token, i) => [i ? ", " : "", el("code", {}, tools.tokenText(token))])),
      latent.link && el("p", {}, el("a", {href: latent.link, target: "_blank", rel: "noopener noreferrer"}, "This latent on Neuronpedia")),
      el("p", {class: "soft"}, strongest ? `Prompts where it is most active; each token is shaded by its activation (strongest ${tools.number(strongest, 1)}):`
        : "It is not active at any token of the sampled prompts."),
      prompts(panel, latent, strongest),
    ];
  }
  function prompts(panel, latent, strongest) {
    const by = new Map();
    for (const [prompt, token, a] of latent.acts) {
      if (!by.has(prompt)) by.set(prompt, []);
      by.get(prompt).push([token, a]);
    }
    const most = (marks) => Math.max(...marks.map(([, a]) => Math.abs(a)));
    const order = [...by].sort((one, other) => most(other[1]) - most(one[1])).slice(0, 5);
    return order.map(([prompt, marks]) => {
      const {tokens, value} = panel.prompts[prompt];
      const marked = Object.fromEntries(marks.map(([token, a]) =>
        [token, {style: sequential(Math.abs(a), strongest), title: `active at ${tools.number(a, 1)}`}]));
      return el("div", {class: "prompt"}, tools.tokens(tokens, marked), el("span", {class: "soft"}, `${panel.attribute} = `, word(value)));
    });
  }

  // The page

  function key(kind) {
    const marks = kind === "f1" ? [0, 0.25, 0.5, 0.75, 1].map((x) => el("span", {class: "swatch", style: sequential(x)}, fixed(x)))
      : [-1, -0.5, 0, 0.5, 1].map((x) => el("span", {class: "swatch", style: diverging(x)}, fixed(x)));
    const said = kind === "f1" ? "F1 of being on and having the value; framed: the latent that has the value's name"
      : "taken out, how much of what the true counterfactual does; empty: nothing, or not run";
    return el("p", {class: "soft keys"}, el("span", {}, marks), said);
  }
  function draw() {
    const panel = panelNow();
    fill(panel);
    if (!panel) {
      empty(grid, el("p", {}, "This SAE was not looked at in this cross-section."));
      empty(about);
      empty(pattern);
      return;
    }
    const left = Object.entries(panel.left_out).filter(([, n]) => n).map(([what, n]) => `${n} more ${what}`);
    empty(grid, el("p", {class: "soft"}, `${plural(panel.latents.length, "latent")}, ${plural(panel.values.length, "value")} of ` +
      `${panel.attribute}${left.length ? `; not shown: ${left.join(", ")} that answer less` : ""}.`), matrix(panel), key(columnsOf(panel)[0]?.kind));
    refresh(panel);
  }
  function fill(panel) {
    const of = panel ? [["", `${panel.attribute}, the section's`], ...panel.others.map((o) => [o.attribute, o.attribute])] : [["", "–"]];
    const next = [
      sets.length > 1 && select("SAE", sets, state.among("sae", sets), (sae) => change({sae, latent: "", value: ""}, sae)),
      select("Cross-section", sections, state.among("section", sections), (section) => change({section, latent: "", value: "", of: ""}, section)),
      select("Values of", of, state.among("of", of.map(([id]) => id)), (id) => change({of: id, value: ""}, `values of ${id || panel.attribute}`)),
      !state.get("of") && choices("Shown", [["f1", "F1"], ["effect", "effect without it"]], state.among("measure", ["f1", "effect"]),
        (measure) => change({measure}, measure === "f1" ? "F1" : "effect without the latent")),
    ];
    const focused = [...controls.querySelectorAll("select, button")].indexOf(document.activeElement);
    empty(controls, next);
    if (focused >= 0) [...controls.querySelectorAll("select, button")][focused]?.focus();
  }
  function change(values, said) {
    state.set(values);
    tools.say(said);
  }
  root.append(controls, grid, pattern, about);
  draw();
});
