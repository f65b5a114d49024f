"use strict";
// One question at a time. An answer is sent until the server has acknowledged it; only then comes the next question.
// Sending it again is harmless: the server takes each (trial, revision) once. All text goes in as textContent.

const LONGEST_MS = 3600000, FIRST_WAIT_MS = 500, LONGEST_WAIT_MS = 8000, GUARD_MS = 250;
const CHOICES = {"1": "left", "ArrowLeft": "left", "2": "right", "ArrowRight": "right", "0": "tie", "ArrowDown": "tie"};
const at = (id) => document.getElementById(id);
const sections = ["welcome", "trial", "end", "problem"];

let state = null;      // what the server said last
let shown = null;      // the trial on the page: state.current, or state.previous while it is corrected
let shownAt = 0;       // when both of its images could be seen; 0 until then
let busy = false;      // an answer is on its way

// -- talking to the server

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)};
  const response = await fetch(path, {cache: "no-store", credentials: "same-origin", ...options});
  let data = {};
  try { data = await response.json(); } catch (error) { if (response.ok) throw error; }
  if (!response.ok) throw new Refused(response.status, data.error || "the server answered " + response.status);
  return data;
}

// Until there is an answer: a lost connection, a restarted server and a full second are waited for.
async function askUntilAnswered(path, body) {
  for (let wait = FIRST_WAIT_MS; ; wait = Math.min(2 * wait, LONGEST_WAIT_MS)) {
    try {
      const data = await ask(path, body);
      say("");
      return data;
    } catch (error) {
      if (error instanceof Refused && error.status < 500 && error.status !== 429 && error.status !== 408) throw error;
      say("No connection just now. Your answer is kept here and sent again …");
      await pause(wait);
    }
  }
}

// -- showing

function show(name) {
  for (const section of sections) at(section).hidden = section !== name;
}

function say(text) {
  if (at("status").textContent !== text) at("status").textContent = text;
}

function fill(name, text) {
  for (const node of document.querySelectorAll(`[data-text="${name}"]`)) node.textContent = text;
}

function problem(text) {
  at("problem-text").textContent = text;
  show("problem");
}

function render(next) {
  state = next;
  document.title = state.question;
  fill("question", state.question);
  fill("questions", String(state.questions));
  fill("minutes", "about " + state.minutes + " min");
  at("tie").hidden = state.forced_choice;
  at("access").hidden = !state.needs_access_code;
  if (!state.joined) return show("welcome");
  at("progress").value = state.done / state.total;
  at("progress").textContent = state.done + " of " + state.total;
  at("link").value = location.origin + location.pathname + "#" + state.code;
  if (state.current) return showTrial(state.current);
  at("end-text").textContent = "All " + state.total + " answers are stored. You can close this page.";
  at("spoken").textContent = "Thank you. All answers are stored.";
  show("end");
  at("end").querySelector("h1").focus();
}

async function showTrial(trial) {
  const correcting = trial !== state.current;
  const number = state.done + (correcting ? 0 : 1);
  shown = trial;
  shownAt = 0;
  at("pair").classList.add("loading");
  at("count").textContent = number + " of " + state.total;
  at("prompt").textContent = trial.prompt;
  at("back").disabled = correcting || !state.previous;
  for (const button of document.querySelectorAll("#answers button")) {
    button.disabled = true;
    button.setAttribute("aria-pressed", String(trial.choice === button.dataset.choice));
  }
  for (const side of ["left", "right"]) at(side + "-frame").classList.toggle("chosen", trial.choice === side);
  show("trial");
  say(correcting ? "Your last answer: choose again to correct it, or the same to keep it." : "");
  await Promise.all(["left", "right"].map((side) => load(side, trial)));
  if (shown !== trial) return;
  at("pair").classList.remove("loading");
  for (const button of document.querySelectorAll("#answers button")) button.disabled = false;
  shownAt = performance.now();
  at("spoken").textContent = "Question " + number + " of " + state.total + ". " + trial.prompt;
  if (!correcting && state.next) for (const side of ["left", "right"]) new Image().src = address(state.next, side);
}

const address = (trial, side) => "images/" + trial.trial + "/" + side;

