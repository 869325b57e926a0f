// What a person has decided of each class. States are never changed: an operation gives a new one, which is what undo goes back to.

export const NOT_SURE = "not sure";
export const LEFT_OUT = "left out";

export interface Entry {
  name: string;
  /** The group, or null. */
  group: string | null;
  /** Why the class is left out of the task, or null. */
  out: string | null;
}

export interface State {
  /** In the order of the label file; the first nine have the keys 1 to 9. */
  groups: readonly string[];
  classes: ReadonlyMap<string, Entry>;
  /** A group that WordNet suggests for a class. */
  suggested: ReadonlyMap<string, string>;
}

export type Status = "open" | "grouped" | "unsure" | "out";
export type Filter = Status | "all" | `group:${string}`;

export const statusOf = ({ group, out }: Entry): Status =>
  group !== null ? "grouped" : out === NOT_SURE ? "unsure" : out !== null ? "out" : "open";

/** Text as it may stand in a label file: on one line, without what steers a terminal or is no character. */
export const clean = (text: string): string =>
  text.normalize("NFC").replace(/[\p{Cc}\p{Cs}\u2028\u2029\ufeff\ufffe\uffff]+/gu, " ").replace(/\s+/g, " ").trim();

function change(state: State, id: string, more: Partial<Entry>): State {
  const entry = state.classes.get(id)!;
  return { ...state, classes: new Map(state.classes).set(id, { ...entry, ...more }) };
}

export function assign(state: State, id: string, group: string): State {
  const groups = state.groups.includes(group) ? state.groups : [...state.groups, group];
  return change({ ...state, groups }, id, { group, out: null });
}

export const leaveOut = (state: State, id: string, reason: string): State => change(state, id, { group: null, out: reason });

export const reopen = (state: State, id: string): State => change(state, id, { group: null, out: null });

export const name = (state: State, id: string, text: string): State => change(state, id, { name: text });

/** Give every open class the group that is suggested for it. */
export function acceptAll(state: State): State {
  let next = state;
  for (const [id, entry] of state.classes) {
    const group = state.suggested.get(id);
    if (statusOf(entry) === "open" && group !== undefined) next = assign(next, id, group);
  }
  return next;
}

/** Rename a group. If there is one of the new name, the two become one, in its place. */
export function renameGroup(state: State, from: string, to: string): State {
  if (from === to) return state;
  const merged = state.groups.includes(to);
  const groups = merged ? state.groups.filter((one) => one !== from) : state.groups.map((one) => (one === from ? to : one));
  const classes = new Map([...state.classes].map(([id, entry]) => [id, entry.group === from ? { ...entry, group: to } : entry] as const));
  const suggested = new Map([...state.suggested].map(([id, group]) => [id, group === from ? to : group] as const));
  return { groups, classes, suggested };
}

/** Forget a group without classes. */
export const dropGroup = (state: State, group: string): State => ({
  ...state,
  groups: state.groups.filter((one) => one !== group),
  suggested: new Map([...state.suggested].filter(([, one]) => one !== group)),
});

export const membersOf = (state: State, group: string): string[] =>
  [...state.classes].filter(([, entry]) => entry.group === group).map(([id]) => id);

export function countsOf(state: State): Record<Status, number> {
  const counts = { open: 0, grouped: 0, unsure: 0, out: 0 };
  for (const entry of state.classes.values()) counts[statusOf(entry)]++;
  return counts;
}

/**
 * Suggestions follow what was decided: a suggested group becomes the group that most of its classes were given, so that
 * a group that was renamed last time is not suggested anew. Groups that are only suggested come after all others.
 */
export function withSuggestions(state: State, suggested: Record<string, string>): State {
  const votes = new Map<string, Map<string, number>>();
  for (const [id, group] of Object.entries(suggested)) {
    const given = state.classes.get(id)?.group;
    const own = votes.get(group) ?? new Map<string, number>();
    if (given) own.set(given, (own.get(given) ?? 0) + 1);
    votes.set(group, own);
  }
  const becomes = new Map([...votes].map(([group, own]) => [group, [...own].sort((a, b) => b[1] - a[1])[0]?.[0] ?? group]));
  const kept = Object.entries(suggested).filter(([id]) => state.classes.has(id));
  const groups = [...new Set([...state.groups, ...kept.map(([, group]) => becomes.get(group)!)])];
  return { ...state, groups, suggested: new Map(kept.map(([id, group]) => [id, becomes.get(group)!])) };
}

export function matches(id: string, entry: Entry, also: string, filter: Filter, text: string): boolean {
  const of = filter.startsWith("group:") ? entry.group === filter.slice(6) : filter === "all" || statusOf(entry) === filter;
  return of && `${id} ${entry.name} ${also} ${entry.group ?? ""}`.toLowerCase().includes(text.toLowerCase());
}

/** The next id after this one that fits, starting again at the top; null if none does. */
export function nextOf(ids: string[], from: string | null, fits: (id: string) => boolean): string | null {
  const start = from === null ? 0 : ids.indexOf(from) + 1;
  return [...ids.slice(start), ...ids.slice(0, start)].find((id) => id !== from && fits(id)) ?? null;
}

/** States that were, the present one, and those that were undone. */
export class History {
  private past: State[] = [];
  private future: State[] = [];
  constructor(public present: State) {}

  do(next: State): boolean {
    if (next === this.present) return false;
    this.past.push(this.present);
    this.future = [];
    this.present = next;
    return true;
  }

  undo = (): boolean => this.move(this.past, this.future);
  redo = (): boolean => this.move(this.future, this.past);

  private move(from: State[], to: State[]): boolean {
    const found = from.pop();
    if (!found) return false;
    to.push(this.present);
    this.present = found;
    return true;
  }
}
