// The page for people. It hides the API behind a form, a list and a document.
//
// Two rules. The key lives in one variable of this module and goes nowhere but into the header of
// requests to this origin: not into storage, an address or an attribute. And no text of the server
// is ever parsed as HTML: nodes are made one by one, their texts are textContent.

const API = "/api/v1";
const KEY = /^fr_[A-Za-z0-9_-]{43}$/;
const STREAMS = 2; // browsers open six connections to a server, over all tabs
const ANSWER_WITHIN = 30_000; // milliseconds for an ordinary request
const LOOK_EVERY = 30_000; // milliseconds after which a streamed job is read anyway
const HEALTH_EVERY = { ready: 30_000, down: 2_000 };
const HEALTH_WITHIN = 5_000;
const KINDS = [
  {
    kind: "handoff",
    name: "Handoff",
    about: "What changed, was decided, is open and comes next",
    label: "Write the handoff",
    path: () => "/handoffs",
  },
  {
    kind: "release_notes",
    name: "Release notes",
    about: "For the people who use it, or for a pull request",
    label: "Write the release notes",
    path: (project) => `/projects/${project}/insights/release_notes`,
  },
  {
    kind: "onboarding_brief",
    name: "Onboarding brief",
    about: "Where a new member finds what, and whom to ask",
    label: "Write the brief",
    path: (project) => `/projects/${project}/insights/onboarding`,
    detail: ["newMemberRole", "Role of the new member", 300],
  },
  {
    kind: "architecture_insight",
    name: "Architecture",
    about: "How the system is built and where it is moving",
    label: "Describe the architecture",
    path: (project) => `/projects/${project}/insights/architecture`,
    detail: ["focusQuestion", "A question to answer", 2000],
  },
  {
    kind: "cross_source_correlation",
    name: "Correlation",
    about: "What belongs together in different sources",
    label: "Find what belongs together",
    path: (project) => `/projects/${project}/insights/correlation`,
  },
];
const STEPS = {
  queued: "Queued",
  starting: "Starting",
  reading: "Reading what happened",
  generating: "Writing",
  rendering: "Laying out",
  completed: "Ready",
};

const $ = (id) => document.getElementById(id);
const nameOf = (kind) => KINDS.find((known) => known.kind === kind)?.name ?? kind;

let key = null; // the whole secret; see the first rule
let session = new AbortController(); // ends with the key
let scope = new AbortController(); // ends with the choice of another project
let project = null;
let asked = { print: "", key: "" }; // what the request on screen is called, until it is accepted
let streams = 0;
let openings = 0; // how many documents have been opened; tells whether a reader has moved on
let current = null;
let documents = [];
let skew = 0; // milliseconds that the server's clock is ahead of this one

// --- Talking to the server ------------------------------------------------------------------

/** A request that did not succeed: a sentence for people, and seconds after which to try again. */
class Problem extends Error {
  constructor(sentence, status, wait = 0) {
    super(sentence);
    this.status = status;
    this.wait = wait;
  }

  get passes() {
    return this.status === 0 || this.status === 429 || this.status >= 500;
  }
}

async function call(path, { method = "GET", body, headers = {}, signal = session.signal } = {}) {
  let response, value;
  try {
    response = await fetch(API + path, {
      method,
      cache: "no-store",
      headers: {
        Accept: "application/json",
        Authorization: `Bearer ${key}`,
        ...(body && { "Content-Type": "application/json" }),
        ...headers,
      },
      body: body && JSON.stringify(body),
      signal: AbortSignal.any([signal, AbortSignal.timeout(ANSWER_WITHIN)]),
    });
    value = await response.json().catch(() => null);
  } catch (error) {
    signal.throwIfAborted();
    checkHealth();
    throw new Problem("Baton does not answer. It may be restarting, or the network is away.", 0, 2);
  }
  signal.throwIfAborted();
  const now = Date.parse(response.headers.get("Date"));
  if (now) skew = now - Date.now();
  if (response.ok && value) return { value, wait: retryAfter(response) };
  if (response.status === 401) {
    forget("Baton does not know this key. Was it copied whole? Has it been revoked?");
    throw new DOMException("The key is gone.", "AbortError");
  }
  if (response.status >= 500) checkHealth();
  const sentence = value?.error ?? `Baton answered with an unexpected ${response.status}.`;
  throw new Problem(sentence, response.status, retryAfter(response) || 3);
}

