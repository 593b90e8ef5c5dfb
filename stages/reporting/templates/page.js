// Theme, and news from a server. Nothing here makes a script or a style of data.
(() => {
  "use strict";

  const root = document.documentElement;
  const KEY = "spin-theme";

  // --- Light and dark -----------------------------------------------------------------------

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const stored = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // a browser that keeps nothing for files
    }
  };
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const label = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Change to ${isDark() ? "light" : "dark"} colours`);
  };
  const chosen = stored();
  if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  label();
  button.hidden = false;
  dark.addEventListener("change", label);
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem(KEY, root.dataset.theme);
    } catch {
      // the choice then holds for this page alone
    }
    label();
  });

  // --- News -------------------------------------------------------------------------------------

  if (document.body.dataset.server !== "live") return;
  const EVERY_MS = 3000;
  const SLOWEST_MS = 30000;
  const status = document.getElementById("live");
  let shown = document.body.dataset.state; // the state of the run that this page tells
  let isLive = false;
  let wait = EVERY_MS;

  const say = (text) => {
    if (status.textContent !== text) status.textContent = text;
  };
  const now = () => new Date().toLocaleTimeString();
  class Refused extends Error {} // the server answers, but has no page

  // What was open stays open, and what was closed closed.
  function keepOpen(from, to) {
    for (const details of from.querySelectorAll("details[id]")) {
      const same = to.querySelector(`#${CSS.escape(details.id)}`);
      if (same) same.open = details.open;
    }
  }

  function takeSection(fresh) {
    const old = document.getElementById(fresh.id);
    if (!old || old.dataset.live === fresh.dataset.live) return false;
    const section = document.importNode(fresh, true);
    keepOpen(old, section);
    const held = old.contains(document.activeElement) ? document.activeElement.id : "";
    old.replaceWith(section);
    if (held) document.getElementById(held)?.focus({ preventScroll: true });
    return true;
  }

  // The samples have a state of their own (what is searched, and where): their script may take the
  // new section itself, by preventDefault; if it does not, the reader is asked.
  function takeSamples(fresh) {
    const digest = fresh.body.dataset.samples;
    if (digest === document.body.dataset.samples) return;
    document.body.dataset.samples = digest;
    const section = fresh.getElementById("samples");
    const event = new CustomEvent("spin:samples", { cancelable: true, detail: { section } });
    if (!document.dispatchEvent(event) || document.getElementById("samples-news")) return;
    const news = document.createElement("button");
    news.id = "samples-news";
    news.type = "button";
    news.textContent = "Show newer samples";
    news.addEventListener("click", () => location.reload());
    status.after(news);
  }

  async function update() {
    const answer = await fetch("/", { cache: "no-store" });
    if (!answer.ok) throw new Refused(answer.statusText);
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    let changed = 0;
    for (const section of fresh.querySelectorAll("section[data-live]")) changed += takeSection(section);
    takeSamples(fresh);
    document.title = fresh.title;
    shown = fresh.body.dataset.state;
    if (changed) say(`Updated at ${now()}`);
    return changed > 0;
  }

  async function look() {
    try {
      const headers = { "If-None-Match": `"${shown}"` };
      const answer = await fetch("/state", { cache: "no-store", headers });
      if (answer.status !== 200 && answer.status !== 304) throw new Refused(answer.statusText);
      const told = answer.status === 200 && (await update());
      if (!told && !isLive) say("Live");
      isLive = true;
      wait = EVERY_MS;
    } catch (error) {
      const why = error instanceof Refused ? "The run cannot be read" : "The server has ended";
      say(`${why}; this is its last page`);
      isLive = false;
      wait = Math.min(2 * wait, SLOWEST_MS);
    }
    setTimeout(look, document.hidden ? SLOWEST_MS : wait);
  }
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) wait = EVERY_MS;
  });
  look();
})();
