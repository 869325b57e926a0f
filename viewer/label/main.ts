// Assembles the label page: one history of states, the class in view, and an update of everything that depends on them.

import { type Child, count, el, save } from "../src/dom";
import { ask, showKeys } from "./dialogs";
import { read, stateOf, write } from "./file";
import { load, Saver, type Stored } from "./saving";
import * as states from "./state";
import { type Entry, type Filter, History, LEFT_OUT, NOT_SURE, type State, type Status, statusOf } from "./state";

interface ClassData {
  id: string;
  name: string;
  wordnet?: { id: string; names: string; gloss: string; above: string[] };
  answers?: string;
}

interface PageData {
  version: string;
  source: string;
  file: string;
  text: string;
  served: boolean;
  first: number;
  classes: ClassData[];
  suggested: Record<string, string>;
  /** How many pictures a class has on the server, or the pictures; null is one that cannot be read. */
  pictures?: number[] | (string | null)[][];
  /** What a model takes pictures for, by class and picture. */
  taken: Record<string, Record<string, string>>;
}

const MORE = 24;
const ABOVE = 6;
const STATUS: Record<Status, [string, string]> = { open: ["\u25cb", "open"], grouped: ["\u25cf", "in a group"], unsure: ["?", NOT_SURE], out: ["\u2013", LEFT_OUT] };
const KEYS: [string, string][] = [
  ["1\u20139", "put the class into a group, and go to the next open one"],
  ["Enter", "take the suggestion"],
  ["g", "another group, or a new one"],
  ["s", "not sure: leave the class out for now"],
  ["x", "leave the class out"],
  ["0", "open the class again"],
  ["n", "edit its name"],
  ["p", "more pictures"],
  ["\u2191 \u2193", "the class before or after (k, j)"],
  ["o", "the next open class"],
  ["/", "find classes by id, name, group or WordNet"],
  ["f", "show all, open, not sure or left out"],
  ["r", "rename the group of the class"],
  ["m", "merge the group of the class into another"],
  ["a", "take all suggestions for open classes"],
  ["z", "undo"],
  ["y", "redo"],
  ["e", "save the label file as a download"],
  ["?", "these keys"],
];

const page: PageData = JSON.parse(document.getElementById("data")!.textContent!);
const known = new Map(page.classes.map((one) => [one.id, one]));
const names = new Map(page.classes.map((one) => [one.id, one.name]));
const numbers = new Map(page.classes.map((one, number) => [one.id, number]));

/** The text that was read last, which keeps its comments and other entries. */
let base = page.text;
let current: string | null = page.classes[0]?.id ?? null;
let filter: Filter = "all";
let saver: Saver | null = null;
let exported = true;
let problem = "";
let history = new History(begun());
const shownPictures = new Map<string, number>();

function begin(text: string): State {
  const file = read(text);
  const unknown = [...file.given.keys()].filter((id) => !known.has(id));
  if (unknown.length) throw new Error(`it names ${unknown.length} classes that the images lack, such as ${unknown[0]}`);
  return states.withSuggestions(stateOf(file, names), page.suggested);
}

/** What the page starts from; nothing, if its label file is written as only other programs read it. */
function begun(): State {
  try {
    return begin(base);
  } catch (error) {
    problem = (error as Error).message;
    base = "groups: {}\n";
    return begin(base);
  }
}

const root = document.getElementById("page")!;
const bar = el("div", { class: "bar", "aria-hidden": "true" });
const progress = el("p", { id: "progress", class: "note" });
const saved = el("p", { id: "saved", class: "note", role: "status" });
const said = el("p", { id: "said", role: "status", "aria-live": "polite" });
const alarm = el("div", { id: "alarm", role: "alert" });
const search = el("input", { type: "search", id: "search", placeholder: "find", "aria-label": "find classes", autocomplete: "off" });
const filters = el("select", { id: "filter", "aria-label": "show" });
const list = el("ul", { id: "classes" });
const sheet = el("section", { id: "sheet", "aria-label": "class" });
const groupList = el("aside", { id: "groups", "aria-label": "groups" });
const footer = el("footer");
const rows = new Map<string, { row: HTMLLIElement; status: HTMLElement; name: HTMLElement; group: HTMLElement; drawn?: Entry }>();