/** Seconds. */
function retryAfter(response) {
  const seconds = Number(response.headers.get("Retry-After"));
  return seconds > 0 ? seconds : 0;
}

/** Try until it works or cannot work; `tell` hears what is wrong meanwhile, then "". */
async function persist(attempt, tell, signal) {
  for (;;) {
    try {
      const value = await attempt();
      tell("");
      return value;
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      tell(error.message);
      if (!error.passes) throw error;
      await sleep(error.wait * 1000, signal);
    }
  }
}

function sleep(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    if (signal.aborted) stop();
    else signal.addEventListener("abort", stop, { once: true });
  });
}

/** Run in the background; the end of the key or of the project ends it quietly. */
function background(task) {
  task.catch((error) => {
    if (error?.name !== "AbortError" && !(error instanceof Problem)) throw error;
  });
}

// --- Is it alive? ---------------------------------------------------------------------------

let healthTimer = 0;
let checking = false;

async function checkHealth() {
  if (checking) return;
  checking = true;
  clearTimeout(healthTimer);
  let state = "down";
  let text = "Not answering";
  try {
    const response = await fetch("/readyz", {
      cache: "no-store",
      signal: AbortSignal.timeout(HEALTH_WITHIN),
    });
    const value = await response.json();
    if (response.ok) [state, text] = ["ready", "Ready"];
    else text = `Not ready. ${value.error}`;
  } catch {
    // no answer at all
  }
  checking = false;
  const shown = $("health");
  shown.dataset.state = state;
  if (shown.textContent !== text) shown.textContent = text;
  if (!document.hidden) healthTimer = setTimeout(checkHealth, HEALTH_EVERY[state]);
}

// --- The key --------------------------------------------------------------------------------

async function open(event) {
  event.preventDefault();
  const button = $("open");
  if (isHeld(button)) return;
  const given = $("key").value.trim();
  const problem = $("key-problem");
  if (!KEY.test(given)) {
    problem.textContent = "A key begins with fr_ and is 46 characters long.";
    $("key").focus();
    return;
  }
  problem.textContent = "";
  key = given;
  const signal = session.signal;
  hold(button, true);
  try {
    const { value } = await call("/projects");
    $("key").value = "";
    enter(value.projects);
  } catch (error) {
    if (signal.aborted) return;
    key = null;
    problem.textContent = error.message;
    if (error.status === 429) await countDown(button, error.wait);
  } finally {
    hold(button, false);
  }
}

function forget(sentence = "") {
  key = null;
  session.abort();
  scope.abort();
  session = new AbortController();
  asked = { print: "", key: "" };
  project = null;
  documents = [];
  closeDocument();
  for (const id of ["project", "jobs", "documents", "news", "ask-problem", "library-note"]) {
    $(id).replaceChildren();
  }
  $("ask-form").reset();
  $("key").value = "";
  $("key-problem").textContent = sentence;
  $("jobs-section").hidden = $("room").hidden = $("forget").hidden = true;
  $("door").hidden = false;
  document.title = "Baton";
  showKind();
  $("key").focus();
}

function enter(projects) {
  const groups = new Map();
  for (const each of projects) {
    const group = each.organization_name ?? "Personal";
    groups.set(group, [...(groups.get(group) ?? []), node("option", { value: each.id }, each.name)]);
  }
  const grouped = [...groups].map(([label, options]) => node("optgroup", { label }, ...options));
  const select = $("project");
  select.replaceChildren(...(groups.size > 1 ? grouped : [...groups.values()].flat()));
  $("door").hidden = true;
  $("room").hidden = $("forget").hidden = false;
  hold($("ask"), projects.length === 0);
  if (projects.length) {
    select.focus();
    background(choose(projects[0].id));
  } else {
    $("library-note").textContent =
      "This key sees no project yet. Make one with: baton project create NAME --user EMAIL";
    $("forget").focus();
  }
}

