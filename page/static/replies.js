// Her replies: asked for through Gradio, and written into the talk they were asked in, whichever is in view.
import { LIMITS, t } from "./data.js"
import { find } from "./dom.js"
import { box, mounted, port, press, write } from "./gradio.js"
import { say } from "./notice.js"
import { branch, changeShown, show, shown } from "./state.js"
import { TAB, change, newReply, newTurn, opened, shownReply, talk, talks } from "./store.js"

const BEAT = 1000 // ms between two writes of a growing reply
const SILENT = 5 * BEAT // after which no tab can be writing it any more
const FRESH = 10 * 60_000 // how old a question may be that is asked again by itself after a reload
const LATE = 2000 // ms in which Gradio may still tell that a reply ended which was stopped, without saying which
const LOOK = 3000 // ms between two looks whether the server is there

let running = null // the reply that grows in this tab: {talk, turn, reply, mode, text, hint, facts, opening}
let waiting = null // what to ask when the line is back
let stale = 0 // when a reply was last given up whose end Gradio has yet to tell

export const growing = (reply) => (running?.reply === reply.id ? running : null)
export const busy = () => running !== null

function messages(turns) {
  const said = turns.flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: shownReply(turn)?.text ?? "" },
  ])
  return said.filter((message) => message.content).slice(-LIMITS.turns)
}

function start(fields) {
  running = { text: "", hint: "", facts: null, written: Date.now(), heard: Date.now(), opening: "", ...fields }
  document.body.dataset.busy = running.mode
  if (!navigator.onLine) return interrupted()
  if (stale) stale = Date.now()
  press("ask")
  watch(running)
}

// Gradio tells nobody when a question does not reach the server: where nothing comes, we look ourselves.
async function watch(reply) {
  for (;;) {
    await new Promise((wait) => setTimeout(wait, LOOK))
    if (running !== reply) return
    if (Date.now() - reply.heard > LOOK && !(await reachable())) return interrupted()
  }
}

port.request = () => {
  if (!running) return ""
  const asked = talk(running.talk) ?? shown(), at = asked.turns.findIndex((turn) => turn.id === running.turn)
  const before = asked.turns.slice(0, at < 0 ? undefined : at), turn = asked.turns[at]
  const said = messages(before)
  if (running.mode === "continue") said.push({ role: "user", content: turn.question }, { role: "assistant", content: running.opening })
  const { scene, visitor, persona } = asked
  const { reply, mode } = running
  return JSON.stringify({ talk: asked.id, turn: turn?.id, reply, mode, messages: said, question: mode === "ask" ? turn.question : "", scene, visitor, persona })
}

// Ask in a talk, in its last turn's place or after it. Two tabs that ask at once each get a talk of their own.
export async function ask(where, question) {
  if (busy()) return say(t("busy"))
  const last = where.turns.at(-1)
  if (last && alive(shownReply(last))) where = branch(where, where.turns.length - 1)
  const turn = newTurn(question), reply = newReply()
  turn.replies.push(reply)
  await opened
  running = { talk: where.id } // from here on no other question
  const now = await change(where, (each) => {
    each.turns.push(turn)
    if (each.draft === question) each.draft = ""
  })
  if (now.turns.length === 1 || shown().id !== now.id) show(now)
  if (box()?.value === question) write("")
  start({ talk: now.id, turn: turn.id, reply: reply.id, mode: "ask" })
}

// Another reply to a turn. Where the talk went on after it, that stays in the old talk, and a branch begins here.
export async function again(where, turn) {
  if (busy()) return say(t("busy"))
  const at = where.turns.findIndex((each) => each.id === turn.id), reply = newReply()
  if (at < where.turns.length - 1) where = branch(where, at + 1)
  running = { talk: where.id }
  const now = await change(where, (each) => {
    const here = each.turns.find((one) => one.id === turn.id)
    here.replies = [...here.replies.filter((one) => one.text || alive(one)), reply]
    here.at = here.replies.length - 1
  })
  if (shown().id !== now.id) show(now)
  start({ talk: now.id, turn: turn.id, reply: reply.id, mode: "ask" })
}

// Continue her last reply in its bubble.
export async function goOn(where, turn) {
  if (busy()) return say(t("busy"))
  const reply = shownReply(turn)
  running = { talk: where.id }
  await change(where, (each) => {
    const found = each.turns.find((one) => one.id === turn.id).replies.find((one) => one.id === reply.id)
    Object.assign(found, { state: "growing", tab: TAB, beat: Date.now(), hint: "" })
  })
  start({ talk: where.id, turn: turn.id, reply: reply.id, mode: "continue", text: reply.text, opening: reply.text })
}

// Write a line for the visitor into the text box.
export function suggest() {
  if (busy()) return
  say(t("suggesting"))
  start({ talk: shown().id, turn: "", reply: "suggestion", mode: "suggest" })
}

const words = () => (running.hint && !running.facts ? "" : running.text)
const alive = (reply) => reply?.state === "growing" && Date.now() - reply.beat < SILENT && reply.tab !== TAB

port.replied = (json) => {
  const said = json && JSON.parse(json)
  if (!running || !said || said.reply !== running.reply) return []
  Object.assign(running, { text: said.text ?? "", hint: said.hint ?? "", facts: said.facts ?? null, heard: Date.now() })
  if (running.facts) stale = 0
  if (running.mode === "suggest") {
    if (words()) write(words().trim().split("\n")[0])
    if (running.hint) say(running.hint)
    return []
  }
  tell(false)
  if (Date.now() - running.written > BEAT) keep("growing")
  return []
}

