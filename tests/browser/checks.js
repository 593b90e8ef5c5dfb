// What is checked of any page, in the page: returns a list of what is wrong, one line each.
(() => {
  const wrong = [];
  const all = (selector) => [...document.querySelectorAll(selector)];
  const isShown = (node) => node.checkVisibility({ visibilityProperty: true });
  const name = (node) => {
    const id = node.id ? `#${node.id}` : "";
    const text = (node.textContent || "").trim().slice(0, 40);
    return `${node.tagName.toLowerCase()}${id}.${node.getAttribute("class") || ""} "${text}"`;
  };
  const named = (node) => {
    const ids = (node.getAttribute("aria-labelledby") || "").split(/\s+/).filter(Boolean);
    const labels = ids.map((id) => document.getElementById(id)?.textContent || "");
    labels.push(node.getAttribute("aria-label") || "", ...[...(node.labels || [])].map((l) => l.textContent));
    if (node.matches("a, button, summary")) labels.push(node.textContent);
    if (node.matches("svg")) labels.push(node.querySelector("title")?.textContent || "");
    return labels.join("").trim() !== "";
  };

  // Structure
  if (!document.documentElement.lang) wrong.push("the page has no language");
  if (!document.title.trim()) wrong.push("the page has no title");
  if (all("main").length !== 1) wrong.push("there is not one <main>");
  if (all("h1").length !== 1) wrong.push("there is not one <h1>");
  let level = 0;
  for (const heading of all("h1, h2, h3, h4, h5, h6").filter(isShown)) {
    const next = Number(heading.tagName[1]);
    if (next > level + 1) wrong.push(`heading level ${next} follows ${level}: ${name(heading)}`);
    level = next;
  }
  for (const node of all("a[href], button, input, select, textarea, summary")) {
    if (isShown(node) && !named(node)) wrong.push(`no name: ${name(node)}`);
  }
  for (const node of all("nav, section, [role=region], [role=feed], [role=search]")) {
    if (!named(node)) wrong.push(`no name: ${name(node)}`);
  }
  for (const node of all("svg")) {
    const hidden = node.closest("[aria-hidden=true]");
    if (!hidden && !(node.getAttribute("role") === "img" && named(node))) wrong.push(`no name: ${name(node)}`);
  }
  for (const node of all("table")) {
    if (!node.caption || node.querySelector("th:not([scope])")) wrong.push(`no caption or scope: ${name(node)}`);
  }
  const ids = all("[id]").map((node) => node.id);
  for (const id of new Set(ids.filter((id, i) => ids.indexOf(id) !== i))) wrong.push(`id twice: ${id}`);
  for (const attribute of ["aria-labelledby", "aria-describedby", "aria-controls", "for"]) {
    for (const node of all(`[${attribute}]`)) {
      for (const id of node.getAttribute(attribute).split(/\s+/)) {
        if (!document.getElementById(id)) wrong.push(`${attribute} names no element: ${id}`);
      }
    }
  }
  if (!all("[aria-live], [role=status]").length) wrong.push("nothing is told as it changes");

  // Layout: nothing is wider than the window, and no sample lies on another.
  const page = document.documentElement;
  if (page.scrollWidth > window.innerWidth) wrong.push(`the page is ${page.scrollWidth} wide`);
  for (const node of all(".sample-body")) {
    if (node.scrollWidth > node.clientWidth) wrong.push(`cut off at its side: ${name(node)}`);
  }
  const boxes = all("article").map((node) => node.getBoundingClientRect());
  boxes.slice(1).forEach((box, i) => {
    if (box.top < boxes[i].bottom) wrong.push(`sample ${i + 2} lies on the one before`);
  });

  // Contrast: WCAG AA, of every visible text on what is painted behind it.
  const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
    .getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const rgba = (colour) => {
    if (!known.has(colour)) {
      context.clearRect(0, 0, 1, 1);
      context.fillStyle = colour;
      context.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
      known.set(colour, [r, g, b, a / 255]);
    }
    return known.get(colour);
  };
  const over = (top, below) => top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3]));
  const behind = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || seen.has(node) || !isShown(node)) continue;
    seen.add(node);
    if (node.matches("script, style, noscript, :disabled, :disabled *, option, title")) continue;
    const style = getComputedStyle(node);
    if (style.clipPath !== "none" || node.closest(".visually-hidden, .skip")) continue;
    const ground = behind(node);
    const ink = over(rgba(node.closest("svg") ? style.fill : style.color), ground);
    const [light, dark] = [luminance(ink), luminance(ground)].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) wrong.push(`contrast ${ratio.toFixed(2)}: ${name(node)}`);
  }
  return wrong;
})()