// --- A project ------------------------------------------------------------------------------

async function choose(id) {
  scope.abort();
  scope = new AbortController();
  const { signal } = scope;
  project = id;
  documents = [];
  closeDocument();
  listDocuments();
  $("jobs").replaceChildren();
  $("jobs-section").hidden = true;
  const note = $("library-note");
  const tell = (sentence) => (note.textContent = sentence);
  tell("Loading…");
  $("library").setAttribute("aria-busy", "true");
  const read = (path) => persist(() => call(path, { signal }), tell, signal);
  try {
    // Jobs first: one that ends meanwhile is then in both lists, and not in neither.
    const jobs = await read(`/jobs?project_id=${id}`);
    const [handoffs, insights] = await Promise.all([
      read(`/handoffs?project_id=${id}`),
      read(`/projects/${id}/insights`),
    ]);
    const written = [
      ...handoffs.value.handoffs.map((each) => ({ ...each, kind: "handoff" })),
      ...insights.value.insights,
    ];
    documents = written.sort((a, b) => Date.parse(b.created_at) - Date.parse(a.created_at));
    listDocuments();
    if (!documents.length) tell("Nothing yet. Ask for the first one.");
    for (const job of jobs.value.jobs.reverse()) if (!job.done) addJob(job, 1, true);
  } finally {
    if (!signal.aborted) $("library").removeAttribute("aria-busy");
  }
}

function listDocuments() {
  $("documents").replaceChildren(
    ...documents.map((each) => {
      const button = node(
        "button",
        { type: "button", onclick: () => openDocument(each, true) },
        node("span", { className: "what" }, each.title),
        node("span", { className: "when" }, `${nameOf(each.kind)}, `, time(each.created_at)),
      );
      if (each === current) button.setAttribute("aria-current", "true");
      return node("li", {}, button);
    }),
  );
}

// --- Asking ---------------------------------------------------------------------------------

function chosenKind() {
  const checked = document.querySelector("#kinds input:checked");
  return KINDS.find((each) => each.kind === checked?.value) ?? KINDS[0];
}

function showKind() {
  const { kind, label, detail } = chosenKind();
  if (!isHeld($("ask"))) $("ask").textContent = label;
  $("detail-field").hidden = !detail;
  $("style-field").hidden = kind !== "release_notes";
  if (detail) {
    $("detail-label").textContent = detail[1];
    $("detail").maxLength = detail[2];
  }
}

function wanted() {
  const { kind, path, detail } = chosenKind();
  const body = { job: { dedupe: "in_flight" } };
  if (kind === "handoff") body.project_id = project;
  if (kind === "release_notes") body.style = $("style").value;
  if (detail && $("detail").value.trim()) body[detail[0]] = $("detail").value.trim();
  if ($("until").value) body.until = new Date($("until").value).toISOString();
  return { path: path(project), body };
}

async function ask(event) {
  event.preventDefault();
  const button = $("ask");
  const problem = $("ask-problem");
  if (isHeld(button) || !project) return;
  const { path, body } = wanted();
  // Asked again after an answer was lost, it is the same request and not a second one.
  const print = path + JSON.stringify(body);
  if (asked.print !== print) asked = { print, key: newKey() };
  const { signal } = scope;
  problem.textContent = "";
  hold(button, true);
  try {
    const headers = { "Idempotency-Key": `"${asked.key}"` };
    const { value, wait } = await call(path, { method: "POST", body, headers });
    asked = { print: "", key: "" };
    if (!signal.aborted) addJob(value.job, wait);
  } catch (error) {
    if (!(error instanceof Problem)) return;
    if (!error.passes) asked = { print: "", key: "" };
    problem.textContent = error.message;
    if (error.status === 429) await countDown(button, error.wait);
  } finally {
    hold(button, false);
    showKind();
  }
}

function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16)); // randomUUID needs https
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// --- A job ----------------------------------------------------------------------------------