function tell(ended) {
  const here = talk(running.talk), turn = here?.turns.find((each) => each.id === running.turn)
  if (turn) document.dispatchEvent(new CustomEvent("zhenhuan:reply", { detail: { talk: here, turn, reply: { ...shownReply(turn), ...said() }, ended } }))
}

const said = () => ({ text: running.text, hint: running.hint, facts: running.facts ?? undefined })

// Write the reply as far as it is into its talk.
function keep(state) {
  running.written = Date.now()
  const { talk: id, turn, reply } = running, fields = { ...said(), state, beat: Date.now() }
  return change(id, (each) => {
    const found = each.turns.find((one) => one.id === turn)?.replies.find((one) => one.id === reply)
    if (found) Object.assign(found, fields)
  })
}

async function end(state) {
  if (!running?.mode) return
  if (running.mode !== "suggest") {
    tell(true)
    const kept = keep(state)
    running = null
    delete document.body.dataset.busy
    await kept
  } else {
    find("#notice").replaceChildren()
    if (running.hint) say(running.hint)
    running = null
    delete document.body.dataset.busy
    draft()
  }
}

port.ended = (json) => {
  if (json) port.replied(json)
  else if (Date.now() - stale < LATE) return []
  if (!running) return []
  if (json && JSON.parse(json).reply !== running.reply) return []
  if (running.facts || running.hint || running.mode === "suggest") end(running.facts ? "done" : "broken")
  else interrupted()
  return []
}

// Nothing came, or no more will: what she said stays; where she said nothing, his words go back into the box.
async function interrupted() {
  if (!running?.mode || running.broken) return
  running.broken = true
  stale = Date.now()
  const { talk: id, turn, mode } = running, half = words() && words() !== running.opening
  const question = talk(id)?.turns.find((each) => each.id === turn)?.question ?? ""
  const online = navigator.onLine && (await reachable())
  if (running?.turn !== turn) return
  if (mode === "suggest") { say(t(online ? "broken" : "offline_half")); return end("broken") }
  if (half || mode === "continue") {
    await end(mode === "continue" && !half ? "done" : "broken")
    if (!online) {
      say(t("offline_half"))
      whenBack(() => { const here = talk(id), last = here?.turns.at(-1); if (last?.id === turn) again(here, last) })
    }
    return
  }
  await takeBack(id, turn, question)
  say(t(online ? "unreachable" : "offline"))
  if (online) return
  whenBack(() => { const here = talk(id); if (here?.draft === question) ask(here, question) })
}

// The question leaves the talk and stands in the box again, unless other replies to it are there.
async function takeBack(id, turn, question) {
  const reply = running.reply
  running = null
  delete document.body.dataset.busy
  const now = await change(id, (each) => {
    const here = each.turns.find((one) => one.id === turn)
    if (!here) return
    here.replies = here.replies.filter((one) => one.id !== reply)
    here.at = Math.max(0, here.replies.length - 1)
    if (here.replies.length) return
    each.turns = each.turns.filter((one) => one !== here)
    each.draft = each.draft || question
  })
  if (now && shown().id === id) write(now.draft)
}

const reachable = () => fetch("health", { cache: "no-store" }).then(() => true, () => false)

function whenBack(act) {
  clearInterval(waiting)
  const look = async () => {
    if (!navigator.onLine || !(await reachable()) || busy()) return
    clearInterval(waiting)
    find("#notice").replaceChildren()
    act()
  }
  waiting = setInterval(look, LOOK)
}

addEventListener("offline", () => { if (running?.mode) interrupted() })

async function stop() {
  if (!running?.mode) return
  stale = Date.now()
  const { talk: id, turn, mode } = running
  if (words() || mode !== "ask") return end("done")
  await takeBack(id, turn, talk(id).turns.find((each) => each.id === turn)?.question ?? "")
}
document.addEventListener("click", (event) => { if (event.target.closest?.("#composer .stop-button")) stop() })

// What the visitor typed and sent. Without a line the words come back into the box.
port.submitted = (text) => {
  const question = (text ?? "").trim()
  if (busy()) say(t("busy"))
  if (!question || busy()) return [text]
  ask(shown(), question)
  return [""]
}

// His words in the box are kept with the talk in view.
const draft = () => {
  const text = box()?.value ?? ""
  if ((shown().draft ?? "") !== text) changeShown((each) => { each.draft = text }, { touch: false })
}
document.addEventListener("input", (event) => { if (event.target === box()) draft() })
document.addEventListener("zhenhuan:shown", ({ detail }) => mounted.then(() => { if (detail.talk.id === shown().id) write(detail.talk.draft ?? "") }))

// After a reload in mid-reply: what nobody writes any more has ended, and the question in view is asked again.
export async function recover() {
  if (talks().some((each) => each.turns.length && alive(shownReply(each.turns.at(-1))))) setTimeout(recover, SILENT)
  for (const each of talks()) {
    const turn = each.turns.at(-1), reply = turn && shownReply(turn)
    if (reply?.state !== "growing" || alive(reply)) continue
    await change(each.id, (one) => { shownReply(one.turns.at(-1)).state = "broken" }, { touch: false })
    if (each.id === shown().id && Date.now() - turn.asked < FRESH) mounted.then(() => again(talk(each.id), turn))
  }
}
