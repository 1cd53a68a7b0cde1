// The page's one script: a chat, and the assembly with the engine's live figures.
// Whatever a model or the server says becomes text nodes; no markup is ever made of a string.

const KEY = "vllm-di.key";
const POLL_MS = 1000;
const HISTORY = 60; // rates that the small graph shows
const EXAMPLE_TOOLS = [{
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather in a city, now.",
    parameters: {
      type: "object",
      properties: { city: { type: "string", maxLength: 40 }, unit: { enum: ["celsius", "fahrenheit"] } },
      required: ["city", "unit"],
      additionalProperties: false,
    },
  },
}];

const byId = (id) => document.getElementById(id);

/** An element with properties, and children that are nodes or text. */
function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// ---- the server -------------------------------------------------------------------------------

/** An error of the server, as it said it. */
class Refusal extends Error {
  constructor(status, said, requestId) {
    const { message, param, code } = said ?? {};
    super(message ?? `the server answered with status ${status}`);
    this.lines = [this.message];
    const facts = [status && `status ${status}`, code && `code ${code}`, param && `param ${param}`, requestId && `request ${requestId}`];
    this.lines.push(facts.filter(Boolean).join(", "));
    this.status = status;
  }
}

let key = "";
try { key = sessionStorage.getItem(KEY) ?? ""; } catch { /* storage is off: the key stays in memory */ }

function keepKey(value) {
  key = value;
  try {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  } catch { /* as above */ }
  byId("forget").hidden = !value;
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
  if (response.ok) return response;
  if (response.status === 401) askForKey();
  let said = null;
  try { said = (await response.json()).error; } catch { /* no JSON: the status alone */ }
  throw new Refusal(response.status, said, response.headers.get("x-request-id"));
}

const getJson = async (path) => (await call(path)).json();

/** The data of server-sent events, in order. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

// ---- the API key ------------------------------------------------------------------------------

function askForKey() {
  const form = byId("ask-key");
  if (!form.hidden) return;
  byId("key-note").textContent = key ? "The server does not accept this key." : "";
  keepKey("");
  form.hidden = false;
  byId("key").focus();
}

byId("ask-key").addEventListener("submit", async (event) => {
  event.preventDefault();
  keepKey(byId("key").value.trim());
  byId("key").value = "";
  byId("ask-key").hidden = true;
  await start();
});

byId("forget").addEventListener("click", () => { keepKey(""); location.reload(); });

// ---- the assembly -----------------------------------------------------------------------------

const CONTAINERS = {
  ServerContainer: ["API process", "text, HTTP; no torch"],
  EngineContainer: ["Engine process", "token ids, blocks"],
  WorkerContainer: ["Worker", "tensors; one per rank"],
};
const CHOOSERS = { default: "default", platform: "platform", model: "model", checkpoint: "checkpoint", auto: "auto", "command line": "person" };

/** A class without the part that all of this project share; lines break at its dots. */
function shortClass(target) {
  const parts = target.replace(/^vllm_di\.(components\.)?/, "").split(/(?<=\.)/);
  return parts.flatMap((part) => [part, make("wbr")]);
}

function slotNode(slot) {
  const chooser = CHOOSERS[slot.chosen_by] ?? "other";
  const summary = make("summary", {},
    make("span", { className: "name" }, slot.slot),
    make("span", { className: `chooser ${chooser}`, title: slot.place }, slot.chosen_by),
    make("code", { className: "class", title: slot.target }, ...shortClass(slot.target || "–")));
  if (slot.missing) summary.append(make("span", { className: "missing" }, slot.missing));
  const others = slot.alternatives.join(", ");
  summary.append(make("span", { className: "others", title: others }, others ? `also: ${others}` : "no other option here"));
  const facts = make("dl", {},
    make("dt", {}, "option"), make("dd", {}, make("code", {}, `${slot.key}=${slot.option}`)),
    make("dt", {}, "interface"), make("dd", {}, make("code", {}, slot.interface)),
    make("dt", {}, "class"), make("dd", {}, make("code", {}, slot.target)),
    make("dt", {}, "chosen by"), make("dd", {}, `${slot.chosen_by}: `, make("code", {}, slot.place)));
  if (others) {
    facts.append(make("dt", {}, "instead"),
      make("dd", {}, ...slot.alternatives.map((option) => make("code", {}, `${slot.key}=${option}`))));
  }
  const node = make("details", { className: "slot" }, summary, facts);
  node.dataset.slot = slot.key;
  return node;
}

