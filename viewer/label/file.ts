// Label files as YAML. All scalars are text, as Python reads them: 007 is no number. Comments stay where they are.

import { type Document, isMap, isScalar, isSeq, type Pair, parseDocument, type Scalar, visit, YAMLMap } from "yaml";
import type { Entry, State } from "./state";

export interface LabelFile {
  groups: string[];
  /** By class id. */
  given: Map<string, { name: string; group: string }>;
  /** Why classes are left out, by id. */
  excluded: Map<string, string>;
  /** The group of all classes that are not named, if there is one. */
  rest: string | null;
}

function parse(text: string): Document {
  const doc = parseDocument(text, { schema: "failsafe", compat: "yaml-1.1", uniqueKeys: true, stringKeys: true });
  if (doc.errors.length) throw new Error(doc.errors[0].message.split("\n")[0]);
  visit(doc, {
    Alias() {
      throw new Error("it has aliases, which this page does not read");
    },
    // A comment after "group:" would move to a line of its own.
    Pair(_, { key, value }) {
      const after = isScalar(key) && key.range ? text.slice(key.range[1]) : "";
      if (isScalar(key) && isMap(value) && value.commentBefore && /^[ \t]*:[ \t]+#/.test(after)) [key.comment, value.commentBefore] = [value.commentBefore, undefined];
    },
  });
  if (!isMap(doc.contents)) throw new Error("it is no label file: expected 'groups: {group: {id: name}}'");
  return doc;
}

const textOf = (node: unknown): string => (isScalar(node) ? String(node.value ?? "") : "");
const keyOf = (pair: Pair): string => textOf(pair.key);

/** A part of the file that maps ids or groups; an empty one if there is none. */
function mapOf(doc: Document, key: string): YAMLMap {
  const found = doc.get(key, true);
  if (isMap(found)) return found;
  if (found !== undefined && !(isScalar(found) && !found.value)) throw new Error(`'${key}' is no mapping`);
  return new YAMLMap();
}

/** Ids and names in a group, which may be a mapping, a list, or one id. */
function members(node: unknown): [string, string][] {
  if (isMap(node)) return node.items.map((pair) => [keyOf(pair), textOf(pair.value) || keyOf(pair)]);
  if (isSeq(node)) return node.items.map((item) => [textOf(item), textOf(item)]);
  return textOf(node) ? [[textOf(node), textOf(node)]] : [];
}

export function read(text: string): LabelFile {
  const doc = parse(text);
  for (const key of ["classes", "one", "folders"]) {
    if (doc.has(key)) throw new Error(`it has '${key}', where this page reads 'groups' alone: open it with vitcut label --task`);
  }
  const found: LabelFile = { groups: [], given: new Map(), excluded: new Map(), rest: null };
  for (const pair of mapOf(doc, "groups").items) {
    found.groups.push(keyOf(pair));
    for (const [id, name] of members(pair.value)) {
      if (found.given.has(id)) throw new Error(`class ${id} is in two groups`);
      found.given.set(id, { name, group: keyOf(pair) });
    }
  }
  for (const pair of mapOf(doc, "excluded").items) found.excluded.set(keyOf(pair), textOf(pair.value));
  const rest = textOf(doc.get("rest", true));
  if (rest && rest !== "ignore") found.rest = rest;
  return found;
}

/** What a label file says of the data's classes; all others are open, under the names that are known. */
export function stateOf(file: LabelFile, known: ReadonlyMap<string, string>): State {
  const classes = new Map<string, Entry>();
  for (const [id, name] of known) {
    const given = file.given.get(id);
    classes.set(id, { name: given?.name ?? name, group: given?.group ?? null, out: given ? null : file.excluded.get(id) ?? null });
  }
  return { groups: file.groups, classes, suggested: new Map() };
}

/** Bring a map's pairs to these keys, each with its old node where there is one. */
function arrange(map: YAMLMap, wanted: ReadonlyMap<string, string>, known: (id: string) => boolean, doc: Document): void {
  const order = map.items.map(keyOf);
  const sorted = order.every((key, at) => at === 0 || order[at - 1] < key);
  map.items = map.items.filter((pair) => wanted.has(keyOf(pair)) || !known(keyOf(pair)));
  for (const [id, text] of wanted) {
    const pair = map.items.find((one) => keyOf(one) === id);
    if (!pair) {
      const later = sorted ? map.items.findIndex((one) => keyOf(one) > id) : -1;
      map.items.splice(later < 0 ? map.items.length : later, 0, doc.createPair(id, text));
    } else if ((textOf(pair.value) || id) !== text) {
      if (isScalar(pair.value)) (pair.value as Scalar).value = text;
      else pair.value = doc.createNode(text);
    }
  }
}

/** The file with what was decided; comments, other entries, and classes that the data lacks stay. */
export function write(before: string, state: State): string {
  const doc = parse(before);
  const known = (id: string) => state.classes.has(id);
  const [groups, excluded] = [mapOf(doc, "groups"), mapOf(doc, "excluded")];
  const pairs = state.groups.map((group) => groups.items.find((one) => keyOf(one) === group) ?? doc.createPair(group, new YAMLMap()));
  for (const pair of pairs) {
    if (!isMap(pair.value)) {
      const listed = new YAMLMap();
      for (const [id, name] of members(pair.value)) listed.add(doc.createPair(id, name));
      pair.value = listed;
    }
    const own = [...state.classes].filter(([, entry]) => entry.group === keyOf(pair));
    arrange(pair.value as YAMLMap, new Map(own.map(([id, entry]) => [id, entry.name])), known, doc);
  }
  // A task has no empty groups, but its rest may be listed as one.
  groups.items = pairs.filter((pair) => (pair.value as YAMLMap).items.length || keyOf(pair) === textOf(doc.get("rest", true)));
  groups.flow = false;
  const out = [...state.classes].filter(([, entry]) => entry.out !== null);
  arrange(excluded, new Map(out.map(([id, entry]) => [id, entry.out!])), known, doc);
  if (excluded.items.length > 3) excluded.flow = false;
  if (excluded.items.length && !isMap(doc.get("excluded", true))) doc.set("excluded", excluded);
  if (!isMap(doc.get("groups", true))) doc.set("groups", groups);
  return doc.toString({ lineWidth: 0, flowCollectionPadding: false });
}