/** Show a job and follow it to its end. `found`: it ran already, its reader has not asked now. */
function addJob(job, wait, found = false) {
  const known = $("jobs").querySelector(`[data-job="${job.id}"]`);
  if (known) {
    say(`${nameOf(job.kind)}: it is being written already.`);
    known.querySelector("button")?.focus();
    return null;
  }
  const title = node("h3", { id: `job-${job.id}` }, nameOf(job.kind));
  const card = {
    job,
    openings: found ? -1 : openings,
    stop: new AbortController(),
    bar: node("progress", { max: 1 }),
    state: node("p", { className: "state" }),
    detail: node("p", { className: "detail" }),
    buttons: node("div", { className: "buttons" }),
  };
  card.element = node("section", { className: "card" }, title, card.bar, card.state, card.detail,
    card.buttons);
  card.element.dataset.job = job.id;
  card.element.setAttribute("aria-labelledby", title.id);
  card.bar.setAttribute("aria-labelledby", title.id);
  $("jobs").prepend(card.element);
  $("jobs-section").hidden = false;
  showJob(card, job);
  background(follow(card, wait));
  return card;
}

function showJob(card, job) {
  card.job = job;
  const { element, bar, state } = card;
  const failed = job.status === "failed";
  element.setAttribute("aria-busy", String(!job.done));
  bar.hidden = job.done;
  const value = job.status === "pending" ? null : job.progress.value;
  if (value === null) bar.removeAttribute("value");
  else bar.value = value;
  state.classList.toggle("problem", failed && job.outcome !== "cancelled");
  setText(state, sentenceOf(job));
  setText(card.detail, detailOf(job));
  say(`${nameOf(job.kind)}: ${sentenceOf(job)}`);
  const actions = [];
  if (!job.done) actions.push(["Cancel", cancel]);
  if (failed && job.error_meta?.retryable !== false) actions.push(["Try again", retry]);
  if (failed) actions.push(["Dismiss", dismiss]);
  const labels = actions.map(([label]) => label).join();
  if (card.labels === labels) return;
  card.labels = labels;
  const focused = card.buttons.contains(document.activeElement);
  card.buttons.replaceChildren(
    ...actions.map(([label, act]) => {
      const button = node("button", { type: "button" }, label);
      button.setAttribute("aria-describedby", `job-${job.id}`);
      button.onclick = () => background(perform(card, button, act));
      return button;
    }),
  );
  if (focused) card.buttons.querySelector("button")?.focus();
}

function sentenceOf(job) {
  if (job.status === "failed") return job.error;
  if (job.recovering) return "Its worker was lost; another one takes over.";
  const step = STEPS[job.progress.step] ?? job.progress.step;
  if (job.queue) {
    const { position, capped } = job.queue;
    if (capped) return "Queued, behind a thousand others";
    return position === 1 ? "Queued, next in line" : `Queued, number ${position} in line`;
  }
  return job.progress.message ? `${step}, ${job.progress.message}` : step;
}

/** What changes every second, so it is not read aloud. */
function detailOf(job) {
  if (job.done) return "";
  const seconds = (moment) => Math.round((Date.parse(moment) - Date.now() - skew) / 1000);
  const age = Math.max(0, -seconds(job.created_at));
  const left = job.eta ? seconds(job.eta.done_at) : 0;
  return left > 0 ? `${duration(age)} so far, about ${duration(left)} left` : `${duration(age)} so far`;
}