function containerNode(container, replicas) {
  const [title, what] = CONTAINERS[container.name] ?? [container.name, ""];
  const copies = replicas > 1 && container.name !== "ServerContainer" ? `, ${replicas} replicas` : "";
  const head = make("header", {},
    make("h2", {}, container.part ? `${title} · ${container.part}` : title),
    make("p", {}, make("code", {}, container.name), ` ${what}${copies}`),
    make("p", { className: "live" }));
  const node = make("article", { className: "container" }, head, ...container.slots.map(slotNode));
  node.dataset.container = container.name;
  return node;
}

let isAssemblyShown = false;

async function showAssembly() {
  const overview = await getJson("assembly");
  byId("announcement").textContent =
    `${overview.announcement} (${overview.platform_reason}); interfaces ${overview.interface}. `
    + "Each name is a slot: its class, who chose it, what else there is.";
  byId("containers").replaceChildren(...overview.containers.map((one) => containerNode(one, overview.replicas)));
  isAssemblyShown = true;
}

// ---- live figures -----------------------------------------------------------------------------

/** Sums over the replicas, of Prometheus' text. */
function figuresOf(text) {
  const values = {}, blocks = {}, usage = {};
  let facts = "";
  for (const line of text.split("\n")) {
    const found = /^(vllm[\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!found) continue;
    const [, name, labels = "", value] = found;
    const engine = /(?:^|,)engine="(\d+)"/.exec(labels)?.[1] ?? "0";
    if (name === "vllm:cache_config_info") blocks[engine] = Number(/num_gpu_blocks="(\d+)"/.exec(labels)?.[1] ?? 0);
    else if (name === "vllm:kv_cache_usage_perc") usage[engine] = Number(value);
    else if (name === "vllm_di_components_info" && engine === "0") {
      facts = ["device", "dtype"].map((label) => new RegExp(`(?:^|,)${label}="([^"]*)"`).exec(labels)?.[1]).filter(Boolean).join(", ");
    } else values[name] = (values[name] ?? 0) + Number(value);
  }
  const engines = Object.keys(blocks);
  const all = engines.reduce((sum, engine) => sum + blocks[engine], 0);
  const used = engines.reduce((sum, engine) => sum + Math.round(blocks[engine] * (usage[engine] ?? 0)), 0);
  return {
    running: values["vllm:num_requests_running"], waiting: values["vllm:num_requests_waiting"],
    tokens: values["vllm:generation_tokens_total"], all, used, facts,
  };
}

let before = null; // { tokens, at } of the last poll
const rates = [];

function showFigures(figures) {
  const at = performance.now();
  const number = (value) => (value === undefined ? "–" : value.toLocaleString("en"));
  byId("running").textContent = number(figures.running);
  byId("waiting").textContent = number(figures.waiting);
  byId("blocks").textContent = figures.all ? `${number(figures.used)} of ${number(figures.all)}` : "–";
  byId("usage").value = figures.all ? figures.used / figures.all : 0;
  if (figures.tokens !== undefined) {
    if (before && figures.tokens >= before.tokens) {
      const rate = (figures.tokens - before.tokens) * 1000 / (at - before.at);
      byId("rate").textContent = rate ? rate.toFixed(rate < 10 ? 1 : 0) : "0";
      rates.push(rate);
      if (rates.length > HISTORY) rates.shift();
      const most = Math.max(1, ...rates);
      const points = rates.map((one, i) => `${HISTORY - rates.length + i + 1},${(19 - 18 * one / most).toFixed(2)}`);
      byId("line").setAttribute("points", points.join(" "));
    }
    before = { tokens: figures.tokens, at };
  }
  const live = {
    EngineContainer: figures.running === undefined ? "" : `${number(figures.running)} running, ${number(figures.waiting)} waiting, ${byId("blocks").textContent} blocks`,
    WorkerContainer: figures.facts,
  };
  for (const node of document.querySelectorAll(".container")) {
    node.querySelector(".live").textContent = live[node.dataset.container] ?? "";
  }
}

function showState(state) {
  const node = byId("state");
  const said = [state.status, state.stage, state.reason, (state.processes ?? []).join(", ")].filter(Boolean).join(": ");
  if (node.textContent !== said) node.textContent = said; // a status that did not change is not read out again
  node.className = `state ${state.status === "ready" ? "ready" : ["starting", "draining"].includes(state.status) ? "" : "bad"}`;
}

let timer = 0;

async function poll() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    const health = await fetch("health", { credentials: "omit", cache: "no-store" });
    showState(await health.json());
    if (byId("ask-key").hidden) {
      if (!isAssemblyShown) await start();
      const response = await call("metrics");
      showFigures(figuresOf(await response.text()));
    }
  } catch (error) {
    if (!(error instanceof Refusal)) showState({ status: "unreachable" });
    before = null;
  }
  clearTimeout(timer);
  timer = setTimeout(poll, POLL_MS);
}

