// Small helpers for building the page; text is always put in as text.

export type Child = Node | string | null | false;

export function el<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Record<string, string> = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child): child is Node | string => child !== null && child !== false));
  return made;
}

export function table(caption: string, headers: string[], rows: Child[][]): HTMLTableElement {
  return el(
    "table",
    {},
    el("caption", {}, caption),
    el("thead", {}, el("tr", {}, ...headers.map((text) => el("th", { scope: "col" }, text)))),
    el(
      "tbody",
      {},
      ...rows.map(([first, ...cells]) =>
        el("tr", {}, el("th", { scope: "row" }, first), ...cells.map((cell) => el("td", {}, cell))),
      ),
    ),
  );
}

export function choice(label: string, options: string[], chosen: string, changed: (value: string) => void): HTMLElement {
  const select = el("select", {}, ...options.map((text) => el("option", { value: text }, text)));
  select.value = chosen;
  select.addEventListener("change", () => changed(select.value));
  return el("label", {}, `${label} `, select);
}

export function save(name: string, content: Blob): void {
  const url = URL.createObjectURL(content);
  const link = el("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** As Python rounds, so that the page and the terminal agree: exact ties go to the even digit. */
export function fixed(value: number, digits: number): string {
  const scaled = Math.abs(value) * 10 ** digits;
  const tie = scaled % 1 === 0.5 && (value * 2 ** (digits + 1)) % 1 === 0 && Math.floor(scaled) % 2 === 0;
  return (tie ? (Math.sign(value) * Math.floor(scaled)) / 10 ** digits : value).toFixed(digits);
}

export const percent = (value: number | null | undefined, digits = 1): string =>
  value === null || value === undefined ? "-" : `${fixed(100 * value, digits)} %`;

/** Milliseconds with three digits, never as a power of ten. */
export const ms = (value: number): string =>
  value >= 100 ? count(Math.round(value)) : value >= 10 ? value.toFixed(1) : value.toFixed(2);

export const signed = (value: number): string => `${value < 0 ? "\u2212" : "+"}${fixed(Math.abs(100 * value), 1)}`;

export const count = (value: number | null | undefined): string =>
  value === null || value === undefined ? "-" : value.toLocaleString("en-US");

export function short(value: number | null | undefined): string {
  if (value === null || value === undefined) return "-";
  for (const [size, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]] as const) {
    if (value >= size) return `${(value / size).toPrecision(3)} ${letter}`;
  }
  return String(value);
}