const state = (): State => history.present;
const entryOf = (id: string) => state().classes.get(id)!;
const also = (id: string) => `${known.get(id)?.wordnet?.names ?? ""} ${known.get(id)?.wordnet?.above.join(" ") ?? ""}`;
const visible = (id: string) => states.matches(id, entryOf(id), also(id), filter, search.value.trim());
const ids = () => [...state().classes.keys()];
const isOpen = (id: string) => statusOf(entryOf(id)) === "open";

/** Go on to another state, say what was done, and save it. */
function act(next: State, told: string): boolean {
  if (!history.do(next)) return false;
  said.textContent = told;
  keep();
  return true;
}

function keep(): void {
  if (saver) {
    saved.textContent = "saving";
    void saver.save(write(base, state()));
  } else exported = false;
}

/** Decide on the class in view, and go to the next one: while there are open ones, to the next of these. */
function decide(next: State, told: string): void {
  if (current === null) return;
  const wasOpen = isOpen(current);
  if (!act(next, `${entryOf(current).name}: ${told}`)) return;
  const open = states.nextOf(ids(), current, (id) => isOpen(id) && (filter === "open" || visible(id)));
  const after = states.nextOf(ids(), current, visible);
  if (wasOpen && open) current = open;
  else if (!wasOpen && after && ids().indexOf(after) > ids().indexOf(current)) current = after;
  else if (states.countsOf(state()).open === 0) said.textContent += ". All classes are decided.";
  update(true);
}

function back(move: () => boolean, told: string): void {
  const before = state();
  if (!move()) return;
  current = ids().find((id) => JSON.stringify(before.classes.get(id)) !== JSON.stringify(entryOf(id))) ?? current;
  said.textContent = told;
  keep();
  update(true);
}

function go(id: string | null): void {
  if (id === null) return;
  current = id;
  update(true);
}

function step(by: number): void {
  const all = ids().filter((id) => visible(id) || id === current);
  go(all[Math.min(all.length - 1, Math.max(0, all.indexOf(current ?? "") + by))] ?? null);
}

const put = (group: string) => current !== null && decide(states.assign(state(), current, group), group);

function accept(): void {
  const group = current === null ? undefined : state().suggested.get(current);
  if (current !== null && group !== undefined && isOpen(current)) put(group);
}

function acceptAll(): void {
  const { open } = states.countsOf(state());
  if (act(states.acceptAll(state()), "")) {
    said.textContent = `${open - states.countsOf(state()).open} suggestions taken (z undoes)`;
    update();
  }
}

function chooseGroup(): void {
  if (current === null) return;
  ask({ title: `Group of ${entryOf(current).name}`, options: [...state().groups], fresh: (text) => `new group: ${text}` }, put);
}

function rename(group: string): void {
  const others = state().groups.filter((one) => one !== group);
  ask({ title: `Rename ${group}`, options: others, fresh: (text) => `rename to ${text}`, freshFirst: true, start: group }, (text) => regroup(group, text));
}

function merge(group: string): void {
  ask({ title: `Merge ${group} into`, options: state().groups.filter((one) => one !== group) }, (text) => regroup(group, text));
}

function regroup(from: string, to: string): void {
  const merged = state().groups.includes(to);
  if (!act(states.renameGroup(state(), from, to), merged ? `${from} merged into ${to} (z undoes)` : `${from} is now ${to}`)) return;
  if (filter === `group:${from}`) filter = `group:${to}`;
  update();
}

function download(): void {
  save(page.file, new Blob([write(base, state())], { type: "application/yaml" }));
  exported = true;
  said.textContent = `${page.file} is in your downloads`;
  update();
}

async function importFile(file: File): Promise<void> {
  try {
    const text = await file.text();
    const next = begin(text);
    base = text;
    act(next, `${file.name} was read (z undoes)`);
    update();
  } catch (error) {
    said.textContent = `${file.name} was not read: ${(error as Error).message}`;
  }
}

/** Go on from what somebody else wrote. */
function adopt(stored: Stored, told: string): void {
  const next = begin(stored.text);
  base = stored.text;
  saver!.settle(stored.tag);
  history.do(next);
  alarm.replaceChildren();
  said.textContent = told;
  saved.textContent = `${page.file} is up to date`;
  update();
}

async function takeTheirs(): Promise<void> {
  try {
    adopt(await load(), `${page.file} was read again (z goes back to yours)`);
  } catch (error) {
    fail((error as Error).message, () => void takeTheirs());
  }
}