document.addEventListener("visibilitychange", () => {
  before = null;
  poll();
});

// ---- the chat ---------------------------------------------------------------------------------

let model = "";
let messages = []; // as the API takes them, without the system prompt
let controller = null; // of the answer that is being written

const log = byId("log");

function follow(change) {
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

/** The text of an answer: words, and what stands between fences as code. */
function blocksOf(text) {
  return text.split(/^```[^\n`]*$/m).map((part, i) => {
    const body = part.replace(/^\n/, "").replace(/\n$/, "");
    if (i % 2 === 0) return body && make("p", { className: "words" }, body);
    return make("pre", {}, make("code", {}, body));
  }).filter(Boolean);
}

/** One answer on the page, as it grows. */
class Answer {
  constructor() {
    this.content = "";
    this.calls = [];
    this.words = document.createTextNode("");
    this.text = make("div", { className: "text" }, make("p", { className: "words" }, this.words));
    this.node = make("li", { className: "turn assistant busy" }, this.text);
    this.thought = null;
    follow(() => log.append(this.node));
  }

  think(piece) {
    if (!this.thought) {
      this.thought = document.createTextNode("");
      this.node.prepend(make("details", { className: "thought" }, make("summary", {}, "Reasoning"), make("p", {}, this.thought)));
    }
    this.thought.appendData(piece);
  }

  say(piece) {
    this.content += piece;
    this.words.appendData(piece);
  }

  callTool(delta) {
    let known = this.calls[delta.index];
    if (!known) {
      const name = make("strong", {}), text = document.createTextNode("");
      const node = make("div", { className: "call" },
        make("header", {}, make("span", {}, "tool call"), name), make("pre", {}, make("code", {}, text)));
      known = this.calls[delta.index] = { id: "", name, text, node };
      this.node.append(node);
    }
    if (delta.id) known.id = delta.id;
    if (delta.function?.name) known.name.textContent += delta.function.name;
    if (delta.function?.arguments) known.text.appendData(delta.function.arguments);
  }

  note(text) { this.node.append(make("p", { className: "note" }, text)); }

  fail(lines) { this.node.append(make("p", { className: "error" }, lines.filter(Boolean).join("\n"))); }

  /** No more comes. */
  finish() {
    this.node.classList.remove("busy");
    this.text.replaceChildren(...blocksOf(this.content));
    this.text.hidden = !this.content;
  }

  /** What the conversation keeps of a whole answer. */
  get message() {
    const message = { role: "assistant", content: this.content };
    if (this.calls.length) {
      message.tool_calls = this.calls.map((one) => ({
        id: one.id, type: "function", function: { name: one.name.textContent, arguments: one.text.data },
      }));
    }
    return message;
  }

  /** A field for what each tool answers, and a button that goes on with it. */
  askForResults() {
    const fields = this.calls.map((one, i) => {
      const id = `result-${messages.length}-${i}`;
      const field = make("textarea", { id, rows: 1 });
      try { one.text.data = JSON.stringify(JSON.parse(one.text.data), null, 2); } catch { /* no JSON: as it came */ }
      one.node.append(make("label", { htmlFor: id }, `result of ${one.name.textContent}`), field);
      return field;
    });
    const button = make("button", { type: "button" }, "Go on with the results");
    button.addEventListener("click", () => {
      if (controller) return;
      this.calls.forEach((one, i) => {
        messages.push({ role: "tool", tool_call_id: one.id, content: fields[i].value });
        log.append(make("li", { className: "turn tool" }, `${one.name.textContent} answered: ${fields[i].value}`));
        fields[i].disabled = true;
      });
      button.remove();
      answer();
    });
    this.node.append(button);
  }
}

/** The request's body. Throws what the tools' JSON is refused for. */
function requestBody() {
  const system = byId("system").value.trim(), temperature = byId("temperature").value;
  const most = byId("max-tokens").value, tools = byId("tools").value.trim();
  const body = {
    model: model || undefined, // not known yet: the server's own
    stream: true, stream_options: { include_usage: true, continuous_usage_stats: true },
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
  };
  if (temperature !== "") body.temperature = Number(temperature);
  if (most !== "") body.max_tokens = Number(most);
  if (tools) {
    try {
      body.tools = JSON.parse(tools);
    } catch (error) {
      throw new Error(`the tools are not JSON: ${error.message}`);
    }
    body.tool_choice = byId("tool-choice").value;
  }
  return body;
}

