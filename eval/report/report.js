// The memory viewer. All text is set as text, never as markup: what a document holds can't become part of the page.
"use strict";
(() => {
  const root = document.getElementById("viewer");
  if (!root) return;
  const { documents, names } = JSON.parse(document.getElementById("readings").textContent);
  const $ = (id) => document.getElementById("v-" + id);
  const state = { d: 0, s: 0, a: "", b: "" };

  const node = (tag, cls, text) => {
    const element = document.createElement(tag);
    if (cls) element.className = cls;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const label = (system) => (Object.hasOwn(names, system) ? names[system] : system);
  const plain = (text) => text.replace(/\s+/g, " ").trim();
  const sentences = (text) => text.split(/(?<=[.!?]["”')\]]?)\s+|\n+/u).map(plain).filter(Boolean);
  const current = () => documents[state.d];
  const systems = (doc) => Object.keys(doc.systems);
  const last = (doc) => doc.sections.length; // the step after the last section: the answer

  // ---- marking what matters in a text

  const letter = /[\p{L}\p{N}]/u;
  function* places(text, part, whole) {
    for (let at = part ? text.indexOf(part) : -1; at >= 0; at = text.indexOf(part, at + part.length)) {
      const end = at + part.length;
      const inside = whole && ((letter.test(part[0]) && at && letter.test(text[at - 1]))
        || (letter.test(part.at(-1)) && end < text.length && letter.test(text[end])));
      if (!inside) yield [at, end];
    }
  }
  function marked(parent, text, doc) {
    const spans = [];
    for (const part of doc.gold) for (const [x, y] of places(text, part, false)) spans.push([x, y, "gold"]);
    for (const part of doc.outdated ?? []) for (const [x, y] of places(text, part, false)) spans.push([x, y, "old"]);
    for (const part of doc.marks) for (const [x, y] of places(text, part, true)) spans.push([x, y, "mark"]);
    for (const part of doc.answers) for (const [x, y] of places(text, part, true)) spans.push([x, y, "hit"]);
    const cuts = [...new Set([0, text.length, ...spans.flatMap(([x, y]) => [x, y])])].sort((x, y) => x - y);
    for (let i = 0; i + 1 < cuts.length; i++) {
      const piece = text.slice(cuts[i], cuts[i + 1]);
      const on = new Set(spans.filter(([x, y]) => x <= cuts[i] && cuts[i + 1] <= y).map((span) => span[2]));
      parent.append(on.size ? node("span", [...on].join(" "), piece) : piece);
    }
    return parent;
  }

  // ---- memories

  // Sentences of `text`, each with whether `other` holds it too; every copy is matched once.
  function against(text, other) {
    const left = new Map();
    for (const s of sentences(other)) left.set(s.toLowerCase(), (left.get(s.toLowerCase()) || 0) + 1);
    return sentences(text).map((s) => {
      const n = left.get(s.toLowerCase()) || 0;
      if (n) left.set(s.toLowerCase(), n - 1);
      return [s, n > 0];
    });
  }
  function list(text, other, cls, doc, nothing) {
    const items = against(text, other);
    if (!items.length) return node("p", "empty", nothing);
    const ul = node("ul", "mem");
    for (const [sentence, kept] of items) {
      const li = node("li", kept ? "kept" : cls);
      li.title = kept ? "kept" : cls;
      li.append(marked(node("span"), sentence, doc));
      ul.append(li);
    }
    return ul;
  }
  function pane(target, system, doc) {
    const reading = doc.systems[system], s = state.s, memories = reading.memories;
    target.replaceChildren(node("h4", "", label(system)));
    if (s < last(doc)) {
      const before = s ? memories[s - 1] ?? "" : "", after = memories[s] ?? "";
      target.append(node("h5", "", s ? "Memory before this section" : "Memory before this section: none yet"));
      if (s) target.append(list(before, after, "dropped", doc, "The memory is empty."));
      target.append(node("h5", "", `Memory after it${s < memories.length ? "" : ": not recorded"}`));
      if (s < memories.length) target.append(list(after, before, "added", doc, "The memory is empty."));
      return;
    }
    const known = reading.correct === 0 || reading.correct === 1;
    target.append(node("h5", "", "Answer, from the last memory alone"), node("p", "answer", reading.answer ?? "no answer"));
    if (known) target.append(node("span", "verdict " + (reading.correct ? "yes" : "no"), reading.correct ? "right" : "wrong"));
    const memory = memories.at(-1) ?? "";
    target.append(node("h5", "", "Last memory"), list(memory, memory, "", doc, "The memory is empty."));
  }

  // ---- the strip of sections, and how many gold sentences each memory holds

  const seen = new WeakMap();
  function golds(doc) { // for each section: the gold sentences it holds
    if (!seen.has(doc)) seen.set(doc, doc.sections.map((text) => doc.gold.filter((g) => text.includes(g))));
    return seen.get(doc);
  }
  function strip(doc) {
    const track = $("track"), rows = golds(doc), n = doc.sections.length;
    const cells = node("div", "cells" + (n > 40 ? " dense" : n > 12 ? " many" : ""));
    rows.forEach((own, i) => {
      const cell = node("button", own.length ? "has" : "", n <= 40 ? String(i + 1) : "");
      cell.title = `section ${i + 1}` + (own.length ? ", with a gold fact" : "");
      cells.append(cell);
    });
    const end = node("button", "", n <= 40 ? "→" : "");
    end.title = "the answer";
    cells.append(end);
    [...cells.children].forEach((cell, i) => {
      cell.type = "button";
      cell.tabIndex = -1; // the arrows step; a tab stop for each of a hundred sections helps no one
      cell.setAttribute("aria-label", cell.title);
      cell.addEventListener("click", () => go({ s: i }));
    });
    const line = (name, content) => { const div = node("div"); div.append(node("span", "", name), content); return div; };
    track.replaceChildren(line("sections", cells));
    for (const system of new Set([state.a, state.b])) {
      const held = node("div", "cells held" + (n > 40 ? " dense" : "")), read = [];
      doc.sections.forEach((_, i) => {
        read.push(...rows[i]);
        const memory = plain(doc.systems[system].memories[i] ?? ""), cell = node("div"), fill = node("i");
        const count = read.filter((g) => memory.includes(plain(g))).length;
        fill.style.height = read.length ? `${(100 * count) / read.length}%` : "0";
        cell.title = `after section ${i + 1}: ${count} of ${read.length} gold facts read so far, word for word`;
        cell.append(fill);
        held.append(cell);
      });
      held.append(node("div"));
      if (doc.gold.length) track.append(line(label(system), held));
    }
  }

  // ---- state, and what shows it

  function options(select, values) {
    select.replaceChildren(...values.map(([value, text]) => {
      const option = node("option", "", text);
      option.value = value;
      return option;
    }));
  }
  let shown = "";
  function show() {
    const doc = current(), n = last(doc), key = [state.d, state.a, state.b].join("\n");
    if (key !== shown) {
      for (const id of ["a", "b"]) {
        options($(id), systems(doc).map((system) => [system, label(system)]));
        $(id).value = state[id];
      }
      $("doc").value = String(state.d);
      $("q").replaceChildren();
      marked($("q"), doc.question, { gold: [], marks: doc.marks, answers: [] });
      $("gold").textContent = doc.answers.join(" · ");
      strip(doc);
      shown = key;
    }
    [...$("track").querySelectorAll("button")].forEach((cell, i) => cell.classList.toggle("on", i === state.s));
    $("where").textContent = state.s < n ? `Section ${state.s + 1} of ${n}` : "After the last section";
    const text = $("text");
    text.replaceChildren();
    if (state.s < n) marked(text, doc.sections[state.s], doc);
    else text.append(node("span", "", "Nothing of the document is in view any more: the answer comes from the memory alone."));
    text.scrollTop = 0;
    pane($("pane-a"), state.a, doc);
    pane($("pane-b"), state.b, doc);
    $("prev").disabled = state.s === 0;
    $("next").disabled = state.s === n;
    $("here").href = link();
  }
  const link = () => "#read/" + [state.d + 1, state.s + 1, state.a, state.b].map(encodeURIComponent).join("/");
  function settle(wanted) { // whatever was asked for, a state that exists
    const whole = (value, most) => Math.min(Math.max(0, Math.trunc(value) || 0), most);
    state.d = whole(wanted.d ?? state.d, documents.length - 1);
    const doc = current(), own = systems(doc);
    state.s = whole(wanted.s ?? state.s, last(doc));
    const usual = [own.includes("base") ? "base" : own[0], own.includes("memtrain") ? "memtrain" : own.at(-1)];
    ["a", "b"].forEach((id, i) => {
      const name = wanted[id] ?? state[id];
      state[id] = own.includes(name) ? name : usual[i];
    });
  }
  function go(wanted) {
    settle(wanted);
    show();
    try { history.replaceState(null, "", link()); } catch { /* a page without an address of its own, as in a preview */ }
  }
  function follow() { // #read/document/step/system/system, counted from 1
    if (!location.hash.startsWith("#read/")) return false;
    let parts;
    try { parts = location.hash.slice(6).split("/").map(decodeURIComponent); } catch { return false; }
    settle({ d: parts[0] - 1, s: parts[1] - 1, a: parts[2], b: parts[3] });
    show();
    root.scrollIntoView({ block: "start" });
    root.focus({ preventScroll: true });
    return true;
  }
  const inView = () => { const r = root.getBoundingClientRect(); return r.top < innerHeight * 0.6 && r.bottom > innerHeight * 0.3; };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    const target = event.target, mine = root.contains(target);
    if (target.closest?.("select, input, textarea, .scroll")) return;
    if (event.key === "Escape" && mine) { document.activeElement.blur(); return; }
    if (!mine && !(inView() && event.key.startsWith("Arrow") && "LeftRight".includes(event.key.slice(5)))) return;
    const step = { ArrowLeft: { s: state.s - 1 }, ArrowRight: { s: state.s + 1 },
      ArrowUp: { d: state.d - 1, s: 0 }, ArrowDown: { d: state.d + 1, s: 0 } }[event.key];
    if (!step) return;
    event.preventDefault();
    if (!mine) root.focus({ preventScroll: true });
    if (step.d === undefined || (step.d >= 0 && step.d < documents.length)) go(step);
  });
  root.addEventListener("click", (event) => { if (!event.target.closest("select, button, a")) root.focus({ preventScroll: true }); });
  $("prev").addEventListener("click", () => go({ s: state.s - 1 }));
  $("next").addEventListener("click", () => go({ s: state.s + 1 }));
  $("doc").addEventListener("change", (event) => go({ d: Number(event.target.value), s: 0 }));
  for (const id of ["a", "b"]) $(id).addEventListener("change", (event) => go({ [id]: event.target.value }));
  addEventListener("hashchange", follow);

  options($("doc"), documents.map((doc, i) => [String(i), `${i + 1}. ${doc.task}${doc.kind && doc.kind !== doc.task ? `, ${doc.kind}` : ""}: ${doc.question}`]));
  settle({});
  if (!follow()) show();
})();