/** Write what this page holds over what somebody else wrote, but keep their comments and other entries. */
async function writeMine(): Promise<void> {
  try {
    const stored = await load();
    read(stored.text);
    base = stored.text;
    saver!.settle(stored.tag);
    alarm.replaceChildren();
    keep();
  } catch (error) {
    fail((error as Error).message, () => void writeMine());
  }
}

function button(text: string, key: string, does: () => void, more: Record<string, string> = {}): HTMLButtonElement {
  const made = el("button", { type: "button", ...more }, text, key ? el("kbd", { "aria-hidden": "true" }, key) : null);
  if (key) made.setAttribute("aria-keyshortcuts", key);
  made.addEventListener("click", (event) => {
    // A key pressed after a click of the mouse is for the page, not for the button.
    if (event.detail > 0) made.blur();
    does();
  });
  return made;
}

function fail(told: string, again: () => void): void {
  saved.textContent = "not saved";
  alarm.replaceChildren(el("p", {}, `${page.file} is not saved: ${told}`), button("Try again", "", again), button("Download it", "", download));
}

function conflict(): void {
  saved.textContent = "not saved";
  alarm.replaceChildren(
    el("p", {}, `${page.file} was changed elsewhere since this page read it. What you changed last is not saved.`),
    button("Take their version", "", () => void takeTheirs()),
    button("Write mine over it", "", () => void writeMine()),
    button("Download mine", "", download),
  );
}

function pictureOf(number: number, at: number): string | null {
  const own = page.pictures![number];
  return typeof own === "number" ? `pictures/${number}-${at}.jpg` : own[at];
}

function drawPictures(id: string): Child[] {
  if (!page.pictures) return [el("p", { class: "note" }, "This page shows no pictures.")];
  const number = numbers.get(id)!;
  const own = page.pictures[number];
  const total = typeof own === "number" ? own : own.length;
  const shown = Math.min(total, shownPictures.get(id) ?? page.first);
  const figures = Array.from({ length: shown }, (_, at) => {
    const source = pictureOf(number, at);
    const taken = page.taken[number]?.[at];
    const missing = () => el("span", { class: "missing" }, "cannot be read");
    const image = source === null ? missing() : el("img", { src: source, alt: `picture ${at + 1}`, loading: "lazy", decoding: "async" });
    image.addEventListener("error", () => image.replaceWith(missing()));
    return el("figure", taken === undefined ? {} : { class: "odd" }, image, taken === undefined ? null : el("figcaption", {}, `taken for ${taken}`));
  });
  const rest = total - shown;
  const told = `${count(shown)} of ${count(total)} pictures`;
  const more = rest > 0 ? button(`${Math.min(MORE, rest)} more`, "p", morePictures, { id: "more" }) : null;
  return [el("div", { class: "pictures", id: "pictures" }, ...figures), el("p", { class: "note" }, page.served ? `${told} ` : `${count(shown)} pictures`, more)];
}

function morePictures(): void {
  if (current === null || !page.pictures) return;
  shownPictures.set(current, (shownPictures.get(current) ?? page.first) + MORE);
  update();
}

