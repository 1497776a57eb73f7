// The lists: talks with search, rename and delete, deleted ones, and pinned moments.
import { lang, sceneName, t, visitorName, PASSER_BY } from "./data.js"
import { dropdown, find, h, sign } from "./dom.js"
import { show, shown, startNew } from "./state.js"
import { change, erase, talks, titleOf } from "./store.js"

const dialog = find("#talks")
const date = new Intl.DateTimeFormat(lang, { month: "short", day: "numeric", hour: "numeric", minute: "2-digit" })
let part = "talks", sought = ""

export function openList(which = "talks") {
  part = which
  sought = ""
  draw()
  dialog.showModal()
}

const contains = (talk) => [titleOf(talk), ...talk.turns.flatMap((turn) => [turn.question, ...turn.replies.map((reply) => reply.text)])]
  .some((text) => text.toLowerCase().includes(sought.toLowerCase()))

function where(talk) {
  const who = talk.visitor === PASSER_BY ? "" : ` · ${visitorName(talk.visitor)}`
  return `${sceneName(talk.scene)}${who} · ${date.format(talk.updated)}${talk.branch ? ` · ${t("branch_of")}` : ""}`
}

function go(talk) {
  show(talk)
  dialog.close()
}

function row(talk) {
  const open = h("button", { class: "entry", "aria-current": talk.id === shown().id ? "true" : undefined, onclick: () => go(talk) },
    h("span", { class: "title", dir: "auto" }, titleOf(talk)), h("span", { class: "where" }, where(talk)))
  const more = h("button", { class: "icon", "data-action": "more", "aria-label": `${t("more")}：${titleOf(talk)}`, "aria-haspopup": "menu", "aria-expanded": "false",
    onclick: () => dropdown(more, [{ key: "rename", label: t("rename"), run: () => rename(item, talk) }, { key: "delete", label: t("delete"), run: () => remove(talk) }]) }, sign("more"))
  const item = h("li", {}, open, h("span", { class: "holder" }, more))
  return item
}

function rename(item, talk) {
  const field = h("input", { "aria-label": t("rename"), maxlength: 60 })
  field.value = titleOf(talk)
  const done = () => change(talk.id, (each) => { each.title = field.value.trim() }, { touch: false })
  item.replaceChildren(h("form", { class: "rename", onsubmit: (event) => { event.preventDefault(); done() } }, field, h("button", { class: "primary" }, t("save"))))
  field.addEventListener("keydown", (event) => { if (event.key === "Escape") { event.stopPropagation(); event.preventDefault(); draw() } })
  field.select()
}

async function remove(talk) {
  await change(talk.id, (each) => { each.deleted = Date.now() }, { touch: false })
  if (talk.id === shown().id) startNew()
  const undo = () => restore(talk)
  find("#talks .undo").replaceChildren(h("span", {}, t("deleted")), h("button", { onclick: undo }, t("undo")))
}

async function restore(talk) {
  await change(talk.id, (each) => { delete each.deleted }, { touch: false })
  find("#talks .undo").replaceChildren()
}

const deletedRow = (talk) => h("li", {}, h("span", { class: "entry" }, h("span", { class: "title", dir: "auto" }, titleOf(talk)), h("span", { class: "where" }, where(talk))),
  h("button", { onclick: () => restore(talk) }, t("restore")), h("button", { onclick: () => erase([talk.id]) }, t("erase")))

function moments() {
  const found = talks().flatMap((talk) => talk.turns.flatMap((turn) => turn.replies.filter((reply) => reply.pinned).map((reply) => ({ talk, turn, reply }))))
  return found.sort((one, other) => other.reply.pinned - one.reply.pinned).filter(({ turn, reply }) => `${turn.question} ${reply.text}`.toLowerCase().includes(sought.toLowerCase()))
}

async function goToMoment({ talk, turn, reply }) {
  await change(talk.id, (each) => { const here = each.turns.find((one) => one.id === turn.id); here.at = here.replies.findIndex((one) => one.id === reply.id) }, { touch: false })
  go(talk)
  find(`[data-turn="${turn.id}"]`)?.scrollIntoView({ block: "center" })
}

const momentRow = (moment) => h("li", {}, h("button", { class: "entry moment", onclick: () => goToMoment(moment) },
  h("span", { class: "where", dir: "auto" }, moment.turn.question), h("span", { class: "title", dir: "auto" }, moment.reply.text), h("span", { class: "where" }, where(moment.talk))))

function draw() {
  for (const tab of dialog.querySelectorAll("[data-part]")) tab.setAttribute("aria-pressed", `${tab.dataset.part === part}`)
  const list = dialog.querySelector("ul"), deleted = talks({ deleted: true })
  const rows = part === "talks" ? talks().filter(contains).map(row) : part === "moments" ? moments().map(momentRow) : deleted.map(deletedRow)
  const empty = sought ? "none_found" : part === "moments" ? "no_moments" : "no_talks"
  list.replaceChildren(...(rows.length ? rows : [h("li", { class: "empty" }, t(empty))]))
  dialog.querySelector("[data-part=trash]").hidden = !deleted.length
  const field = dialog.querySelector("input[type=search]")
  if (field.value !== sought) field.value = sought
}

dialog.querySelector("input[type=search]").addEventListener("input", (event) => { sought = event.target.value.trim(); draw() })
for (const tab of dialog.querySelectorAll("[data-part]")) tab.addEventListener("click", () => { part = tab.dataset.part; draw() })
dialog.querySelector("[data-new]").addEventListener("click", () => { startNew(); dialog.close() })
document.addEventListener("zhenhuan:changed", () => { if (dialog.open && !dialog.querySelector(".rename") ) draw() })
dialog.addEventListener("submit", () => setTimeout(draw, 60))
dialog.addEventListener("close", () => find("#talks .undo").replaceChildren())
find("#open-talks").addEventListener("click", () => openList())
