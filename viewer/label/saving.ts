// Keeps the label file: on the server, which refuses to write over what somebody else wrote, or in the hand of whoever exports it.

export interface Stored {
  text: string;
  tag: string;
}

export type Outcome = { kind: "saved"; problem: string | null } | { kind: "conflict" } | { kind: "failed"; told: string };

async function request(more: RequestInit): Promise<Response> {
  try {
    return await fetch("task", { cache: "no-store", credentials: "omit", redirect: "error", ...more });
  } catch {
    throw new Error("the server does not answer: is vitcut label still running?");
  }
}

async function errorOf(response: Response): Promise<Error> {
  const told = await response.json().then((one: { error?: string }) => one.error, () => undefined);
  return new Error(told ?? `the server answers ${response.status}`);
}

export async function load(): Promise<Stored> {
  const response = await request({});
  if (!response.ok) throw await errorOf(response);
  const { text } = (await response.json()) as { text: string };
  return { text, tag: response.headers.get("ETag")! };
}

/** Saves one text after another; of those that come while one is being saved, the last. */
export class Saver {
  private busy = false;
  private waiting: string | null = null;
  conflict = false;

  constructor(public tag: string, private told: (outcome: Outcome) => void) {}

  get unsaved(): boolean {
    return this.busy || this.waiting !== null;
  }

  async save(text: string): Promise<void> {
    this.waiting = text;
    if (this.busy || this.conflict) return;
    this.busy = true;
    try {
      while (this.waiting !== null && !this.conflict) {
        const body: string = this.waiting;
        const response: Response = await request({ method: "PUT", body, headers: { "Content-Type": "application/yaml", "If-Match": this.tag } });
        if (response.status === 409) {
          this.conflict = true;
          this.told({ kind: "conflict" });
        } else if (response.ok) {
          this.tag = response.headers.get("ETag")!;
          if (this.waiting === body) this.waiting = null;
          const { problem } = (await response.json()) as { problem: string | null };
          this.told({ kind: "saved", problem });
        } else throw await errorOf(response);
      }
    } catch (error) {
      this.told({ kind: "failed", told: (error as Error).message });
    } finally {
      this.busy = false;
    }
  }

  /** Go on from what is stored now. */
  settle(tag: string): void {
    [this.tag, this.conflict, this.waiting] = [tag, false, null];
  }
}