function drawSheet(): void {
  const id = current;
  if (id === null) return sheet.replaceChildren(el("p", {}, "There are no classes."));
  const entry = entryOf(id);
  const { wordnet, answers } = known.get(id)!;
  const status = statusOf(entry);
  const input = el("input", { type: "text", id: "name", "aria-label": "name", maxlength: "200", spellcheck: "false", autocomplete: "off" });
  input.value = entry.name;
  input.addEventListener("change", () => {
    const text = states.clean(input.value) || names.get(id)!;
    if (text !== entryOf(id).name) act(states.name(state(), id, text), `${id} is now called ${text}`);
    update();
  });
  const suggestion = status === "open" ? state().suggested.get(id) : undefined;
  const chips = state().groups.map((group, at) => {
    const chosen = entry.group === group;
    const made = button(group, at < 9 ? String(at + 1) : "", () => put(group), { id: `put-${at}`, "aria-pressed": String(chosen) });
    made.className = chosen ? "chosen" : group === suggestion ? "suggested" : "";
    return made;
  });
  const marks: Child[] = [
    button("other group", "g", chooseGroup, { id: "other", class: "quiet" }),
    button(NOT_SURE, "s", unsure, { id: "unsure", class: "quiet", "aria-pressed": String(status === "unsure") }),
    button("leave out", "x", leaveOut, { id: "out", class: "quiet", "aria-pressed": String(status === "out") }),
    status === "open" ? null : button("open again", "0", reopen, { id: "reopen", class: "quiet" }),
  ];
  let reason: Child = null;
  if (status === "out") {
    const why = el("input", { type: "text", id: "why", maxlength: "200", autocomplete: "off" });
    why.value = entry.out!;
    why.addEventListener("change", () => {
      act(states.leaveOut(state(), id, states.clean(why.value) || LEFT_OUT), `${entry.name}: left out`);
      update();
    });
    reason = el("label", { class: "why" }, "Left out because ", why);
  }
  const at = ids().indexOf(id);
  sheet.replaceChildren(
    el("div", { class: "where" }, button("\u2191", "", () => step(-1), { id: "before", "aria-label": "class before", class: "quiet" }), button("\u2193", "", () => step(1), { id: "after", "aria-label": "class after", class: "quiet" }), el("span", { class: "note" }, `${count(at + 1)} of ${count(names.size)}`), el("code", {}, id), el("span", { class: `status ${status}` }, STATUS[status][0], " ", status === "grouped" ? entry.group : STATUS[status][1])),
    el("label", { class: "name" }, el("kbd", { "aria-hidden": "true" }, "n"), input),
    ...(wordnet
      ? [
          el("p", { class: "gloss" }, el("strong", {}, wordnet.names), wordnet.gloss ? `: ${wordnet.gloss}` : null, wordnet.id === id ? null : el("code", {}, wordnet.id)),
          el("p", { class: "note above" }, ["", ...wordnet.above.slice(-ABOVE)].slice(wordnet.above.length > ABOVE ? 0 : 1).map((one) => one || "\u2026").join(" \u203a ")),
        ]
      : []),
    ...(answers ? [el("p", { class: "note" }, `The model answers: ${answers}`)] : []),
    ...(suggestion === undefined ? [] : [el("p", {}, "WordNet suggests ", el("strong", {}, suggestion), ": ", el("kbd", {}, "Enter"), " takes it")]),
    el("div", { class: "chips", role: "group", "aria-label": "group" }, ...chips),
    el("div", { class: "chips" }, ...marks),
    ...(reason ? [reason] : []),
    ...drawPictures(id).filter((one): one is Node => one instanceof Node),
  );
}

const unsure = () => current !== null && decide(states.leaveOut(state(), current, NOT_SURE), NOT_SURE);
const leaveOut = () => current !== null && decide(states.leaveOut(state(), current, LEFT_OUT), LEFT_OUT);

function reopen(): void {
  if (current !== null && !isOpen(current) && act(states.reopen(state(), current), `${entryOf(current).name}: open again`)) update();
}

function drawGroups(): void {
  const { groups, suggested } = state();
  const waiting = [...suggested.keys()].filter(isOpen).length;
  const items = groups.map((group, at) => {
    const members = states.membersOf(state(), group);
    const tools = [
      button("rename", "", () => rename(group), { id: `rename-${at}`, class: "link", "aria-label": `rename ${group}` }),
      groups.length > 1 ? button("merge", "", () => merge(group), { id: `merge-${at}`, class: "link", "aria-label": `merge ${group} into another` }) : null,
      members.length
        ? button("show", "", () => showOnly(`group:${group}`), { id: `show-${at}`, class: "link", "aria-label": `show ${group}` })
        : button("remove", "", () => act(states.dropGroup(state(), group), `${group} is gone`) && update(), { id: `drop-${at}`, class: "link", "aria-label": `remove ${group}` }),
    ];
    return el("li", {}, el("kbd", {}, at < 9 ? String(at + 1) : "\u00b7"), el("div", {}, el("strong", {}, group), el("span", { class: "note" }, ` ${count(members.length)}`), el("div", { class: "tools" }, ...tools)));
  });
  groupList.replaceChildren(
    el("h2", {}, "Groups"),
    items.length ? el("ol", {}, ...items) : el("p", { class: "note" }, "There are none yet: press g, and type a name."),
    ...(waiting ? [button(`take all ${count(waiting)} suggestions`, "a", acceptAll, { id: "take" })] : []),
  );
}

