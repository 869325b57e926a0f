import { expect, test } from "vitest";
import { read, stateOf, write } from "../label/file";
import * as states from "../label/state";
import { History, NOT_SURE, type State, statusOf } from "../label/state";

const ANIMALS = `# Animals in groups.
name: animals
source: tiny-imagenet-200
excluded: {n01768244: trilobite}
groups:
  aquatic:
    n01443537: goldfish
    n02074367: dugong # a mammal, really
  reptiles: # with amphibians
    n01629819: European fire salamander
`;
const NAMES = new Map([["n01443537", "goldfish"], ["n01629819", "salamander"], ["n01768244", "trilobite"], ["n02074367", "dugong"], ["n02085620", "Chihuahua"]]);

const animals = (): State => stateOf(read(ANIMALS), NAMES);

test("a file that nothing was changed in stays as it is, comments and all", () => {
  expect(write(ANIMALS, animals())).toBe(ANIMALS);
});

test("what a file says is what the page shows", () => {
  const { groups, classes } = animals();
  expect(groups).toEqual(["aquatic", "reptiles"]);
  expect([...classes.values()].map(statusOf)).toEqual(["grouped", "grouped", "out", "grouped", "open"]);
  expect(classes.get("n01629819")).toEqual({ name: "European fire salamander", group: "reptiles", out: null });
});

test("a decision changes its own lines alone", () => {
  const next = states.leaveOut(states.assign(animals(), "n02085620", "mammals"), "n01443537", NOT_SURE);
  expect(write(ANIMALS, next)).toBe(`# Animals in groups.
name: animals
source: tiny-imagenet-200
excluded: {n01443537: not sure, n01768244: trilobite}
groups:
  aquatic:
    n02074367: dugong # a mammal, really
  reptiles: # with amphibians
    n01629819: European fire salamander
  mammals:
    n02085620: Chihuahua
`);
});

test("writing, then reading, gives the same decisions, whatever names and groups are", () => {
  const odd = ["no", "007", "null", "~", "a: b", "# x", "- y", "'q\" \\", "{a}", "é 猫 \u{1f431}", "<img src=x onerror=alert(1)>", "*a", "&b", "@c", "%d", "!e", "1e3", "0x1f", "2001-01-01", "=", "<<", "y", "|", ">", "?", "a".repeat(200)];
  const ids = new Map(odd.map((text) => [text, text]));
  let state = stateOf(read("groups: {}"), ids);
  for (const [at, id] of odd.entries()) {
    state = states.assign(state, id, odd[(at * 7) % odd.length]);
    state = states.name(state, id, odd[(at * 5) % odd.length]);
  }
  state = states.leaveOut(state, "no", "007");
  const again = stateOf(read(write("name: x\n", state)), ids);
  expect([...again.classes]).toEqual([...state.classes]);
});

test("lists, single ids and empty entries are read, and become mappings", () => {
  const text = "excluded:\ngroups: {dogs: [beagle, pug], cats: siamese}\n";
  const known = new Map([["beagle", "b"], ["pug", "p"], ["siamese", "s"], ["manx", "manx"]]);
  const state = stateOf(read(text), known);
  expect(state.classes.get("siamese")).toEqual({ name: "siamese", group: "cats", out: null });
  const again = read(write(text, states.assign(state, "manx", "cats")));
  expect([...again.given].map(([id, { group }]) => [id, group])).toEqual([["beagle", "dogs"], ["pug", "dogs"], ["manx", "cats"], ["siamese", "cats"]]);
});

test.each([["groups: [", "at line 1"], ["- a", "no label file"], ["classes: [a]", "'classes'"], ["groups: {a: {x: y}, a: {}}", "unique"], ["groups: {a: [x], b: [x]}", "class x is in two groups"], ["groups: {a: *b}", "alias"], ["groups: 3", "no mapping"]])("%s is refused", (text, told) => {
  expect(() => stateOf(read(text), NAMES)).toThrow(new RegExp(told, "i"));
});

test("a group that takes the name of another becomes one with it", () => {
  const state = states.renameGroup(animals(), "reptiles", "aquatic");
  expect(state.groups).toEqual(["aquatic"]);
  expect(states.membersOf(state, "aquatic")).toEqual(["n01443537", "n01629819", "n02074367"]);
  expect(states.renameGroup(animals(), "aquatic", "water").groups).toEqual(["water", "reptiles"]);
});

test("undo goes back, redo forth, and a new change forgets what was undone", () => {
  const history = new History(animals());
  const first = history.present;
  history.do(states.reopen(first, "n01443537"));
  expect(history.undo() && history.present).toBe(first);
  expect(history.redo()).toBe(true);
  history.undo();
  history.do(states.name(first, "n01443537", "koi"));
  expect(history.redo()).toBe(false);
  expect(history.do(history.present)).toBe(false);
});

test("suggestions follow groups that were renamed, and open classes alone take them", () => {
  const suggested = { n01443537: "vertebrate", n02074367: "vertebrate", n02085620: "vertebrate", n01768244: "arthropod", unknown: "x" };
  const state = states.withSuggestions(animals(), suggested);
  expect(state.groups).toEqual(["aquatic", "reptiles", "arthropod"]);
  expect(state.suggested.get("n02085620")).toBe("aquatic");
  const all = states.acceptAll(state);
  expect(states.countsOf(all)).toEqual({ open: 0, grouped: 4, unsure: 0, out: 1 });
  expect(states.dropGroup(state, "arthropod").suggested.has("n01768244")).toBe(false);
});

test("texts are on one line, and next goes round", () => {
  expect(states.clean(" a\n\u0007 b\u2028c\ud800 ")).toBe("a b c");
  expect(states.nextOf(["a", "b", "c"], "b", (id) => id !== "c")).toBe("a");
  expect(states.nextOf(["a", "b"], "a", (id) => id === "a")).toBe(null);
});
