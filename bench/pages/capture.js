/* Functions called once per node by capture.py; `this` is the DOM node. */
function measure() {
  const isText = this.nodeType === 3;
  const el = isText ? this.parentElement : this;
  if (!el || el.nodeType !== 1) return null;
  /* Without double spaces, and without the letters that icon fonts make up. */
  const clean = (s) => (s || "").replace(/[\uE000-\uF8FF]/g, "").replace(/\s+/g, " ").trim();

  const badges = ".badge, .tag, [class*=badge]";

  function parentOf(e) {
    return e.parentElement || (e.getRootNode().host ?? null);
  }

  function hiddenByStyle(e) {
    const own = getComputedStyle(e);
    if (own.visibility !== "visible" || own.display === "none") return true;
    for (let p = e; p; p = parentOf(p)) {
      if (parseFloat(getComputedStyle(p).opacity) < 0.1) return true;
    }
    return false;
  }

  function union(rects) {
    const some = [...rects].filter((r) => r.width > 0 && r.height > 0);
    if (!some.length) return null;
    return {
      l: Math.min(...some.map((r) => r.left)), t: Math.min(...some.map((r) => r.top)),
      r: Math.max(...some.map((r) => r.right)), b: Math.max(...some.map((r) => r.bottom)),
    };
  }

  function rectOfText(node) {
    const range = node.ownerDocument.createRange();
    range.selectNodeContents(node);
    return union(range.getClientRects());
  }

  function meet(a, b) {
    if (!a || !b) return null;
    const m = { l: Math.max(a.l, b.l), t: Math.max(a.t, b.t), r: Math.min(a.r, b.r), b: Math.min(a.b, b.b) };
    return m.r - m.l >= 1 && m.b - m.t >= 1 ? m : null;
  }

  /* The part of a rectangle its scrolling or clipping ancestors leave. */
  function clipped(rect, e) {
    let position = getComputedStyle(e).position;
    for (let p = parentOf(e); p && rect; p = parentOf(p)) {
      const style = getComputedStyle(p);
      if (position === "fixed") break;
      if (position === "absolute" && style.position === "static") continue;
      if (style.overflowX !== "visible" || style.overflowY !== "visible") {
        if (p !== p.ownerDocument.body && p !== p.ownerDocument.documentElement) {
          const r = p.getBoundingClientRect();
          rect = meet(rect, { l: r.left, t: r.top, r: r.right, b: r.bottom });
        }
      }
      position = style.position;
    }
    const win = e.ownerDocument.defaultView;
    return meet(rect, { l: 0, t: 0, r: win.innerWidth, b: win.innerHeight });
  }

  /* A hidden checkbox or radio is drawn by its neighbour: find that drawing. */
  function drawnBox(input) {
    const label = (input.labels && input.labels[0]) || null;
    const next = input.nextElementSibling;
    for (const e of [next, label]) {
      if (!e) continue;
      const before = getComputedStyle(e, "::before");
      const w = parseFloat(before.width), h = parseFloat(before.height);
      if (before.content !== "none" && before.position === "absolute" && w >= 8 && w <= 64 && h >= 8) {
        const r = e.getBoundingClientRect();
        const knob = e === next && r.width <= 80 && r.height <= 48 && !clean(e.innerText);
        if (knob) return { l: r.left, t: r.top, r: r.right, b: r.bottom }; // a switch
        const bw = (s) => parseFloat(getComputedStyle(e)[s]) || 0;
        const px = (v) => parseFloat(v) || 0;
        const l = r.left + bw("borderLeftWidth") + px(before.left) + px(before.marginLeft);
        const t = r.top + bw("borderTopWidth") + px(before.top) + px(before.marginTop);
        return { l, t, r: l + w, b: t + h };
      }
    }
    if (next && next.tagName !== "LABEL") {
      const icon = next.querySelector("i, svg") || next;
      const r = (clean(next.innerText) ? next : icon).getBoundingClientRect();
      if (r.width >= 8 && r.height >= 8) return { l: r.left, t: r.top, r: r.right, b: r.bottom };
    }
    if (label) {
      const icon = [...label.querySelectorAll("span, i")].find((e) => {
        const r = e.getBoundingClientRect();
        return !clean(e.innerText) && r.width >= 8 && r.width <= 40 && r.height >= 8;
      });
      const r = (icon || label).getBoundingClientRect();
      if (!label.contains(input)) return { l: r.left, t: r.top, r: r.right, b: r.bottom };
    }
    const shell = input.parentElement.getBoundingClientRect();
    if (shell.width >= 8 && shell.width <= 80 && shell.height >= 8 && shell.height <= 64) {
      return { l: shell.left, t: shell.top, r: shell.right, b: shell.bottom };
    }
    return null;
  }

  function opaque(e) {
    const style = getComputedStyle(e);
    for (let p = e; p; p = parentOf(p)) {
      if (parseFloat(getComputedStyle(p).opacity) < 0.9) return false;
    }
    if (["IMG", "CANVAS", "VIDEO", "IFRAME"].includes(e.tagName)) return true;
    if (style.backgroundImage !== "none" && style.backgroundImage.startsWith("url")) return true;
    const m = style.backgroundColor.match(/rgba?\(([^)]+)\)/);
    const parts = m ? m[1].split(/[ ,/]+/).map(Number) : [0, 0, 0, 0];
    return parts.length < 4 || parts[3] > 0.9;
  }

  /* Whether an element in front changes nothing of what is seen behind it. */
  function clear(e) {
    const style = getComputedStyle(e);
    for (let p = e; p; p = parentOf(p)) {
      if (parseFloat(getComputedStyle(p).opacity) < 0.05) return true;
    }
    const paint = style.backgroundColor.match(/rgba\(.*, ?0\)$/) || style.backgroundColor === "transparent";
    return !!paint && style.backgroundImage === "none" && !e.ownerSVGElement;
  }

  function related(e, other) {
    if (other === e || other.contains(e) || e.contains(other)) return true;
    if (e.labels) for (const lab of e.labels) if (lab === other || lab.contains(other)) return true;
    const next = e.nextElementSibling;
    const input = e.tagName === "INPUT" && ["checkbox", "radio", "file"].includes(e.type);
    return !!(input && next && (next === other || next.contains(other)));
  }

  /* own: reached by a click there; part: hidden at a corner; dimmed: seen through a veil;
     covered: not seen. */
  function hit(e, x, y) {
    const root = e.getRootNode().elementsFromPoint ? e.getRootNode() : e.ownerDocument;
    let state = "own";
    for (const other of root.elementsFromPoint(x, y)) {
      if (related(e, other)) break;
      if (opaque(other)) return "covered";
      if (!clear(other)) state = "dimmed";
    }
    return state;
  }

  function worst(a, b) {
    const order = ["own", "part", "dimmed", "covered"];
    return order[Math.max(order.indexOf(a), order.indexOf(b))];
  }

  /* The middle of a rectangle decides; something in front of a corner counts as a veil. */
  function seenAt(e, r) {
    const middle = hit(e, (r.l + r.r) / 2, (r.t + r.b) / 2);
    if (middle !== "own") return middle;
    const px = [r.l + 0.12 * (r.r - r.l), r.r - 0.12 * (r.r - r.l)];
    const py = [r.t + 0.2 * (r.b - r.t), r.b - 0.2 * (r.b - r.t)];
    return px.every((x) => py.every((y) => hit(e, x, y) === "own")) ? "own" : "part";
  }

  /* Move a rectangle out of nested frames into the window of the page. */
  function toPage(rect, e) {
    let state = rect ? seenAt(e, rect) : "covered";
    let win = e.ownerDocument.defaultView;
    while (rect && win.frameElement) {
      const frame = win.frameElement;
      if (hiddenByStyle(frame)) return { rect: null, state: "covered" };
      const r = frame.getBoundingClientRect();
      const dx = r.left + frame.clientLeft, dy = r.top + frame.clientTop;
      rect = clipped({ l: rect.l + dx, t: rect.t + dy, r: rect.r + dx, b: rect.b + dy }, frame);
      if (rect) state = worst(state, hit(frame, (rect.l + rect.r) / 2, (rect.t + rect.b) / 2));
      win = win.parent;
    }
    return { rect, state };
  }

  function visibleText(e) {
    return e && !hiddenByStyle(e) && e.getClientRects().length ? clean(e.innerText) : "";
  }

  /* What a person would call a form control, and where that name comes from. */
  function labelOf(e) {
    for (const lab of e.labels || []) {
      const said = visibleText(lab);
      if (said) return [said, "label"];
    }
    const ids = (e.getAttribute("aria-labelledby") || "").split(/\s+/).filter(Boolean);
    const said = clean(ids.map((i) => visibleText(e.getRootNode().getElementById(i))).join(" "));
    if (said) return [said, "labelledby"];
    const near = ["checkbox", "radio"].includes(e.type) ? "" : nearLabel(e);
    if (near) return [near, "near"];
    if (clean(e.placeholder) && !e.value) return [clean(e.placeholder), "placeholder"];
    if (clean(e.getAttribute("aria-label"))) return [clean(e.getAttribute("aria-label")), "aria"];
    return ["", ""];
  }

  /* A label of the same group which stands before the control and is not another's. */
  function nearLabel(e) {
    const marks = "label, .form-label, .control-label, .col-form-label, .layui-form-label";
    const controls = "input:not([type=hidden]), select, textarea, [contenteditable=true], [role=combobox]";
    for (let p = e.parentElement, up = 0; p && up < 4; p = p.parentElement, up += 1) {
      const before = [...p.querySelectorAll(marks)].filter((m) =>
        !m.contains(e) && !m.querySelector("input, select, textarea") && !m.control && visibleText(m) &&
        (m.compareDocumentPosition(e) & Node.DOCUMENT_POSITION_FOLLOWING));
      if (!before.length) continue;
      const lab = before[before.length - 1];
      const after = (a, b) => a.compareDocumentPosition(b) & Node.DOCUMENT_POSITION_FOLLOWING;
      const next = [...p.querySelectorAll(marks)].find((m) => m !== lab && after(e, m));
      const mine = [...p.querySelectorAll(controls)].filter((c) =>
        c.getClientRects().length && after(lab, c) && !(next && after(next, c)));
      return mine.length === 1 && mine[0] === e ? visibleText(lab) : "";
    }
    return "";
  }

  const control = ["INPUT", "SELECT", "TEXTAREA"].includes(el.tagName) && !isText;
  const tick = control && ["checkbox", "radio"].includes(el.type);
  let raw = isText ? rectOfText(this) : union(el.getClientRects());
  let hidden = hiddenByStyle(el);
  if (tick && (hidden || !raw || raw.r - raw.l < 2)) {
    const drawn = el.parentElement && !hiddenByStyle(el.parentElement) ? drawnBox(el) : null;
    hidden = !drawn;
    raw = drawn;
  }
  if (control && !tick && raw && raw.r - raw.l < 24) {
    raw = union(el.parentElement.getClientRects()); // a growing input in a drawn shell
  }
  if (hidden || !raw) return null;
  const seen = toPage(clipped(raw, el), el);
  if (!seen.rect || seen.state === "covered") return null;

  function asBox(r) { return [r.l, r.t, r.r - r.l, r.b - r.t]; }

  /* Where the letters of an element are. */
  function textBox() {
    const walker = el.ownerDocument.createTreeWalker(el, NodeFilter.SHOW_TEXT);
    const rects = [];
    while (walker.nextNode()) {
      const node = walker.currentNode;
      const counter = el.tagName === "A" && node.parentElement.closest(badges);
      if (clean(node.data) && !counter && !hiddenByStyle(node.parentElement)) {
        const r = rectOfText(node);
        if (r) rects.push({ left: r.l, top: r.t, right: r.r, bottom: r.b, width: r.r - r.l, height: r.b - r.t });
      }
    }
    const all = union(rects);
    const moved = all && toPage(clipped(all, el), el);
    return moved && moved.rect && moved.state === "own" ? asBox(moved.rect) : null;
  }

  /* Boxes of close wrappers which hold nothing but this element. */
  function wrappers() {
    const out = [];
    const own = clean(el.innerText);
    for (let p = el.parentElement; p && out.length < 3; p = p.parentElement) {
      if (!["LI", "TD", "TH", "SPAN", "DIV", "H1", "H2", "H3", "H4", "H5"].includes(p.tagName)) break;
      if (clean(p.innerText) !== own) break;
      const moved = toPage(clipped(union(p.getClientRects()), p), p).rect;
      if (moved) out.push(asBox(moved));
    }
    return out;
  }

  /* The text of a link or button without the little counters at its end. */
  function bare() {
    let text = clean(el.innerText);
    for (const badge of el.querySelectorAll(badges)) {
      const said = clean(badge.innerText);
      if (said && text.endsWith(said)) text = clean(text.slice(0, -said.length));
    }
    return text;
  }

  /* The drawn frame around a borderless input, with its small buttons. */
  function shells() {
    const edge = (e) => parseFloat(getComputedStyle(e).borderBottomWidth) >= 1;
    const shell = el.parentElement;
    if (!control || tick || edge(el) || !edge(shell)) return [];
    if (shell.querySelectorAll("input, select, textarea").length !== 1) return [];
    const r = shell.getBoundingClientRect();
    const moved = toPage(clipped({ l: r.left, t: r.top, r: r.right, b: r.bottom }, shell), shell).rect;
    return moved && r.height < 100 ? [asBox(moved)] : [];
  }

  /* Whether a text is all that its block says, and not a piece of a sentence. */
  function alone() {
    let block = el;
    while (block.parentElement && getComputedStyle(block).display === "inline") block = block.parentElement;
    return clean(block.innerText).toLowerCase() === clean(this.data).toLowerCase();
  }

  const style = getComputedStyle(el);
  const area = (r) => (r.r - r.l) * (r.b - r.t);
  const role = isText ? "" : el.getAttribute("role") || "";
  let [label, labelFrom] = control || el.isContentEditable || role === "combobox" ? labelOf(el) : ["", ""];
  if (!control && ["checkbox", "radio", "switch"].includes(role)) [label, labelFrom] = [clean(el.innerText), "own"];
  const letters = isText ? asBox(seen.rect) : textBox();
  const pitch = Math.max(1, parseFloat(style.lineHeight) || parseFloat(style.fontSize) * 1.2);
  return {
    tag: el.tagName.toLowerCase(),
    type: el.getAttribute("type") || "",
    cls: typeof el.className === "string" ? el.className : "",
    box: asBox(seen.rect),
    whole: area(seen.rect) >= 0.98 * area(raw) || el.ownerDocument !== document,
    seen: seen.state,
    text: isText ? clean(this.data) : clean(el.innerText),
    bare: isText ? clean(this.data) : bare(),
    textBox: letters,
    wrappers: ["A", "BUTTON"].includes(el.tagName) && !isText ? wrappers() : shells(),
    alone: !isText || alone.call(this),
    lines: letters ? Math.max(1, Math.round(letters[3] / pitch)) : 0,
    cut: style.textOverflow === "ellipsis" && el.scrollWidth > el.clientWidth + 1,
    clickable: style.cursor === "pointer",
    label, labelFrom,
    placeholder: clean(el.placeholder),
    value: control && !tick && el.type !== "password"
      ? clean(el.tagName === "SELECT" ? [...el.selectedOptions].map((o) => o.label).join(", ") : el.value) : "",
  };
}
