// One prompt, k latents out and in: what the model says before, after, and after the edits that know the truth.
"use strict";
sage.register("edits", (root, data, tools) => {
  const {el, empty, word, cut, select, choices, slider, tint, heading} = tools;
  const unique = (list) => [...new Set(list)];
  const sets = unique(data.panels.map((panel) => panel.sae));
  const sections = unique(data.panels.map((panel) => panel.section));
  const ways = ["by name", "greedy"];
  const state = tools.state({sae: sets[0], section: sections[0], prompt: 0, way: ways[0], k: 2}, draw);
  const probability = (p) => (p === null ? "–" : p < 0.005 ? "< 0.01" : p.toFixed(p >= 0.995 ? 3 : 2));

  function now() {
    const [sae, section] = [state.among("sae", sets), state.among("section", sections)];
    const panel = data.panels.find((p) => p.sae === sae && p.section === section);
    if (!panel) return null;
    const i = Math.round(state.number("prompt", 0, panel.prompts.length - 1));
    return {panel, i, prompt: panel.prompts[i], way: state.among("way", ways),
      step: Math.round(state.number("k", 0, panel.ks.length - 1))};
  }

  // The prompt and its counterfactual

  const snippet = (prompt) => cut(prompt.tokens.join("").trim(), 56);
  function texts({panel, prompt}) {
    const roles = Object.fromEntries(Object.entries(prompt.roles).map(([at, role]) => [at, {style: tint(3), role}]));
    const differing = {};
    prompt.counterfactual.forEach((token, at) => {
      if (token !== prompt.tokens[at]) differing[at] = {style: tint(0), differs: true, title: `instead of ${cut(prompt.tokens[at] ?? "", 60)}`};
    });
    return [
      el("p", {}, el("b", {}, panel.attribute), ": ", word(prompt.old), " → ", word(prompt.new), `, at ${panel.section}`),
      heading("The prompt"), tools.tokens(prompt.tokens, roles),
      prompt.counterfactual.length > 0 && [heading(`Its counterfactual: another ${panel.attribute}`),
        tools.tokens(prompt.counterfactual, differing)],
    ];
  }

  // Latents out and in

  function moves({panel, i, way, step}) {
    const made = panel.ways[way].moves[i].filter(([at]) => at < panel.ks[step]);
    if (!panel.ks[step]) return el("p", {class: "soft"}, "Nothing is exchanged.");
    const nodes = unique(panel.ways[way].moves[i].map(([, , node]) => node));
    if (!nodes.length) {
      return el("p", {class: "soft"}, way === "greedy" ? "No latent, taken out or put in, brings the activations nearer."
        : "No latent here has the name of the old value or of the new one: nothing is exchanged.");
    }
    const names = (node, adds) => {
      const here = made.filter(([, a, n]) => n === node && a === adds).map(([, , , latent]) => panel.latents[latent]);
      return here.length ? here.map((name) => el("code", {class: adds ? "move in" : "move out"}, cut(name, 40))) : el("span", {class: "soft"}, "none");
    };
    const how = way === "greedy" ? "Greedy, with the answer in view" : "By name, chosen before the prompt was seen";
    return [el("p", {class: "soft"}, `${how}: up to ${panel.ks[step]} at each node.`), tools.scroll("Latents taken out and put in", el("table", {class: "moves"},
      el("caption", {class: "hidden"}, "Latents taken out and put in, by node"),
      el("thead", {}, el("tr", {}, ["node", "taken out", "put in"].map((name) => el("th", {scope: "col"}, name)))),
      el("tbody", {}, nodes.map((node) => el("tr", {}, el("th", {scope: "row"}, node), el("td", {}, names(node, 0)), el("td", {}, names(node, 1)))))))];
  }

  // What the model says

  // marked: what the model said before, and what it says with the true activations, which is what an edit shall reach
  function bars(title, said, {edges, i}, note, strong = false) {
    const [was, target] = [edges.before[i][0][0], edges.true[i][0][0]];
    return el("div", {class: strong ? "said strong" : "said", role: "group", "aria-label": title},
      el("strong", {class: "title"}, title), note && el("p", {class: "soft"}, note),
      el("ol", {}, said.map(([token, p]) => {
        const mark = token === was ? "old" : token === target ? "new" : null;
        const says = {new: "said with the true activations", old: "said before"}[mark];
        return el("li", {class: mark, title: says},
          el("span", {class: "bar", style: `width:${Math.max(0.5, 100 * (p || 0))}%`}),
          el("span", {class: "what"}, el("bdi", {}, tools.tokenText(token, 18) || "∅"), mark && el("span", {class: "hidden"}, ` (${says})`)),
          el("span", {class: "p"}, probability(p)));
      })));
  }
  const after = ({panel, i, way, step}) => (step ? panel.ways[way].after[i][step - 1] : panel.edges.before[i]);
  function views(at) {
    const {panel, i, step} = at;
    const [k, edges] = [panel.ks[step], panel.edges];
    const target = {edges, i};
    return el("div", {class: "saids"},
      bars("Before", edges.before[i], target, "nothing is changed"),
      bars(k ? `After ${k === 1 ? "1 exchange" : `${k} exchanges`}` : "After no exchange", after(at), target, `${at.way}, at each node`, true),
      bars("Supervised edit", edges.supervised[i], target, "the ground truth's vectors, one out, one in"),
      bars("True activations", edges.true[i], target, "the counterfactual's, put into the section"),
      bars("The counterfactual prompt", edges.prompt[i], target, "itself, nothing edited"));
  }
  function words(at) {
    const [[first, p], [was]] = [after(at)[0], at.panel.edges.before[at.i][0]];
    const name = (token) => `“${cut(token, 24).trim()}”`;
    const [target, knows] = [at.panel.edges.true[at.i][0][0], at.panel.edges.supervised[at.i][0][0]];
    if (!at.panel.ks[at.step]) return `Nothing is exchanged: the model says ${name(first)} (${probability(p)}).`;
    const changed = first === was ? `the model still says ${name(first)}` : `the model says ${name(first)} instead of ${name(was)}`;
    const like = target === was ? "The true activations do not change its answer either, so there is nothing to reach here."
      : first === target ? "So it does with the true activations."
        : `With the true activations it says ${name(target)}; the supervised edit gives ${name(knows)}.`;
    return `With ${at.panel.ks[at.step]} exchanged at each node ${changed} (${probability(p)}). ${like}`;
  }

  // The page: the controls stay, what they show is made anew

  const [controls, text, sentence, result, list] = [el("div", {class: "controls"}), el("div"), el("p", {class: "words"}), el("div"), el("div")];
  function render() {
    const at = now();
    for (const part of [text, sentence, result, list]) empty(part);
    if (!at) {
      empty(text, el("p", {}, "No prompt could be edited in this cross-section by this SAE."));
      return;
    }
    empty(text, texts(at));
    empty(sentence, words(at));
    empty(result, views(at), el("p", {class: "soft"}, el("span", {class: "chip old"}, "said before"), " ",
      el("span", {class: "chip new"}, "said with the true activations: what an edit shall reach")));
    empty(list, heading("Latents out and in"), moves(at));
  }
  function draw() {
    const at = now();
    empty(controls,
      sets.length > 1 && select("SAE", sets, state.among("sae", sets), (sae) => changePanel({sae}, "SAE")),
      select("Cross-section", sections, state.among("section", sections), (section) => changePanel({section, prompt: 0}, "Cross-section")),
      at && select("Prompt", at.panel.prompts.map((prompt, i) => [i, snippet(prompt)]), at.i, (prompt) => change({prompt})),
      at && choices("Latents chosen", ways, at.way, (way) => change({way})),
      at && slider("Exchanges at each node (k)", {max: at.panel.ks.length - 1, value: at.step, text: (step) => String(at.panel.ks[step])},
        (k) => change({k})));
    render();
  }
  function change(values) {
    state.set(values, {quiet: true});
    render();
    const at = now();
    tools.say(at ? words(at) : "no prompt could be edited here");
  }
  // another panel has other prompts: the controls are made anew, and the one that was used keeps the focus
  function changePanel(values, name) {
    change(values);
    draw();
    for (const label of controls.querySelectorAll("label")) {
      if (label.textContent.startsWith(name)) label.querySelector("select").focus();
    }
  }
  root.append(controls, text, sentence, result, list);
  draw();
});