function duration(seconds) {
  if (seconds < 60) return `${seconds} s`;
  return seconds < 3600 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

/** Read the job whenever the stream says that it changed; by the clock when there is no stream. */
async function follow(card, wait) {
  const signal = AbortSignal.any([scope.signal, card.stop.signal]);
  const watch = { changed: Promise.withResolvers(), streaming: false };
  const ticking = setInterval(() => setText(card.detail, detailOf(card.job)), 1000);
  background(listen(card, watch, signal));
  try {
    while (!card.job.done) {
      const byClock = card.job.status === "pending" || !watch.streaming;
      await Promise.race([sleep(byClock ? wait * 1000 : LOOK_EVERY, signal), watch.changed.promise]);
      watch.changed = Promise.withResolvers();
      try {
        const { value, wait: next } = await call(`/jobs/${card.job.id}`, { signal });
        wait = next || 2;
        showJob(card, value.job);
        if (value.result) finish(card, value.result);
        else if (value.job.status === "completed") lose(card, "Its document has been deleted.");
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        wait = error.wait;
        if (error.passes) setText(card.state, error.message);
        else lose(card, error.message);
      }
    }
  } finally {
    clearInterval(ticking);
    card.stop.abort();
  }
}

/** Follow the log of a job over Server-Sent Events; EventSource cannot send the key. */
async function listen(card, watch, signal) {
  if (streams >= STREAMS) return;
  streams += 1;
  let last = "";
  try {
    for (;;) {
      let pause = 2; // seconds
      try {
        const response = await fetch(`${API}/jobs/${card.job.id}/events`, {
          cache: "no-store",
          headers: {
            Accept: "text/event-stream",
            Authorization: `Bearer ${key}`,
            ...(last && { "Last-Event-ID": last }),
          },
          signal,
        });
        if (response.status === 204) return; // it has ended, and all of it is told
        if (!response.ok && response.status !== 429 && response.status < 500) return;
        if (response.ok) {
          watch.streaming = true;
          for await (const event of serverEvents(response.body)) {
            last = event.id || last;
            pause = event.retry / 1000 || pause;
            // What the page shows already is no news.
            if (event.data && JSON.parse(event.data).at !== card.job.updated_at) {
              watch.changed.resolve();
            }
          }
        } else {
          pause = retryAfter(response) || pause;
        }
      } catch {
        signal.throwIfAborted();
      }
      watch.streaming = false;
      watch.changed.resolve();
      await sleep(pause * 1000, signal);
    }
  } finally {
    streams -= 1;
  }
}

async function* serverEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = {};
      for (const line of block.split("\n")) {
        const colon = line.indexOf(":");
        if (colon > 0) event[line.slice(0, colon)] = line.slice(colon + 1).trimStart();
      }
      yield event;
    }
  }
}

function finish(card, result) {
  const written = { ...result, kind: card.job.kind };
  const focus = document.activeElement;
  const waiting = focus === document.body || focus === $("ask") || card.element.contains(focus);
  documents = [written, ...documents.filter((each) => each.id !== written.id)];
  $("library-note").textContent = "";
  dismiss(card);
  if (card.openings === openings) openDocument(written, waiting);
  else listDocuments();
  say(`${nameOf(written.kind)} is ready: ${written.title}`);
}

/** There is nothing more to hear of a job: it cannot be read, or not what it made. */
function lose(card, error) {
  const lost = { done: true, status: "failed", outcome: "failed", error_meta: { retryable: false } };
  showJob(card, { ...card.job, ...lost, error });
}

async function perform(card, button, act) {
  if (isHeld(button)) return;
  hold(button, true);
  try {
    await act(card);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    setText(card.state, error.message);
    if (error.status === 429) await countDown(button, error.wait);
  } finally {
    hold(button, false);
  }
}

async function cancel(card) {
  const { value } = await call(`/jobs/${card.job.id}/cancel`, { method: "POST" });
  if (value.job.status === "completed") return; // just now; whoever follows it shows it
  card.stop.abort();
  showJob(card, value.job);
}

async function retry(card) {
  card.retryKey ??= newKey();
  const headers = { "Idempotency-Key": `"${card.retryKey}"` };
  const { value, wait } = await call(`/jobs/${card.job.id}/retry`, { method: "POST", headers });
  const again = addJob(value.job, wait);
  again?.buttons.querySelector("button")?.focus();
  dismiss(card);
}

function dismiss(card) {
  const focused = card.element.contains(document.activeElement);
  card.stop.abort();
  card.element.remove();
  $("jobs-section").hidden = !$("jobs").childElementCount;
  if (focused) $("ask").focus();
}

// --- A document -----------------------------------------------------------------------------

