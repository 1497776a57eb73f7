// What can be done at a bubble, in one quiet row: only what can be done is there.
import { LIMITS, t } from "./data.js"
import { dropdown, find, h, sign } from "./dom.js"
import { say } from "./notice.js"
import { again, ask, busy, goOn } from "./replies.js"
import { branch, show } from "./state.js"
import { change, newReply, talk as stored } from "./store.js"

const actions = []
export const unfolded = new Set() // replies whose provenance is shown
function unfold(talk, reply) {
  if (!unfolded.delete(reply.id)) unfolded.add(reply.id)
  document.dispatchEvent(new CustomEvent("zhenhuan:changed", { detail: { id: talk.id } }))
}

// Another module adds one: {key, icon?, label, of: "hers"|"yours", where: "row"|"more", shown?, run}.
export function addAction(action) {
  actions.push(action)
}

const last = (talk, turn) => talk.turns.at(-1)?.id === turn.id
const unfinished = (reply) => reply.state === "broken" || reply.state === "edited" || (reply.facts?.finish_reason ?? "stop") !== "stop" || (reply.state === "done" && !reply.facts)
const copy = (text, done = "copied") => navigator.clipboard.writeText(text).then(() => say(t(done)))

addAction({ key: "again", label: "again", of: "hers", where: "row", shown: (talk, turn) => last(talk, turn) && !busy(), run: (talk, turn) => again(talk, turn) })
addAction({ key: "go_on", label: "go_on", of: "hers", where: "row", shown: (talk, turn, reply) => last(talk, turn) && !busy() && reply.text && unfinished(reply), run: (talk, turn) => goOn(talk, turn) })
addAction({ key: "edit", label: "edit", of: "hers", where: "row", shown: (_, __, reply) => reply.text, run: rewrite })
addAction({ key: "copy", label: "copy", of: "hers", where: "row", shown: (_, __, reply) => reply.text, run: (_, __, reply) => copy(reply.text) })
addAction({ key: "pin", label: (reply) => (reply.pinned ? "unpin" : "pin"), of: "hers", where: "row", shown: (_, __, reply) => reply.text, pressed: (reply) => Boolean(reply.pinned), run: pin })
addAction({ key: "branch", label: "branch", of: "hers", where: "more", run: (talk, turn) => openBranch(talk, turn) })
addAction({ key: "provenance", label: "provenance", of: "hers", where: "more", shown: (_, __, reply) => reply.facts, run: (talk, _, reply) => unfold(talk, reply) })
addAction({ key: "same_again", label: "same_again", of: "hers", where: "more", shown: (talk, turn, reply) => reply.facts && talk.turns[0].id === turn.id, run: (_, turn, reply) => copy(sameAgain(turn, reply)) })
addAction({ key: "delete", label: "delete", of: "hers", where: "more", shown: () => !busy(), run: remove })
addAction({ key: "edit", label: "edit", of: "yours", where: "row", shown: () => !busy(), run: reword })
addAction({ key: "copy", label: "copy", of: "yours", where: "row", run: (_, turn) => copy(turn.question) })

function button({ key, icon, label, run, pressed }, talk, turn, reply) {
  const name = t(typeof label === "function" ? label(reply) : label)
  const act = (event) => run(stored(talk.id), stored(talk.id).turns.find((each) => each.id === turn.id), reply, event.currentTarget)
  return h("button", { "data-action": key, "aria-label": name, title: name, "aria-pressed": pressed ? `${pressed(reply)}` : undefined, onclick: act }, sign(key, icon))
}

export function actionsOf(of, talk, turn, reply) {
  const row = h("div", { class: `actions ${of}` })
  const fit = actions.filter((each) => each.of === of && (each.shown?.(talk, turn, reply) ?? true))
  if (of === "hers" && turn.replies.length > 1) row.append(...leaf(talk, turn))
  row.append(...fit.filter(({ where }) => where === "row").map((each) => button(each, talk, turn, reply)))
  if (reply?.state === "edited" && of === "hers") row.append(h("span", { class: "mark" }, t("edited")))
  const more = fit.filter(({ where }) => where === "more")
  if (!more.length || !reply?.id) return row
  const open = h("button", { "data-action": "more", "aria-label": t("more"), title: t("more"), "aria-haspopup": "menu", "aria-expanded": "false", onclick: () =>
    dropdown(open, more.map(({ key, label, run }) => ({ key, label: t(label), run: () => run(stored(talk.id), turn, reply, open) }))) }, sign("more"))
  row.append(h("span", { class: "holder" }, open))
  return row
}

function leaf(talk, turn) {
  const turnTo = (step) => change(talk.id, (each) => {
    const here = each.turns.find((one) => one.id === turn.id)
    here.at = (here.at + step + here.replies.length) % here.replies.length
  }, { touch: false })
  const step = (key, by) => h("button", { "data-action": key, "aria-label": t(key), title: t(key), onclick: () => turnTo(by) }, sign(key))
  return [step("earlier", -1), h("span", { class: "count" }, `${turn.at + 1} / ${turn.replies.length}`), step("later", 1)]
}

function pin(talk, turn, reply) {
  return change(talk.id, (each) => {
    const found = each.turns.find((one) => one.id === turn.id).replies.find((one) => one.id === reply.id)
    found.pinned = found.pinned ? undefined : Date.now()
  }, { touch: false })
}

async function openBranch(talk, turn) {
  show(await change(branch(talk, talk.turns.findIndex((each) => each.id === turn.id) + 1)))
}

async function remove(talk, turn) {
  const at = talk.turns.findIndex((each) => each.id === turn.id), gone = talk.turns[at]
  await change(talk.id, (each) => { each.turns = each.turns.filter((one) => one.id !== turn.id) })
  say(t("deleted"), { label: t("undo"), run: () => change(talk.id, (each) => { each.turns.splice(at, 0, gone) }) })
}

function sameAgain(turn, reply) {
  return new URL(`?${reply.facts.link}&q=${encodeURIComponent(turn.question)}`, location.href.split(/[?#]/)[0]).href
}

// A field in the bubble's place. `done` gets the new words.
function editor(bubble, text, label, name, done) {
  const field = h("textarea", { "aria-label": t(label), rows: 3, dir: "auto" })
  field.value = text
  const close = () => { form.replaceWith(bubble); bubble.focus() }
  const form = h("form", { class: "editor", onsubmit: (event) => { event.preventDefault(); const words = field.value.trim(); close(); if (words && words !== text) done(words) } },
    field, h("div", {}, h("button", { class: "primary" }, t(name)), h("button", { type: "button", onclick: close }, t("cancel"))))
  form.addEventListener("keydown", (event) => { if (event.key === "Escape") close() })
  bubble.replaceWith(form)
  field.focus()
}
const bubbleOf = (turn, who) => find(`[data-turn="${turn.id}"] .bubble.${who}`)

// The visitor's wording becomes one more reply; hers stays among the others.
function rewrite(talk, turn, reply) {
  editor(bubbleOf(turn, "hers"), reply.text, "revised", "save", (text) => change(talk.id, (each) => {
    const here = each.turns.find((one) => one.id === turn.id)
    here.replies.splice(here.at + 1, 0, newReply({ text: text.slice(0, 2 * LIMITS.characters), state: "edited" }))
    here.at += 1
  }))
}

// An edited question is asked in a branch: the old talk keeps the old question and all that followed.
function reword(talk, turn) {
  editor(bubbleOf(turn, "yours"), turn.question, "asked", "ask_again", (question) =>
    ask(branch(talk, talk.turns.findIndex((each) => each.id === turn.id)), question))
}
