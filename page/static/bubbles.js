// The talk in view, drawn from the store: each turn is drawn anew when it changed, a growing reply in its bubble alone.
import { actionsOf, unfolded } from "./actions.js"
import { greeting, lang, openers, t } from "./data.js"
import { find, h } from "./dom.js"
import { ask, busy, growing } from "./replies.js"
import { shown } from "./state.js"
import { shownReply } from "./store.js"

const view = find("#talk")

const clock = new Intl.DateTimeFormat(lang, { hour: "numeric", minute: "2-digit" })
const calendar = new Intl.DateTimeFormat(lang, { year: "numeric", month: "long", day: "numeric" })
function day(time) {
  const days = Math.round((new Date().setHours(0, 0, 0, 0) - new Date(time).setHours(0, 0, 0, 0)) / 864e5)
  return days === 0 ? t("today") : days === 1 ? t("yesterday") : calendar.format(time)
}
const stamp = (time) => h("time", { datetime: new Date(time).toISOString(), title: calendar.format(time) }, clock.format(time))

function bubble(who, text, { hint, properties = {} } = {}) {
  const words = h("div", { class: "words", dir: "auto" }, text)
  return h("div", { class: `bubble ${who}`, "data-testid": who === "hers" ? "bot" : "user", "aria-label": t(who === "hers" ? "name" : "you"), role: "group", ...properties },
    words, hint ? h("p", { class: "hint" }, hint) : null)
}

// Her greeting is not part of the talk: she was trained on talks that the visitor opens.
function opening(talk) {
  const choices = talk.turns.length ? null : h("div", { class: "openers" },
    ...openers(talk.scene).map((each) => h("button", { dir: "auto", onclick: () => { if (!busy()) ask(shown(), each) } }, each)))
  return h("article", { class: "turn opening" }, h("p", { class: "made" }, t("made")), bubble("hers", greeting(talk.scene), { properties: { lang } }), choices)
}

function replyParts(talk, turn, last) {
  const reply = shownReply(turn)
  if (!reply) return [waitingLine(t("open")), actionsOf("hers", talk, turn, { ...NONE }, last)]
  const now = growing(reply) ?? reply
  const text = now.text || (reply.state === "growing" ? t("writing") : "")
  const broken = reply.state === "broken" && !reply.hint ? t(reply.text ? "broken" : "open") : ""
  const parts = [bubble("hers", text, { hint: now.hint || broken, properties: { "data-reply": reply.id, "aria-busy": reply.state === "growing" ? "true" : undefined, class: `bubble hers${now.text ? "" : " silent"}${reply.state === "broken" ? " broken" : ""}` } })]
  if (unfolded.has(reply.id) && reply.facts) parts.push(provenance(reply.facts))
  if (reply.state !== "growing") parts.push(actionsOf("hers", talk, turn, reply, last))
  return parts
}
const NONE = { id: "", text: "", state: "broken" }
const waitingLine = (text) => h("p", { class: "hint" }, text)

function provenance(facts) {
  const rows = [
    ["facts_adapter", facts.adapter + (facts.digest ? ` (sha256 ${facts.digest}…)` : "")], ["facts_base", facts.base], ["facts_seed", facts.seed],
    ["facts_took", t("facts_speed", facts.tokens, facts.first_token, facts.speed)], ["facts_stop", t(`stop_${facts.finish_reason}`)],
  ]
  return h("dl", { class: "facts" }, ...rows.flatMap(([key, value]) => [h("dt", {}, t(key)), h("dd", {}, `${value}`)]))
}

function drawTurn(talk, turn, last, before) {
  const parts = []
  if (!before || day(before.asked) !== day(turn.asked)) parts.push(h("p", { class: "day" }, day(turn.asked)))
  const yours = bubble("yours", turn.question)
  const hers = replyParts(talk, turn, last), actions = actionsOf("yours", talk, turn, shownReply(turn), last)
  actions.prepend(stamp(turn.asked))
  const row = hers.at(-1)
  if (row.matches(".actions") && shownReply(turn)) row.prepend(stamp(shownReply(turn).time))
  return h("article", { class: "turn", "data-turn": turn.id }, ...parts, h("div", { class: "asked" }, actions, yours), ...hers)
}

let drawn = null // id of the talk whose turns are there
const marks = new WeakMap() // turn's element → what it was drawn from

export function draw() {
  const talk = shown(), low = view.scrollHeight - view.scrollTop - view.clientHeight < 60
  const head = `${talk.id} ${talk.scene} ${talk.turns.length > 0}`
  if (drawn !== head) view.replaceChildren(opening(talk))
  const there = new Map([...view.querySelectorAll("[data-turn]")].map((each) => [each.dataset.turn, each]))
  let place = view.firstElementChild
  talk.turns.forEach((turn, at) => {
    const last = at === talk.turns.length - 1, reply = shownReply(turn), before = talk.turns[at - 1]
    const mark = JSON.stringify([turn, last, busy(), unfolded.has(reply?.id), before?.asked])
    let element = there.get(turn.id)
    there.delete(turn.id)
    if (!element || (marks.get(element) !== mark && !element.querySelector(".editor"))) {
      const fresh = drawTurn(talk, turn, last, before)
      marks.set(fresh, mark)
      element?.replaceWith(fresh)
      element = fresh
    }
    if (place.nextElementSibling !== element) place.after(element)
    place = element
  })
  there.forEach((gone) => gone.remove())
  if (drawn !== head || low) toEnd()
  drawn = head
}

const toEnd = () => { view.scrollTop = find("#talk").querySelector("[data-turn]") ? view.scrollHeight : 0 }

document.addEventListener("zhenhuan:changed", ({ detail }) => { if (detail.id === shown().id) draw() })
document.addEventListener("zhenhuan:shown", () => { drawn = null; draw() })
document.addEventListener("zhenhuan:reply", ({ detail: { talk, reply } }) => {
  if (talk.id !== shown().id) return
  const low = view.scrollHeight - view.scrollTop - view.clientHeight < 60
  const element = view.querySelector(`[data-reply="${reply.id}"]`)
  if (!element) return
  element.classList.toggle("silent", !reply.text)
  element.querySelector(".words").textContent = reply.text || t("writing")
  element.querySelector(".hint")?.remove()
  if (reply.hint) element.append(h("p", { class: "hint" }, reply.hint))
  if (low) toEnd()
})