/** `first`: when the first tokens came, and how many. Tokens a second are those since then. */
function speedOf(start, first, tokens) {
  const seconds = (performance.now() - first.at) / 1000, since = tokens - first.tokens;
  const rate = since > 0 && seconds > 0 ? `${(since / seconds).toFixed(1)} tokens/s, ` : "";
  return `${rate}${tokens} ${tokens === 1 ? "token" : "tokens"}, first after ${((first.at - start) / 1000).toFixed(2)} s`;
}

/** Ask for the next turn and show it as it comes. */
async function answer() {
  const shown = new Answer();
  const start = performance.now();
  const conversation = messages; // New chat starts another one
  let first = null, tokens = 0, reason = "", isWhole = false, speed = "";
  setBusy(new AbortController());
  try {
    const response = await call("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(requestBody()),
      signal: controller.signal,
    });
    for await (const data of eventsOf(response.body)) {
      if (data === "[DONE]") { isWhole = true; continue; }
      const event = JSON.parse(data);
      if (event.error) throw new Refusal(0, event.error, response.headers.get("x-request-id"));
      const choice = event.choices?.[0], delta = choice?.delta ?? {};
      if (event.usage?.completion_tokens) {
        tokens = event.usage.completion_tokens;
        first ??= { at: performance.now(), tokens };
        speed = choice ? speedOf(start, first, tokens) : speed;
      }
      follow(() => {
        if (delta.reasoning_content) shown.think(delta.reasoning_content);
        if (delta.content) shown.say(delta.content);
        for (const one of delta.tool_calls ?? []) shown.callTool(one);
      });
      reason = choice?.finish_reason ?? reason;
      byId("speed").textContent = speed;
    }
    if (!isWhole) throw new Error("the connection ended before the answer was complete");
    conversation.push(shown.message);
  } catch (error) {
    if (controller.signal.aborted) {
      reason = "stopped";
      if (shown.content) conversation.push({ role: "assistant", content: shown.content });
    } else {
      shown.fail(error.lines ?? [error.message]);
    }
    if (conversation === messages && messages.at(-1)?.role === "user") takeBack();
  }
  setBusy(null);
  follow(() => {
    shown.finish();
    if (isWhole && shown.calls.length) shown.askForResults();
    if (reason) shown.note([speed, reason === "stop" || reason === "tool_calls" ? "" : `finish_reason ${reason}`].filter(Boolean).join(", "));
  });
}

/** A question without an answer goes back to where it was written. */
function takeBack() {
  const { content } = messages.pop();
  if (!byId("question").value) byId("question").value = content;
}

function setBusy(next) {
  controller = next;
  byId("send").hidden = Boolean(next);
  byId("stop").hidden = !next;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = byId("question"), text = question.value.trim();
  if (!text || controller) return;
  question.value = "";
  messages.push({ role: "user", content: text });
  log.append(make("li", { className: "turn user" }, text));
  log.scrollTop = log.scrollHeight;
  answer();
});

byId("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("composer").requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") controller?.abort();
});
byId("stop").addEventListener("click", () => controller?.abort());
byId("clear").addEventListener("click", () => {
  controller?.abort();
  messages = [];
  log.replaceChildren();
  byId("speed").textContent = "";
  byId("question").focus();
});
byId("example").addEventListener("click", () => { byId("tools").value = JSON.stringify(EXAMPLE_TOOLS, null, 2); });

for (const button of document.querySelectorAll("[data-show]")) {
  button.addEventListener("click", () => {
    document.body.dataset.view = button.dataset.show;
    for (const one of document.querySelectorAll("[data-show]")) one.setAttribute("aria-pressed", String(one === button));
  });
}

// ---- start ------------------------------------------------------------------------------------

async function start() {
  try {
    const [models] = await Promise.all([getJson("v1/models"), showAssembly()]);
    const served = models.data[0];
    model = served.id;
    byId("model").textContent = model + (served.pooling ? ` (${served.pooling.kind}s: it generates no text)` : "");
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.status !== 401) byId("announcement").textContent = error.lines.join(" ");
    isAssemblyShown = error.status !== 401;
  }
}

byId("forget").hidden = !key;
poll();