function openDocument(artifact, focus) {
  openings += 1;
  current = artifact;
  const sheet = $("sheet");
  sheet.replaceChildren(...markdown(artifact.markdown));
  let heading = sheet.querySelector("h2, h3, h4");
  if (!heading) sheet.prepend((heading = node("h2", {}, artifact.title)));
  heading.id = "document-title";
  heading.tabIndex = -1;
  $("document-note").replaceChildren(
    `${nameOf(artifact.kind)}, written `,
    time(artifact.created_at),
  );
  $("document").hidden = false;
  document.title = `${artifact.title} · Baton`;
  listDocuments();
  if (focus) {
    heading.focus({ preventScroll: true });
    const { top } = $("document").getBoundingClientRect();
    if (top < 0 || top > innerHeight / 2) $("document").scrollIntoView();
  }
}

function closeDocument() {
  if (!current) return;
  const at = documents.indexOf(current);
  current = null;
  $("document").hidden = true;
  $("sheet").replaceChildren();
  document.title = "Baton";
  listDocuments();
  $("documents").children[at]?.querySelector("button").focus();
}

async function copyMarkdown() {
  const text = current.markdown;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // without https there is no clipboard API
    const area = node("textarea", { value: text, className: "unseen" });
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    focused?.focus();
  }
  const button = $("copy");
  button.textContent = "Copied";
  say("The Markdown is in the clipboard.");
  setTimeout(() => (button.textContent = "Copy Markdown"), 2000);
}

// --- Markdown -------------------------------------------------------------------------------
//
// What Baton writes: headings, paragraphs, lists in lists, quotes, code, emphasis and links. HTML
// is text here, a picture is its description, and a link leads to http or https or is no link.

const DEPTH = 8; // of lists, quotes and emphasis in each other; deeper, it is text
const ITEM = /^( {0,3})([-+*]|\d{1,9}[.)])( {1,4}(?=\S)|\s*$)/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
const FENCE = /^ {0,3}(`{3,}|~{3,})[^`]*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const STARTS = [HEADING, FENCE, RULE, QUOTE, ITEM];
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };

function markdown(text) {
  return blocks(String(text).split(/\r\n?|\n/), 0);
}

function blocks(lines, depth) {
  const nodes = [];
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    let found;
    if (!line.trim()) {
      at += 1;
    } else if ((found = HEADING.exec(line))) {
      const level = Math.min(found[1].length + 1, 6); // the page has its own h1
      nodes.push(node(`h${level}`, {}, ...inline(found[2] ?? "", 0)));
      at += 1;
    } else if ((found = FENCE.exec(line))) {
      const end = lines.findIndex((l, i) => i > at && l.trim().startsWith(found[1]));
      const code = lines.slice(at + 1, end < 0 ? undefined : end).join("\n");
      nodes.push(node("pre", { tabIndex: 0 }, node("code", {}, code)));
      at = end < 0 ? lines.length : end + 1;
    } else if (RULE.test(line)) {
      nodes.push(node("hr"));
      at += 1;
    } else if (depth < DEPTH && QUOTE.test(line)) {
      const quoted = [];
      while (at < lines.length && QUOTE.test(lines[at])) quoted.push(lines[at++].replace(QUOTE, ""));
      nodes.push(node("blockquote", {}, ...blocks(quoted, depth + 1)));
    } else if (depth < DEPTH && ITEM.test(line)) {
      const [list, next] = listAt(lines, at, depth);
      nodes.push(list);
      at = next;
    } else {
      const paragraph = [lines[at++]];
      while (at < lines.length && lines[at].trim() && !STARTS.some((s) => s.test(lines[at]))) {
        paragraph.push(lines[at++]);
      }
      nodes.push(node("p", {}, ...inline(paragraph.map((l) => l.trimStart()).join("\n"), 0)));
    }
  }
  return nodes;
}

