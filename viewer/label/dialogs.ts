// Questions that the page asks: for one of several texts or a new one, and what the keys do.

import { el } from "../src/dom";
import { clean } from "./state";

const MOST = 200;

function open(dialog: HTMLDialogElement): void {
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

const closing = (dialog: HTMLDialogElement): HTMLButtonElement => {
  const made = el("button", { type: "button", class: "close", "aria-label": "close" }, "\u00d7");
  made.addEventListener("click", () => dialog.close());
  return made;
};

interface Question {
  title: string;
  options: string[];
  /** What a new text means; without it, only options can be chosen. */
  fresh?: (text: string) => string;
  /** Whether a new text comes before options that begin like it. */
  freshFirst?: boolean;
  start?: string;
}

/** Ask for one of several texts, or for a new one. */
export function ask({ title, options, fresh, freshFirst = false, start = "" }: Question, chosen: (text: string) => void): void {
  const input = el("input", { type: "text", id: "asked", role: "combobox", "aria-label": title, "aria-controls": "options", "aria-expanded": "true", autocomplete: "off", spellcheck: "false", maxlength: String(MOST) });
  const list = el("ul", { id: "options", role: "listbox", "aria-label": "groups" });
  const dialog = el("dialog", { class: "ask", "aria-label": title }, el("h2", {}, title), input, list);
  dialog.prepend(closing(dialog));
  input.value = start;
  let shown: string[] = [];
  let at = 0;
  const take = (text: string) => {
    dialog.close();
    chosen(text);
  };
  const draw = () => {
    list.replaceChildren(
      ...shown.map((text, number) => {
        const known = options.includes(text);
        const item = el("li", { role: "option", id: `option-${number}`, "aria-selected": String(number === at) }, known || !fresh ? text : fresh(text));
        item.addEventListener("click", () => take(text));
        return item;
      }),
    );
    if (!shown.length) list.append(el("li", { class: "none" }, "no such group"));
    input.setAttribute("aria-activedescendant", shown.length ? `option-${at}` : "");
    list.children[at]?.scrollIntoView({ block: "nearest" });
  };
  const find = () => {
    const text = clean(input.value);
    const typed = text.toLowerCase();
    const all = input.value === start;
    const rank = (one: string) => (one === text ? 0 : one.toLowerCase() === typed ? 1 : one.toLowerCase().startsWith(typed) ? 2 : 4);
    shown = options.filter((one) => all || one.toLowerCase().includes(typed)).sort((a, b) => (all ? 0 : rank(a) - rank(b)));
    if (fresh && text && !options.includes(text)) shown.splice(freshFirst ? 0 : shown.filter((one) => rank(one) < 3).length, 0, text);
    at = 0;
    draw();
  };
  input.addEventListener("input", find);
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      at = Math.max(0, Math.min(shown.length - 1, at + (event.key === "ArrowDown" ? 1 : -1)));
      draw();
    } else if (event.key === "Enter" && !event.isComposing) {
      event.preventDefault();
      if (shown.length) take(shown[at]);
    }
  });
  open(dialog);
  find();
  input.select();
}

export function showKeys(keys: [string, string][]): void {
  const rows = keys.map(([key, does]) => el("tr", {}, el("th", { scope: "row" }, ...key.split(" ").map((one) => el("kbd", {}, one))), el("td", {}, does)));
  const dialog = el("dialog", { class: "keys", "aria-label": "keys" }, el("h2", {}, "Keys"), el("table", {}, el("tbody", {}, ...rows)));
  dialog.prepend(closing(dialog));
  open(dialog);
}