function showOnly(wanted: Filter): void {
  filter = wanted;
  if (current === null || !visible(current)) current = ids().find(visible) ?? current;
  said.textContent = `${count(ids().filter(visible).length)} classes shown`;
  update(true);
}

function drawList(follow: boolean): void {
  let hidden = 0;
  for (const [id, entry] of state().classes) {
    const own = rows.get(id)!;
    const { row, status, name, group } = own;
    const seen = visible(id);
    hidden += Number(!seen);
    row.hidden = !seen && id !== current;
    if (id === current) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
    if (own.drawn === entry) continue;
    own.drawn = entry;
    row.className = statusOf(entry);
    const [mark, told] = STATUS[statusOf(entry)];
    status.textContent = mark;
    status.title = told;
    name.textContent = entry.name;
    group.textContent = entry.group ?? entry.out ?? "";
  }
  const options: [Filter, string][] = [["all", "all classes"], ["open", "open"], ["unsure", NOT_SURE], ["out", LEFT_OUT], ...state().groups.map((one): [Filter, string] => [`group:${one}`, one])];
  filters.replaceChildren(...options.map(([value, text]) => el("option", { value }, text)));
  if (!options.some(([value]) => value === filter)) filter = "all";
  filters.value = filter;
  if (follow && current !== null) {
    // Within the list alone: the page stays where it is.
    const { row } = rows.get(current)!;
    const top = row.offsetTop - list.offsetTop;
    list.scrollTop = Math.max(Math.min(list.scrollTop, top - row.offsetHeight), top + 2 * row.offsetHeight - list.clientHeight);
  }
  list.title = hidden ? `${count(hidden)} classes are hidden` : "";
}

/** Everything that changes with the state or the class in view. */
function update(follow = false): void {
  const focused = document.activeElement?.id;
  const { open, grouped, unsure, out } = states.countsOf(state());
  const parts: [string, number][] = [["grouped", grouped], ["unsure", unsure], ["out", out], ["open", open]];
  bar.replaceChildren(...parts.filter(([, number]) => number).map(([kind, number]) => {
    const part = el("span", { class: kind });
    part.style.flexGrow = String(number);
    return part;
  }));
  progress.textContent = `${count(names.size - open)} of ${count(names.size)} classes decided: ${count(grouped)} in groups, ${count(unsure)} not sure, ${count(out)} left out`;
  if (!saver) {
    const used = new Set([...state().classes.values()].map((one) => one.group).filter((one) => one !== null));
    saved.textContent = exported ? "" : used.size < 2 ? "not saved; a task needs two groups" : "not saved: e saves the label file";
  }
  const { rest } = read(base);
  footer.textContent = `Made by vitcut ${page.version}. ${rest === null ? "Open classes are not in the label file, and a task ignores them" : `Open classes are of the group ${rest}`}. Press ? for the keys.`;
  drawList(follow);
  drawSheet();
  drawGroups();
  const again = focused ? document.getElementById(focused) : null;
  if (again && again !== document.activeElement) again.focus({ preventScroll: true });
}

function onKey(event: KeyboardEvent): void {
  const target = event.target as HTMLElement;
  const typing = target instanceof HTMLInputElement || target instanceof HTMLSelectElement;
  if (document.querySelector("dialog[open]") || event.isComposing) return;
  if (typing && (event.key === "Enter" || event.key === "Escape")) {
    event.preventDefault();
    if (event.key === "Escape" && target.id === "name" && current !== null) (target as HTMLInputElement).value = entryOf(current).name;
    if (event.key === "Escape" && target === search) search.value = "";
    if (target === search && current !== null && !visible(current)) current = ids().find(visible) ?? current;
    target.blur();
    update(true);
    return;
  }
  if (typing || event.altKey) return;
  const key = event.ctrlKey || event.metaKey ? `mod-${event.key.toLowerCase()}` : event.key;
  if (key === "Enter" && target instanceof HTMLButtonElement) return;
  const own = current === null ? null : entryOf(current).group;
  const keys: Record<string, () => void> = {
    Enter: accept, g: chooseGroup, s: unsure, x: leaveOut, 0: reopen, p: morePictures, a: acceptAll, e: download,
    n: () => document.querySelector<HTMLInputElement>("#name")?.select(),
    ArrowUp: () => step(-1), k: () => step(-1), ArrowDown: () => step(1), j: () => step(1),
    o: () => go(states.nextOf(ids(), current, isOpen)),
    "/": () => search.select(),
    f: () => { const order: Filter[] = ["all", "open", "unsure", "out"]; showOnly(order[(order.indexOf(filter) + 1) % 4]); },
    r: () => { if (own !== null) rename(own); },
    m: () => { if (own !== null && state().groups.length > 1) merge(own); },
    z: () => back(history.undo, "undone"), "mod-z": () => back(event.shiftKey ? history.redo : history.undo, event.shiftKey ? "done again" : "undone"),
    y: () => back(history.redo, "done again"), Z: () => back(history.redo, "done again"), "mod-y": () => back(history.redo, "done again"),
    "?": () => showKeys(KEYS),
  };
  const group = /^[1-9]$/.test(key) ? state().groups[Number(key) - 1] : undefined;
  const does = group === undefined ? keys[key] : () => put(group);
  if (!Object.hasOwn(keys, key) && group === undefined) return;
  event.preventDefault();
  does();
}