/** The list that begins at a line, and the line after it. */
function listAt(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const ordered = first[2].length > 1;
  const list = node(ordered ? "ol" : "ul");
  if (ordered) list.start = parseInt(first[2], 10);
  for (let item; at < lines.length && (item = ITEM.exec(lines[at])); ) {
    if (item[2].at(-1) !== first[2].at(-1) || RULE.test(lines[at])) break;
    const indent = item[1].length + item[2].length + (item[3].length || 1);
    const inner = [lines[at++].slice(item[0].length)];
    for (; at < lines.length; at += 1) {
      const line = lines[at];
      const inside = line.search(/\S/) >= indent;
      const more = !line.trim() && lines[at + 1]?.search(/\S/) >= indent;
      const lazy = line.trim() && inner.at(-1).trim() && !STARTS.some((s) => s.test(line));
      if (!inside && !more && !lazy) break;
      inner.push(inside ? line.slice(indent) : line.trimStart());
    }
    const nodes = blocks(inner, depth + 1);
    const tight = nodes.filter((each) => each.nodeName === "P").length === 1;
    list.append(node("li", {}, ...nodes.flatMap((each) =>
      tight && each.nodeName === "P" ? [...each.childNodes] : [each])));
    let next = at;
    while (next < lines.length && !lines[next].trim()) next += 1;
    if (ITEM.test(lines[next] ?? "")) at = next;
  }
  return [list, at];
}

function inline(text, depth) {
  const nodes = [];
  const hopeless = new Set(); // what has no end after here has none further on: linear, not square
  let plain = "";
  const push = (...made) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(...made);
  };
  for (let at = 0; at < text.length; ) {
    const found = depth < DEPTH ? inlineAt(text, at, depth, hopeless) : null;
    if (!found) {
      plain += text[at++];
    } else if (typeof found.made === "string") {
      plain += found.made;
      at = found.next;
    } else {
      push(...found.made);
      at = found.next;
    }
  }
  push();
  return nodes;
}

