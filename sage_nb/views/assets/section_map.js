// Where each attribute is: maps of layers × heads by site and position, and what is known of the one that is chosen.
// data: {attributes: [{name, note, missing, panels: [{site, position, share: [layer][head], headed, section, fate}]}],
//        sections: [{name, nodes, curve, …}], intervals: {node: [lo, hi]}, sites: {site: words}, prompts: {attribute: […]}}
"use strict";
sage.register("section_map", (root, data, tools) => {
  const {el, svg, empty, word, number, estimate, plural, choices, tokens, tint, heading, roving, scroll, tip, say} = tools;
  const names = data.attributes.map((attribute) => attribute.name);
  const chosen = tools.state({attribute: names[0], at: "", node: ""}, () => draw());
  const controls = el("div", {class: "controls"});
  const found = el("div", {class: "found"});
  const maps = el("div", {class: "at-maps"});
  const nodes = el("div", {class: "at-nodes"});
  const panelBox = el("section", {class: "panel at-panel", "aria-label": "What is known of the chosen place"});
  const examples = el("div", {class: "at-prompts"});
  const key = (panel) => `${panel.site}@${panel.position}`;
  const nodeName = (panel, layer, head) => `L${layer}${panel.headed ? `H${head}` : ""}`;
  const members = (panel) => new Set(panel.section === null ? [] : data.sections[panel.section].nodes);
  // small effects would not be seen beside large ones: colours go by the square root, and end at 1
  const size = (share) => share === null ? null : Math.sign(share) * Math.sqrt(Math.min(Math.abs(share), 1));
  const siteWords = (site) => data.sites[site] || site;

  const attribute = () => data.attributes[names.indexOf(chosen.among("attribute", names))];
  function panel() {
    const {name, panels} = attribute();
    const best = data.sections.find((section) => section.attribute === name);
    const at = (place) => panels.find((p) => key(p) === place);
    return at(chosen.get("at")) || (best && at(key(best))) || largest(panels);
  }
  const peak = (p) => Math.max(...p.share.flat().map((share) => Math.abs(share ?? 0)));
  const largest = (panels) => [...panels].sort((a, b) => peak(b) - peak(a))[0];

  function legend() {
    const steps = [-1, -0.5, -0.2, -0.05, 0, 0.05, 0.2, 0.5, 1];
    const label = (x) => (x === -1 ? "≤ −1" : x === 1 ? "≥ 1" : number(x).replace(/(\.\d)0$/, "$1"));
    return el("div", {class: "legend"},
      el("span", {class: "soft"}, "effect of one node, as a share of the clean logit difference"),
      el("span", {class: "swatches"}, steps.map((x) => el("span", {style: tools.diverging(size(x))}, label(x)))),
      el("span", {class: "soft"}, el("span", {class: "ringed"}), " in a cross-section"));
  }

  function mini(p) {
    const [layers, heads] = [p.share.length, p.share[0].length];
    const inside = members(p);
    const cell = Math.max(5, Math.min(17, Math.floor(76 / Math.max(layers, heads))));
    const squares = p.share.flatMap((row, layer) => row.map((share, head) => svg("rect", {
      x: head * cell, y: layer * cell, width: cell, height: cell, style: `fill:${tools.divergingFill(size(share))}`})));
    const rings = p.share.flatMap((row, layer) => row.map((_, head) => inside.has(nodeName(p, layer, head)) &&
      svg("rect", {x: head * cell + 1, y: layer * cell + 1, width: cell - 2, height: cell - 2, class: "ring"})));
    const [width, height] = [heads * cell, layers * cell];
    return svg("svg", {"aria-hidden": "true", width, height, viewBox: `0 0 ${width} ${height}`}, squares, rings);
  }
  function summary(p) {
    if (p.section !== null) {
      const section = data.sections[p.section];
      return `cross-section of ${plural(section.nodes.length, "node")}, effect ${estimate(section.effect)}`;
    }
    return `no cross-section; largest effect of one node ${number(largestShare(p), 2)}`;
  }
  const largestShare = (p) => p.share.flat().reduce((a, b) => (Math.abs(b ?? 0) > Math.abs(a ?? 0) ? b : a), 0);

  function drawMaps() {
    const {name, panels} = attribute();
    const [sites, positions] = ["site", "position"].map((what) => [...new Set(panels.map((p) => p[what]))]);
    const rows = sites.map((site) => el("tr", {},
      el("th", {scope: "row"}, word(site), el("span", {class: "words"}, siteWords(site))),
      positions.map((position) => {
        const p = panels.find((q) => q.site === site && q.position === position);
        if (!p) return el("td");
        const pick = () => choose(p);
        const button = el("button", {type: "button", class: p.section === null ? "map" : "map with", onclick: pick,
          "data-at": key(p), "aria-label": `${name} in ${site} at ${position}: ${summary(p)}`}, mini(p));
        return el("td", {}, tip(button, `${site} at ${position}: ${summary(p)}`));
      })));
    const head = el("thead", {}, el("tr", {}, el("td", {class: "corner"}, "site"),
      positions.map((position) => el("th", {scope: "col"}, word(position, {limit: 14})))));
    const table = el("table", {class: "maps"}, el("caption", {class: "hidden"}, `maps of ${name}, by site and position`),
      head, el("tbody", {}, rows));
    empty(maps, scroll(`maps of ${name}`, table));
    mark();
    roving(table);
  }
  function drawFound() {
    const {name, missing, note} = attribute();
    const own = data.sections.filter((section) => section.attribute === name);
    empty(found,
      missing ? el("p", {}, el("b", {}, "Not found. "), missing) : null,
      own.length ? el("fieldset", {class: "control"}, el("legend", {class: "name"}, "Its cross-sections, largest effect first"),
        el("div", {class: "choices"}, own.map((section) => el("button", {
          type: "button", "data-at": `${section.site}@${section.position}`, onclick: () => choose(section),
        }, word(`${section.site}@${section.position}`, {limit: 24}), el("span", {class: "figure"}, number(section.effect.value, 2)))))) : null,
      note ? el("p", {class: "soft"}, note) : null);
    mark();
  }
  function mark() {
    for (const button of root.querySelectorAll("[data-at]")) {
      button.setAttribute("aria-pressed", String(button.dataset.at === key(panel())));
    }
  }

  // The chosen place

  function cells(p) {
    const inside = members(p);
    const [many, wide] = [p.share[0].length > 6, p.share[0].length > 12];
    const shown = (share) => (wide ? "" : number(share, 2).replace("0.00", "0"));
    const buttons = (row, layer) => row.map((share, head) => {
      const node = nodeName(p, layer, head);
      if (share === null) return el("td");
      const is = inside.has(node);
      const button = el("button", {
        type: "button", class: ["cell", is && "member", wide ? "narrow" : many && "many"].filter(Boolean).join(" "), style: tools.diverging(size(share)),
        "data-node": node, onclick: () => pickNode(node),
        "aria-label": `${node}: ${number(share, 2)}${is ? ", in the cross-section" : ""}`,
      }, shown(share));
      return el("td", {}, tip(button, () => `${node} ${rangeOf(p, node)}`));
    });
    const heads = p.headed ? p.share[0].map((_, head) => el("th", {scope: "col"}, `H${head}`)) : el("th", {scope: "col"}, "all");
    const table = el("table", {class: "cells"},
      el("caption", {}, p.headed ? "layers (rows) × heads (columns)" : "layers"),
      el("thead", {}, el("tr", {}, el("td"), heads)),
      el("tbody", {}, p.share.map((row, layer) => el("tr", {}, el("th", {scope: "row"}, `L${layer}`), buttons(row, layer)))));
    return scroll("effects of single nodes", table);
  }
  function pickNode(node) {
    chosen.set({node}, {quiet: true});
    drawNode();
  }
  const nodeText = el("p", {class: "node", "aria-live": "polite"});
  const shareOf = (p, node) => {
    const [, layer, head] = node.match(p.headed ? /^L(\d+)H(\d+)$/ : /^L(\d+)$/) || [];
    return p.share[layer]?.[head ?? 0] ?? null;
  };
  // the node that is asked for, or else the most important one
  function node(p) {
    if (shareOf(p, chosen.get("node")) !== null) return chosen.get("node");
    if (p.section !== null) return data.sections[p.section].nodes[0];
    const all = p.share.flatMap((row, layer) => row.map((share, head) => [Math.abs(share ?? -1), nodeName(p, layer, head)]));
    return all.sort(([a], [b]) => b - a)[0][1];
  }
  function rangeOf(p, name) {
    const [lo, hi] = data.intervals[attribute().name]?.[`${name}.${key(p)}`] || [];
    return estimate({value: shareOf(p, name), lo, hi});
  }
  function drawNode() {
    const p = panel();
    const name = node(p);
    for (const button of nodes.querySelectorAll("[data-node]")) {
      button.setAttribute("aria-pressed", String(button.dataset.node === name));
    }
    const share = shareOf(p, name);
    const all = attribute().panels.flatMap((q) => q.share.flat()).filter((other) => other !== null);
    const rank = 1 + all.filter((other) => Math.abs(other) > Math.abs(share)).length;
    const into = members(p).has(name) ? "; in the cross-section" : "";
    empty(nodeText, el("b", {}, `${name} `), `${rangeOf(p, name)} by attribution: rank ${rank} of the ${all.length} nodes ` +
      `that were scored for ${attribute().name}${into}.`);
  }

  function meaning({value}) {
    if (value <= -1.25) return "the logit difference turns round: the model prefers the counterfactual's answer";
    if (value <= -0.75) return "the logit difference is all but gone";
    return `the logit difference ${value < 0 ? "falls" : "rises"} by ${tools.percent(Math.abs(value))}`;
  }
  function figures(section) {
    const rows = [
      ["on training prompts", section.effect], ["on held-out prompts", section.held_out],
      ["with all nodes of this map", section.group], ["with a change that should not matter", section.noise],
    ].filter(([, e]) => e);
    return el("table", {class: "figures"}, el("caption", {}, "effect of patching them together, with its 95 % interval"),
      el("tbody", {}, rows.map(([name, e]) => el("tr", {}, el("th", {scope: "row"}, name),
        el("td", {class: "number"}, estimate(e))))));
  }
  function curve(section) {
    const kept = section.nodes.length;
    const points = section.curve.map((e) => ({x: e.nodes, ...e, strong: e.nodes === kept,
      text: `${plural(e.nodes, "node")}: ${estimate(e)}${e.nodes === kept ? ", kept" : ""}`}));
    const reach = `from ${number(points[0].value, 2)} with one node to ${number(points.at(-1).value, 2)} with all`;
    return tools.chart({
      label: `effect by number of nodes patched, ${reach}; ${kept} were kept`, series: [{points}],
      x: {name: "nodes patched (the ringed number was kept)", ticks: points.map((p) => p.x), log: true},
      y: {name: "effect", min: 0, max: 0},
    });
  }
  function verdict({passed, verdict: says, lines}) {
    return el("div", {}, heading("Its certificate"),
      el("p", {}, el("b", {class: passed === null ? "" : passed ? "good" : "bad"},
        passed === null ? "" : passed ? "✓ passes. " : "✗ fails. "), says),
      el("ul", {}, lines.map((text) => el("li", {}, text))));
  }
  function known(p) {
    if (p.section === null) {
      return [el("p", {}, "No cross-section here: ", p.fate ? p.fate.reason : "this place was not searched", "."),
        p.fate && p.fate.effect !== null ? el("p", {class: "soft"}, `Every candidate node patched together: ${estimate({...p.fate, value: p.fate.effect})}.`) : null];
    }
    const section = data.sections[p.section];
    return [
      el("p", {}, `A cross-section of ${plural(section.nodes.length, "node")} out of ${total(p)}, most important first: `,
        el("b", {}, section.nodes.join(", ")), `. With their activations taken from the counterfactuals, ${meaning(section.effect)}.`),
      figures(section), heading("How many nodes it takes"), curve(section),
      section.certificate ? verdict(section.certificate) : null];
  }
  const total = (p) => p.share.flat().filter((share) => share !== null).length;
  function prompts(p) {
    const examples = data.prompts[attribute().name] || [];
    if (!examples.length) return null;
    const role = {style: tint(0), role: p.position};
    const marks = (example, differs) => {
      const all = Object.fromEntries(differs.map((i) => [i, {differs: true}]));
      const at = example.positions[p.position];
      if (at !== undefined) all[at] = {...all[at], ...role};
      return all;
    };
    return el("div", {}, heading(`Prompts and their counterfactuals in ${attribute().name}`),
      el("p", {class: "soft"}, "The activation is taken from the second line into the first, at the marked token; what differs is underlined."),
      el("ol", {class: "pairs"}, examples.map((example) => el("li", {},
        el("span", {class: "hidden"}, "prompt: "), tokens(example.strings, marks(example, example.differs)),
        el("span", {class: "hidden"}, "counterfactual: "), tokens(example.other, marks(example, example.differs)),
        el("p", {class: "soft"}, attribute().name, ": ", word(example.value), " → ", word(example.changed))))));
  }
  function drawDetail() {
    const p = panel();
    const title = () => [word(attribute().name), ` in ${siteWords(p.site)} (`, word(p.site), ") at ", word(p.position)];
    empty(nodes, heading(title()), cells(p), nodeText);
    empty(panelBox, heading(title()), known(p));
    empty(examples, prompts(p));
    drawNode();
    roving(nodes.querySelector("table.cells"));
  }
  function choose({site, position}) {
    chosen.set({at: `${site}@${position}`, node: ""}, {quiet: true});
    mark();
    drawDetail();
    say(`${attribute().name} in ${site} at ${position}: ${summary(panel())}`);
  }

  function draw() {
    const pick = (name) => {
      chosen.set({attribute: name, at: "", node: ""}, {quiet: true});
      drawFound();
      drawMaps();
      drawDetail();
      say(`${name}: ${plural(data.sections.filter((s) => s.attribute === name).length, "cross-section")}`);
    };
    empty(controls, choices("Attribute", names, chosen.among("attribute", names), pick));
    drawFound();
    drawMaps();
    drawDetail();
  }
  root.append(el("p", {class: "soft"}, data.intro), controls, found, legend(),
    el("div", {class: "columns"}, maps, nodes, panelBox, examples));
  draw();
});