function build(): void {
  for (const [id] of state().classes) {
    const [status, name, group] = [el("span", { class: "mark" }), el("span", { class: "called" }), el("span", { class: "note" })];
    const row = el("li", {}, el("button", { type: "button", tabindex: "-1" }, status, name, group));
    row.addEventListener("click", () => go(id));
    rows.set(id, { row, status, name, group });
  }
  list.append(...[...rows.values()].map((one) => one.row));
  const file = el("input", { type: "file", id: "file", accept: ".yaml,.yml", hidden: "" });
  file.addEventListener("change", () => {
    const [chosen] = file.files ?? [];
    if (chosen) void importFile(chosen).then(() => (file.value = ""));
  });
  search.addEventListener("input", () => drawList(false));
  filters.addEventListener("change", () => {
    filters.blur();
    showOnly(filters.value as Filter);
  });
  root.replaceChildren(
    el("header", {},
      el("div", {}, el("p", { class: "eyebrow" }, `${page.source} \u2192 ${page.file}`), el("h1", {}, "What are these classes?")),
      el("div", { class: "tools" },
        button("undo", "z", () => back(history.undo, "undone"), { id: "undo" }), button("redo", "y", () => back(history.redo, "done again"), { id: "redo" }),
        button("open a label file", "", () => file.click(), { id: "import" }), file,
        button(page.served ? "download" : "save the label file", "e", download, { id: "export" }), button("keys", "?", () => showKeys(KEYS), { id: "keys" }))),
    alarm, bar, el("div", { class: "told" }, progress, saved), said,
    el("div", { class: "work" }, el("nav", { "aria-label": "classes" }, el("div", { class: "find" }, search, filters), list), sheet, groupList),
    footer,
  );
  document.addEventListener("keydown", onKey);
  window.addEventListener("beforeunload", (event) => {
    if (saver ? saver.unsaved : !exported) event.preventDefault();
  });
  current = ids().find(isOpen) ?? current;
  update(true);
}

async function serve(): Promise<void> {
  const kept = new Saver("", (outcome) => {
    if (outcome.kind === "conflict") return conflict();
    if (outcome.kind === "failed") return fail(outcome.told, keep);
    alarm.replaceChildren();
    const lacks = outcome.problem?.replace(/^task '.*?':? /, "it ") ?? "";
    saved.textContent = lacks ? `${page.file} is saved; not a task yet: ${lacks}` : `${page.file} is saved`;
  });
  saver = kept;
  try {
    const stored = await load();
    base = stored.text;
    history = new History(begun());
    // What this page cannot read it must not write over.
    if (!problem) kept.settle(stored.tag);
  } catch (error) {
    problem = (error as Error).message;
  }
  build();
  saved.textContent = problem ? "" : `${page.file} is up to date`;
  window.addEventListener("focus", () => {
    const before = kept.tag;
    if (kept.unsaved || kept.conflict) return;
    // What cannot be read now is told when something is to be saved.
    void load().then((stored) => {
      if (stored.tag !== before && kept.tag === before && !kept.unsaved) adopt(stored, `${page.file} was changed elsewhere, and read again (z goes back)`);
    }).catch(() => undefined);
  });
}

void (page.served ? serve() : Promise.resolve(build())).then(() => {
  if (problem) alarm.replaceChildren(el("p", {}, `${page.file} was not read, and this page starts from nothing: ${problem}`));
});