async function load(side, trial) {
  const image = at(side + "-image");
  for (let wait = FIRST_WAIT_MS; shown === trial; wait = Math.min(2 * wait, LONGEST_WAIT_MS)) {
    image.src = address(trial, side);
    try {
      await image.decode();
      break;
    } catch (error) {
      if (shown !== trial) return;
      say("The images do not load just now, trying again …");
      image.removeAttribute("src");
      await pause(wait);
    }
  }
  if (shown !== trial) return;
  image.classList.toggle("tiny", Math.max(image.naturalWidth, image.naturalHeight) <= 160);
  at(side + "-frame").style.setProperty("--ratio", String(image.naturalWidth / image.naturalHeight));
  if (at("status").textContent.startsWith("The images")) say("");
}

// -- answering

async function answer(choice) {
  if (busy || !shownAt || performance.now() - shownAt < GUARD_MS || at(choice).hidden) return;
  busy = true;
  const trial = shown, ms = Math.min(LONGEST_MS, Math.round(performance.now() - shownAt));
  for (const side of ["left", "right"]) at(side + "-frame").classList.toggle("chosen", choice === side);
  for (const button of document.querySelectorAll("#answers button")) {
    button.disabled = true;
    button.setAttribute("aria-pressed", String(choice === button.dataset.choice));
  }
  at("back").disabled = true;
  try {
    const body = {trial: trial.trial, choice: choice, revision: trial.revision, ms: ms};
    render(trial.choice === choice ? state : await askUntilAnswered("api/answer", body));
  } catch (error) {
    await begin();  // another tab is further, or the answers were deleted: show what is so now
  } finally {
    busy = false;
  }
}

function back() {
  if (!busy && state && state.joined && state.previous && shown !== state.previous) showTrial(state.previous);
}

function onKey(event) {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || at("trial").hidden || at("menu").open) return;
  if (event.key === "Backspace") { event.preventDefault(); return back(); }
  if (!Object.hasOwn(CHOICES, event.key)) return;
  event.preventDefault();
  answer(CHOICES[event.key]);
}

// -- joining, leaving

async function join(event) {
  event.preventDefault();
  at("start").disabled = true;
  at("join-error").textContent = "";
  try {
    render(await ask("api/join", {consent: true, access_code: at("access-code").value}));
  } catch (error) {
    at("join-error").textContent = error instanceof Refused ? sentence(error.message)
      : "No connection to the study just now: please try again.";
  } finally {
    at("start").disabled = false;
  }
}

async function withdraw() {
  const button = at("withdraw");
  if (button.dataset.asked !== "yes") {
    button.dataset.asked = "yes";
    button.textContent = "Yes, delete them for good";
    return;
  }
  try {
    render(await ask("api/withdraw", {withdraw: true}));
    at("menu").close();
  } catch (error) {
    at("menu-error").textContent = "They could not be deleted just now: please try again.";
  }
}

function openMenu() {
  at("withdraw").dataset.asked = "no";
  at("withdraw").textContent = "Delete all my answers";
  at("copy").textContent = "Copy";
  at("menu-error").textContent = "";
  at("menu").showModal();
}

async function copyLink() {
  at("link").select();
  try { await navigator.clipboard.writeText(at("link").value); } catch (error) { document.execCommand("copy"); }
  at("copy").textContent = "Copied";
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + ".";

// A link with a code behind # goes on from another browser; the code then leaves the address bar.
async function begin() {
  try {
    const code = location.hash.slice(1);
    if (code) {
      history.replaceState(null, "", location.pathname);
      await ask("api/resume", {code: code});
    }
    render(await ask("api/state"));
  } catch (error) {
    problem(error instanceof Refused ? sentence(error.message) : "No connection to the study.");
  }
}

document.addEventListener("keydown", onKey);
for (const choice of ["left", "tie", "right"]) at(choice).addEventListener("click", () => answer(choice));
for (const side of ["left", "right"]) at(side + "-frame").addEventListener("click", () => answer(side));
at("join").addEventListener("submit", join);
at("back").addEventListener("click", back);
at("last").addEventListener("click", back);
at("more").addEventListener("click", openMenu);
at("end-more").addEventListener("click", openMenu);
at("close").addEventListener("click", () => at("menu").close());
at("copy").addEventListener("click", copyLink);
at("withdraw").addEventListener("click", withdraw);
at("retry").addEventListener("click", begin);
begin();