/** What begins at this place: nodes or a text, and where it ends; null when it is just a letter. */
function inlineAt(text, at, depth, hopeless) {
  const rest = (pattern) => {
    pattern.lastIndex = at;
    return pattern.exec(text);
  };
  let found;
  switch (text[at]) {
    case "\\":
      if (text[at + 1] === "\n") return { made: [node("br")], next: at + 2 };
      found = rest(/\\([!-/:-@[-`{-~])/y);
      return found && { made: found[1], next: at + 2 };
    case "\n":
      return { made: " ", next: at + 1 };
    case " ":
      found = rest(/ {2,}\n/y);
      return found && { made: [node("br")], next: at + found[0].length };
    case "&":
      found = rest(/&(?:#(\d{1,7})|#x([0-9a-f]{1,6})|([a-z]{2,6}));/iy);
      return found && entity(found, at);
    case "<":
      found = rest(/<(https?:\/\/[^\s<>]{1,2000})>/iy);
      return found && { made: [link(found[1], [found[1]])], next: at + found[0].length };
    case "`":
      return codeAt(text, at, hopeless);
    case "!":
      found = text[at + 1] === "[" ? linkAt(text, at + 1) : null;
      return found && { made: found.label, next: found.next };
    case "[":
      found = linkAt(text, at);
      return found && { made: [link(found.address, inline(found.label, depth + 1))], next: found.next };
    case "*":
    case "_":
      return emphasisAt(text, at, depth, hopeless);
    default:
      return null;
  }
}

function entity([whole, decimal, hex, name], at) {
  const code = decimal ? parseInt(decimal, 10) : hex ? parseInt(hex, 16) : 0;
  const known = name ? ENTITIES[name] : 0 < code && code < 0x110000 && String.fromCodePoint(code);
  return known ? { made: known, next: at + whole.length } : null;
}

function codeAt(text, at, hopeless) {
  const ticks = /`+/y;
  ticks.lastIndex = at;
  const [run] = ticks.exec(text);
  if (!hopeless.has(run)) {
    const end = new RegExp(`(?<!\`)${run}(?!\`)`, "g");
    end.lastIndex = at + run.length;
    const closing = end.exec(text);
    if (closing) {
      const code = text.slice(at + run.length, closing.index).replaceAll("\n", " ");
      const shown = /^ .*[^ ].* $/.test(code) ? code.slice(1, -1) : code;
      return { made: [node("code", {}, shown)], next: closing.index + run.length };
    }
    hopeless.add(run);
  }
  return { made: run, next: at + run.length };
}

/** The label and the address of `[label](address)`. */
function linkAt(text, at) {
  let open = 0;
  for (let end = at; end < Math.min(text.length, at + 1000); end += 1) {
    if (text[end] === "\\") end += 1;
    else if (text[end] === "[") open += 1;
    else if (text[end] === "]" && --open === 0) {
      const target = /\(\s*(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\([^\s()]*\))*))(?:\s+"[^"]*")?\s*\)/y;
      target.lastIndex = end + 1;
      const found = target.exec(text);
      if (!found) return null;
      const address = (found[1] ?? found[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1");
      return { label: text.slice(at + 1, end), address, next: target.lastIndex };
    }
  }
  return null;
}

function link(address, label) {
  let url = null;
  try {
    if (/^https?:\/\//i.test(address)) url = new URL(address);
  } catch {
    // not an address
  }
  if (!url) return node("span", {}, ...label);
  return node("a", { href: url.href, rel: "noreferrer noopener", target: "_blank" }, ...label);
}

function emphasisAt(text, at, depth, hopeless) {
  const mark = text[at] === text[at + 1] ? text[at].repeat(2) : text[at];
  const plain = { made: mark, next: at + mark.length };
  const word = /[\p{L}\p{N}]/u;
  const inWord = (before, after) => mark[0] === "_" && word.test(before) && word.test(after);
  const after = text[at + mark.length] ?? " ";
  if (/\s/.test(after) || inWord(text[at - 1] ?? " ", after) || hopeless.has(mark)) return plain;
  for (let end = at + mark.length; end < text.length; end += 1) {
    if (text[end] === "\\") end += 1;
    else if (text[end] === "`") end = codeAt(text, end, hopeless).next - 1;
    else if (text[end] === mark[0]) {
      let run = 1;
      while (text[end + run] === mark[0]) run += 1;
      const closes = !/\s/.test(text[end - 1]) && !inWord(text[end - 1], text[end + run] ?? " ");
      if (closes && (run === mark.length || run === 3)) {
        const inner = text.slice(at + mark.length, end + run - mark.length);
        const name = mark.length === 2 ? "strong" : "em";
        return { made: [node(name, {}, ...inline(inner, depth + 1))], next: end + run };
      }
      end += run - 1;
    }
  }
  hopeless.add(mark);
  return plain;
}

// --- Nodes ----------------------------------------------------------------------------------

/** An element with properties and children; a string becomes a text node, never markup. */
function node(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

function time(moment) {
  const format = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
  return node("time", { dateTime: moment }, format.format(new Date(moment)));
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Tell those who listen to the page instead of looking at it. */
function say(sentence) {
  setText($("news"), sentence);
}

/** A button that is held does nothing, but keeps the focus that `disabled` would take away. */
function hold(button, held) {
  button.setAttribute("aria-disabled", String(held));
}

function isHeld(button) {
  return button.getAttribute("aria-disabled") === "true";
}

async function countDown(button, seconds) {
  const label = button.textContent;
  for (let left = seconds; left > 0; left -= 1) {
    button.textContent = `Wait ${left} s`;
    await sleep(1000, session.signal).catch(() => (left = 0));
  }
  button.textContent = label;
}

// --- The page -------------------------------------------------------------------------------

for (const { kind, name, about } of KINDS) {
  const radio = node("input", { type: "radio", name: "kind", value: kind });
  radio.defaultChecked = kind === KINDS[0].kind;
  $("kinds").append(node("label", {}, radio, name, node("small", {}, about)));
}
showKind();
checkHealth();

$("key-form").addEventListener("submit", open);
$("ask-form").addEventListener("submit", ask);
$("kinds").addEventListener("change", () => {
  $("detail").value = "";
  showKind();
});
$("project").addEventListener("change", () => background(choose($("project").value)));
$("forget").addEventListener("click", () => forget());
$("copy").addEventListener("click", copyMarkdown);
$("print").addEventListener("click", () => print());
$("close").addEventListener("click", closeDocument);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") closeDocument();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) checkHealth();
});
