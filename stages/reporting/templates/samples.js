// The samples browser of the report. Texts of models and data only ever become text nodes.
(() => {
  "use strict";

  const LONG = 2000; // characters of a text that are shown before "Show all"
  const MOST_EDITS = 300; // beyond, two texts have too little in common to compare word by word
  const MOST_HITS = 500; // marked in one text
  const TYPING_MS = 120;
  const TEXTS = ["opponent", "player", "greedy"];

  const element = (id) => document.getElementById(id);
  const parsed = (id) => JSON.parse(element(id).textContent);
  const count = (number) => number.toLocaleString("en");
  const figure = (number) => String(Number(number.toPrecision(3))).replace("-", "−");
  const signed = (number) => (number > 0 ? "+" : "") + figure(number);

  function make(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  async function unpacked(id) {
    const letters = atob(parsed(id));
    const bytes = new Uint8Array(letters.length);
    for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }

  // --- Samples -------------------------------------------------------------------------------

  // A text that the page holds only the beginning of is [beginning, length of the whole].
  const textOf = (cell) => (Array.isArray(cell) ? cell[0] : cell);
  const fullLength = (cell) => (Array.isArray(cell) ? cell[1] : cell.length);

  function samplesOf(columns, prompts) {
    const at = (name, i) => (columns[name] ? columns[name][i] : null);
    return columns.prompt.map((prompt, i) => {
      const sample = {
        number: i,
        id: prompts.ids[prompt],
        messages: prompts.prompts[prompt] || [["user", "(the prompt is missing)"]],
        human: prompts.humans[prompt],
        humanTokens: at("human_tokens", i),
        humanMargin: at("human_margin", i),
        opponentMargin: at("opponent_margin", i),
      };
      for (const who of TEXTS) {
        sample[who] = at(who, i);
        sample[who + "Finish"] = at(who + "_finish", i);
        sample[who + "Tokens"] = at(who + "_tokens", i);
        sample[who + "Reward"] = at(who + "_reward", i);
      }
      sample.margin = difference(sample.humanMargin, sample.opponentMargin);
      sample.gain = difference(sample.playerReward, sample.opponentReward);
      return sample;
    });
  }

  const difference = (a, b) => (a === null || b === null ? null : a - b);
  const equal = (a, b) =>
    a !== null && b !== null && textOf(a) === textOf(b) && fullLength(a) === fullLength(b);

  // Label, and the number that a sample is sorted by; offered where any sample has one.
  const SORTS = [
    ["margin", "Margin", (s) => s.margin, "highest", "lowest"],
    ["reward", "Reward", (s) => s.playerReward, "highest", "lowest"],
    ["gain", "Gain", (s) => s.gain, "highest", "lowest"],
    ["length", "Length", (s) => s.playerTokens, "longest", "shortest"],
    ["human", "Human length", (s) => s.humanTokens, "longest", "shortest"],
  ];

  const isRight = (s) => s.playerReward === 1;
  const isWrong = (s) => s.playerReward === 0;
  const VERSUS = [
    ["any", "All", () => true],
    ["won", "Won", (s) => s.gain > 0],
    ["lost", "Lost", (s) => s.gain < 0],
    ["tied", "Tied", (s) => s.gain === 0],
    ["told", "Margin above 0", (s) => s.margin > 0],
    ["fooled", "Margin below 0", (s) => s.margin !== null && s.margin < 0],
    ["same", "Same answer", (s) => equal(s.player, s.opponent)],
  ];
  const ONLY = [
    ["any", "All", () => true],
    ["right", "Right", isRight],
    ["wrong", "Wrong", isWrong],
    ["cut", "Cut off", (s) => s.playerFinish === "length"],
    ["identical", "Same as human", (s) => equal(s.player, s.human)],
    ["different", "Other than human", (s) => !equal(s.player, s.human)],
    ["empty", "Empty", (s) => !textOf(s.player).trim()],
  ];

  // --- Words that differ ---------------------------------------------------------------------

  const WORDS =
    /\s+|[\p{sc=Han}\p{sc=Hiragana}\p{sc=Katakana}\p{sc=Thai}]|[\p{L}\p{M}\p{N}_]+|[^]/gu;

  // What turns `before` into `after`: [kind, words] with kinds "same", "missing" and "added".
  function differences(before, after) {
    const a = before.match(WORDS) || [];
    const b = after.match(WORDS) || [];
    let start = 0;
    while (start < a.length && start < b.length && a[start] === b[start]) start++;
    let end = 0;
    while (
      end < a.length - start && end < b.length - start &&
      a[a.length - 1 - end] === b[b.length - 1 - end]
    ) end++;
    const [innerA, innerB] = [a.slice(start, a.length - end), b.slice(start, b.length - end)];
    const edits = shortestEdit(innerA, innerB) || [["missing", innerA], ["added", innerB]];
    return grouped([["same", b.slice(0, start)], ...edits, ["same", b.slice(b.length - end)]]);
  }

  // Myers' greedy algorithm (1986); null where there are more than MOST_EDITS edits.
  function shortestEdit(a, b) {
    const reach = new Int32Array(2 * MOST_EDITS + 3);
    const zero = MOST_EDITS + 1;
    const trace = [];
    for (let edits = 0; edits <= MOST_EDITS; edits++) {
      trace.push(reach.slice());
      for (let k = -edits; k <= edits; k += 2) {
        const down = k === -edits || (k !== edits && reach[zero + k - 1] < reach[zero + k + 1]);
        let x = down ? reach[zero + k + 1] : reach[zero + k - 1] + 1;
        while (x < a.length && x - k < b.length && a[x] === b[x - k]) x++;
        reach[zero + k] = x;
        if (x >= a.length && x - k >= b.length) return walkedBack(a, b, trace, zero);
      }
    }
    return null;
  }

  function walkedBack(a, b, trace, zero) {
    const pieces = [];
    let [x, y] = [a.length, b.length];
    for (let edits = trace.length - 1; edits >= 0; edits--) {
      const reach = trace[edits];
      const k = x - y;
      const down = k === -edits || (k !== edits && reach[zero + k - 1] < reach[zero + k + 1]);
      const beforeK = down ? k + 1 : k - 1;
      const beforeX = edits ? reach[zero + beforeK] : 0;
      const beforeY = edits ? beforeX - beforeK : 0;
      while (x > beforeX && y > beforeY) {
        pieces.push(["same", [b[--y]]]);
        x--;
      }
      if (edits) pieces.push(down ? ["added", [b[--y]]] : ["missing", [a[--x]]]);
    }
    return pieces.reverse();
  }

  // Join neighbours; white space alone between two changes is part of the change.
  function grouped(pieces) {
    const groups = [];
    let [missing, added, gap] = ["", "", ""];
    const close = () => {
      if (missing) groups.push(["missing", missing]);
      if (added) groups.push(["added", added]);
      if (gap) groups.push(["same", gap]);
      [missing, added, gap] = ["", "", ""];
    };
    for (const [kind, words] of pieces) {
      const text = words.join("");
      if (!text) continue;
      if (kind !== "same") {
        [missing, added, gap] = [missing + gap, added + gap, ""];
        if (kind === "missing") missing += text;
        else added += text;
      } else if ((missing || added) && !(gap + text).trim()) {
        gap += text;
      } else {
        close();
        if (groups.length && groups.at(-1)[0] === "same") groups.at(-1)[1] += text;
        else groups.push(["same", text]);
      }
    }
    close();
    return groups;
  }

  // --- Texts ---------------------------------------------------------------------------------

  const ODD = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]/gu;
  const HEAPED = /(\p{M}{6})(\p{M}{2,})/gu;

  // What cannot be seen, or changes how its neighbours are seen, is shown by name.
  function visible(text) {
    return text
      .replace(ODD, (letter) => {
        const code = letter.codePointAt(0);
        if (code < 32) return String.fromCodePoint(0x2400 + code);
        return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
      })
      .replace(HEAPED, (_, some, rest) => `${some}⟨${count([...rest].length)} more marks⟩`);
  }

  function searched(query) {
    const text = query.trim();
    return text ? new RegExp(text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), "giu") : null;
  }

  function hitsIn(text, search) {
    const hits = [];
    if (search) {
      for (const hit of text.matchAll(search)) {
        hits.push([hit.index, hit.index + hit[0].length]);
        if (hits.length >= MOST_HITS) break;
      }
    }
    return hits;
  }

  // Put text[from, to) into a node, its hits marked.
  function append(node, text, from, to, hits) {
    let at = from;
    for (const [start, end] of hits) {
      if (end <= at || start >= to) continue;
      if (start > at) node.append(visible(text.slice(at, start)));
      node.append(make("mark", "", visible(text.slice(Math.max(start, at), Math.min(end, to)))));
      at = Math.min(end, to);
    }
    if (at < to) node.append(visible(text.slice(at, to)));
  }

  function fill(node, text, hits, human, withMissing) {
    node.replaceChildren();
    const pieces = human === null ? [["same", text]] : differences(human, text);
    let at = 0;
    for (const [kind, piece] of pieces) {
      if (kind === "missing") {
        if (withMissing) node.append(make("del", "", visible(piece)));
        continue;
      }
      const place = kind === "added" ? node.appendChild(make("ins")) : node;
      append(place, text, at, at + piece.length, hits);
      at += piece.length;
    }
    if (!text) node.append(make("em", "sample-nothing", "(empty)"));
  }

  // One text with its heading. `human`: the text that it is compared with, or null.
  function textBlock(who, title, facts, cell, human, view) {
    const block = make("div", `sample-text sample-${who}`);
    const heading = make("h4", "", title);
    if (facts.length) heading.append(" ", make("small", "", facts.join(" · ")));
    const body = make("div", "sample-body");
    body.dir = "auto";
    block.append(heading, body);
    const text = textOf(cell);
    const hits = hitsIn(text, view.search);
    let whole = text.length <= LONG || hits.some(([, end]) => end > LONG);
    const draw = () => {
      const [shown, other] = whole ? [text, human] : [cutAt(text), human && cutAt(human)];
      fill(body, shown, hits, other, view.missing);
    };
    draw();
    if (text.length > LONG) {
      const more = make("button", "sample-more");
      more.type = "button";
      const say = () => {
        more.textContent = whole ? "Show less" : `Show all ${count(text.length)} characters`;
        more.setAttribute("aria-expanded", String(whole));
      };
      say();
      more.addEventListener("click", () => {
        whole = !whole;
        draw();
        say();
      });
      block.append(more);
    }
    if (Array.isArray(cell)) {
      const note = `Only the first ${count(text.length)} of ${count(cell[1])} characters are in this page.`;
      block.append(make("p", "sample-cut", note));
    }
    return block;
  }

  // The beginning of a long text; no pair of surrogates is torn.
  function cutAt(text) {
    const end = /[\ud800-\udbff]/.test(text[LONG - 1] || "") ? LONG - 1 : LONG;
    return text.slice(0, end);
  }

  // --- One sample ----------------------------------------------------------------------------

  const hashOf = (evaluation, sample) => `#sample/${evaluation}/${sample.id}`;

  function badges(sample) {
    const list = make("ul", "sample-badges");
    const add = (kind, text) => list.append(make("li", kind, text));
    if (sample.binary && isRight(sample)) add("good", "✓ right");
    if (sample.binary && isWrong(sample)) add("bad", "✗ wrong");
    if (sample.gain > 0) add("good", `won ${signed(sample.gain)}`);
    if (sample.gain < 0) add("bad", `lost ${signed(sample.gain)}`);
    if (sample.gain === 0) add("", "tied");
    if (sample.margin !== null) {
      const sides = [`human ${signed(sample.humanMargin)}`, `opponent ${signed(sample.opponentMargin)}`];
      add("", `margin ${signed(sample.margin)}` + (sample.margin ? ` (${sides.join(", ")})` : ""));
    }
    if (sample.playerFinish === "length") add("bad", "cut off");
    if (equal(sample.player, sample.human)) add("", "same as human");
    if (equal(sample.player, sample.opponent)) add("", "same as opponent");
    return list;
  }

  function factsOf(sample, who) {
    const [tokens, reward] = [sample[who + "Tokens"] ?? null, sample[who + "Reward"] ?? null];
    const facts = [];
    if (tokens !== null) facts.push(`${count(tokens)} tokens`);
    if (reward !== null) facts.push(`reward ${figure(reward)}`);
    if (sample[who + "Finish"] === "length") facts.push("cut off");
    return facts;
  }

  function promptCell(sample) {
    const { messages } = sample;
    if (messages.length === 1 && messages[0][0] === "user") return messages[0][1];
    const text = messages.map(([role, cell]) => `${role}: ${textOf(cell)}`).join("\n");
    const cut = messages.reduce((n, [, c]) => n + fullLength(c) - textOf(c).length, 0);
    return cut ? [text, text.length + cut] : text;
  }

  function article(sample, place, total, view) {
    const node = make("article", "sample");
    const heading = make("h3", "sample-title");
    const link = heading.appendChild(make("a", "", `Sample ${count(place + 1)}`));
    link.href = hashOf(view.evaluation, sample);
    heading.id = `sample-title-${place}`;
    heading.append(" ", make("code", "", sample.id.slice(0, 8)));
    const copy = make("button", "sample-copy", "Copy");
    copy.type = "button";
    copy.setAttribute("aria-label", `Copy sample ${count(place + 1)}`);
    copy.addEventListener("click", () => copySample(copy, sample));
    const head = make("div", "sample-head");
    head.append(heading, badges(sample), copy);
    const texts = make("div", "sample-texts");
    const human = textOf(sample.human);
    texts.append(textBlock("prompt", "Prompt", [], promptCell(sample), null, view));
    texts.append(textBlock("human", "Human", factsOf(sample, "human"), sample.human, null, view));
    if (sample.opponent !== null) {
      const facts = factsOf(sample, "opponent");
      texts.append(textBlock("opponent", "Opponent", facts, sample.opponent, human, view));
    }
    texts.append(
      textBlock("player", "Player", factsOf(sample, "player"), sample.player, human, view));
    if (view.greedy && sample.greedy !== null) {
      const facts = factsOf(sample, "greedy");
      texts.append(textBlock("greedy", "Player, greedy", facts, sample.greedy, human, view));
    }
    texts.classList.add(`of-${texts.children.length - 1}`);
    node.append(head, texts);
    node.tabIndex = -1;
    node.dataset.place = String(place);
    node.setAttribute("aria-posinset", String(place + 1));
    node.setAttribute("aria-setsize", String(total));
    node.setAttribute("aria-labelledby", heading.id);
    return node;
  }

  async function copySample(button, sample) {
    const parts = [["Prompt", promptCell(sample)], ["Human", sample.human]];
    for (const who of TEXTS) {
      if (sample[who] !== null) parts.push([who[0].toUpperCase() + who.slice(1), sample[who]]);
    }
    const text = parts.map(([title, cell]) => `# ${title}\n${textOf(cell)}`).join("\n\n");
    const done = await copied(text);
    button.textContent = done ? "Copied" : "Not copied";
    element("samples-said").textContent = done ? "Copied." : "The browser did not allow to copy.";
    setTimeout(() => {
      button.textContent = "Copy";
      element("samples-said").textContent = "";
    }, 2000);
  }

  // The clipboard is closed to pages over plain http, but for loopback; the old way still works.
  async function copied(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      const area = make("textarea");
      area.value = text;
      const before = document.activeElement;
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      before?.focus();
      return done;
    }
  }

  // --- The browser ---------------------------------------------------------------------------

  class Browser {
    constructor(index) {
      this.index = index;
      this.loaded = new Map();
      this.prompts = unpacked("samples-prompts");
      this.samples = [];
      this.found = [];
      this.first = 0;
      this.asked = 0;
      this.list = element("samples-list");
      this.listen();
    }

    get(name) {
      return element(`samples-${name}`);
    }

    get size() {
      return Number(this.get("size").value);
    }

    get pages() {
      return Math.max(1, Math.ceil(this.found.length / this.size));
    }

    // Open an evaluation; of two asked for at a time, the later one is shown.
    async open(name) {
      const asked = ++this.asked;
      this.list.setAttribute("aria-busy", "true");
      if (!this.loaded.has(name)) this.loaded.set(name, this.load(name));
      const samples = await this.loaded.get(name);
      if (asked !== this.asked) return false;
      this.evaluation = name;
      this.samples = samples;
      this.get("evaluation").value = name;
      this.offer();
      this.find();
      return true;
    }

    // The page's data are new ones; the evaluation that is shown stays until another is asked for.
    renew() {
      this.index = parsed("samples-index");
      this.prompts = unpacked("samples-prompts");
      this.loaded.clear();
      const select = this.get("evaluation");
      const names = [...select.options].map((option) => option.value);
      const added = this.index.filter((e) => !names.includes(e.name)).map((e) => e.label);
      options(select, this.index.map((e) => [e.name, e.label]));
      if (added.length) element("samples-said").textContent = `New samples: ${added.join(", ")}.`;
    }

    async load(name) {
      const [columns, prompts] = await Promise.all([unpacked(`samples-of-${name}`), this.prompts]);
      const samples = samplesOf(columns, prompts);
      const rewards = samples.map((s) => s.playerReward).filter((r) => r !== null);
      const binary = rewards.length > 0 && rewards.every((r) => r === 0 || r === 1);
      for (const sample of samples) sample.binary = binary;
      return samples;
    }

    // Offer what this evaluation can be sorted and filtered by.
    offer() {
      const sorts = [["prompt", "Order of prompts"]];
      for (const [key, label, value, high, low] of SORTS) {
        if (!this.samples.some((s) => value(s) !== null)) continue;
        sorts.push([`${key}-high`, `${label}, ${high} first`], [`${key}-low`, `${label}, ${low} first`]);
      }
      options(this.get("sort"), sorts);
      const compared = this.samples.some((s) => s.opponent !== null);
      const scored = this.samples.some((s) => s.gain !== null);
      const needed = { won: scored, lost: scored, tied: scored };
      const told = this.samples.some((s) => s.margin !== null);
      Object.assign(needed, { told, fooled: told, same: compared });
      const binary = this.samples.some((s) => s.binary);
      this.offerFilter("versus", VERSUS, needed);
      this.offerFilter("only", ONLY, { right: binary, wrong: binary });
      this.get("versus").disabled = !compared;
      this.get("greedy").disabled = !this.samples.some((s) => s.greedy !== null);
    }

    offerFilter(name, filters, needed) {
      const offered = filters.filter(([key]) => needed[key] !== false);
      options(this.get(name), offered.map(([key, label, test]) =>
        [key, `${label} (${count(this.samples.filter(test).length)})`]));
    }

    // Search, filter and sort; show the first page.
    find() {
      const tests = [[VERSUS, "versus"], [ONLY, "only"]].map(([filters, name]) =>
        filters.find(([key]) => key === this.get(name).value)[2]);
      const search = searched(this.get("search").value);
      const has = (cell) => {
        if (cell === null) return false;
        search.lastIndex = 0;
        return search.test(textOf(cell));
      };
      const matches = (s) => has(s.id) || has(s.human) || s.messages.some(([, cell]) => has(cell)) ||
        TEXTS.some((who) => has(s[who]));
      this.search = search;
      this.found = this.samples.filter((s) => tests.every((test) => test(s)) && (!search || matches(s)));
      this.sort();
      this.show(0);
    }

    sort() {
      const [key, way] = this.get("sort").value.split("-");
      const sort = SORTS.find(([name]) => name === key);
      if (!sort) return;
      const value = sort[2];
      const sign = way === "high" ? -1 : 1;
      this.found.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return (x === null) - (y === null) || a.number - b.number;
        return sign * (x - y) || a.number - b.number;
      });
    }

    // Show the page that holds a place among the samples found.
    show(place) {
      this.first = Math.floor(place / this.size) * this.size;
      const view = {
        evaluation: this.evaluation,
        search: this.search,
        missing: this.get("missing").checked,
        greedy: this.get("greedy").checked,
      };
      const shown = this.found.slice(this.first, this.first + this.size);
      this.list.replaceChildren(...shown.map((sample, i) =>
        article(sample, this.first + i, this.found.length, view)));
      if (this.list.firstChild) this.list.firstChild.tabIndex = 0;
      this.list.setAttribute("aria-busy", "false");
      this.tell(shown.length);
    }

    tell(shown) {
      const [found, all] = [count(this.found.length), count(this.samples.length)];
      const range = shown ? `; ${count(this.first + 1)} to ${count(this.first + shown)} shown` : "";
      this.get("status").textContent = this.found.length === this.samples.length
        ? `${all} samples${range}.`
        : `${found} of ${all} samples found${range}.`;
      const page = Math.floor(this.first / this.size);
      this.get("page").textContent = `Page ${count(page + 1)} of ${count(this.pages)}`;
      this.get("pages").hidden = this.pages < 2;
      for (const button of this.get("pages").querySelectorAll("button")) {
        const back = ["first", "previous"].includes(button.dataset.page);
        button.disabled = back ? page === 0 : page === this.pages - 1;
      }
    }

    // Put the focus on the sample at a place, on whatever page it is.
    focus(place) {
      if (!this.found.length) return;
      const inside = Math.min(Math.max(place, 0), this.found.length - 1);
      if (inside < this.first || inside >= this.first + this.size) this.show(inside);
      const target = this.list.children[inside - this.first];
      for (const node of this.list.children) node.tabIndex = node === target ? 0 : -1;
      target.focus({ preventScroll: true });
      const fits = target.offsetHeight < window.innerHeight;
      target.scrollIntoView({ block: fits ? "nearest" : "start" });
    }

    turn(where) {
      const last = (this.pages - 1) * this.size;
      const to = { first: 0, previous: this.first - this.size, next: this.first + this.size, last };
      const place = Math.min(Math.max(to[where], 0), last);
      this.show(place);
      this.focus(place);
    }

    // Follow a link to one sample: #sample/EVALUATION/PROMPT-ID.
    async follow(hash) {
      const [, name, id] = hash.match(/^#sample\/([^/]+)\/([^/]+)$/) || [];
      if (!this.index.some((e) => e.name === name)) return false;
      if (!(await this.open(name))) return true;
      const place = () => this.found.findIndex((s) => s.id === id);
      if (place() < 0) this.clear();
      if (place() < 0) this.get("status").textContent = `Sample ${id} is not in this page.`;
      else this.focus(place());
      return true;
    }

    clear() {
      this.get("search").value = "";
      for (const name of ["versus", "only"]) this.get(name).value = "any";
      this.find();
    }

    listen() {
      let typing = 0;
      this.get("search").addEventListener("input", () => {
        clearTimeout(typing);
        typing = setTimeout(() => this.find(), TYPING_MS);
      });
      this.get("form").addEventListener("submit", (event) => {
        event.preventDefault();
        clearTimeout(typing); // or it would take the focus away again
        this.find();
        this.focus(0);
      });
      this.get("evaluation").addEventListener("change", (event) => this.open(event.target.value));
      for (const name of ["sort", "versus", "only"]) {
        this.get(name).addEventListener("change", () => this.find());
      }
      for (const name of ["size", "missing", "greedy"]) {
        this.get(name).addEventListener("change", () => this.show(this.first));
      }
      this.get("pages").addEventListener("click", (event) => {
        const button = event.target.closest("button");
        if (button) this.turn(button.dataset.page);
      });
      this.list.addEventListener("keydown", (event) => this.key(event));
      document.addEventListener("keydown", (event) => {
        const typed = event.target.closest?.("input, select, textarea, [contenteditable]");
        if (event.key !== "/" || typed || event.ctrlKey || event.altKey || event.metaKey) return;
        event.preventDefault();
        this.get("search").focus();
      });
      window.addEventListener("hashchange", () => this.follow(location.hash));
    }

    key(event) {
      const node = event.target.closest("article");
      if (!node || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
      const place = Number(node.dataset.place);
      const moves = {
        ArrowDown: () => this.focus(place + 1),
        ArrowUp: () => this.focus(place - 1),
        PageDown: () => this.turn("next"),
        PageUp: () => this.turn("previous"),
        Home: () => this.focus(0),
        End: () => this.focus(this.found.length - 1),
      };
      if (!Object.hasOwn(moves, event.key)) return;
      event.preventDefault();
      moves[event.key]();
    }
  }

  // Set what a select offers; what was chosen stays where it is still offered.
  function options(select, offered) {
    const before = select.value;
    select.replaceChildren(...offered.map(([value, label]) => new Option(label, value)));
    if (offered.some(([value]) => value === before)) select.value = before;
  }

  // A served page has newer samples: take their data, and leave what is being read as it is.
  function take(browser, section) {
    if (!browser) {
      element("samples").replaceWith(document.importNode(section, true));
      return start();
    }
    for (const fresh of section.querySelectorAll('script[type="application/json"]')) {
      const old = element(fresh.id);
      if (old) old.textContent = fresh.textContent;
      else element("samples").append(document.importNode(fresh, true));
    }
    browser.renew();
    return browser;
  }

  async function start() {
    if (!element("samples-index")) return null;
    const browser = new Browser(parsed("samples-index"));
    try {
      if (!(await browser.follow(location.hash))) await browser.open(browser.get("evaluation").value);
    } catch (error) {
      element("samples-status").textContent = `The samples cannot be opened: ${error.message}`;
      throw error;
    }
    browser.get("form").hidden = false;
    performance.mark("samples-ready");
    return browser;
  }

  let running = start();
  document.addEventListener("spin:samples", (event) => {
    if (!event.detail.section) return;
    event.preventDefault();
    running = running.then((browser) => take(browser, event.detail.section));
  });
})();
