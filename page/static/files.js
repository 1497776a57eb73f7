// Files of a talk: saved as Markdown for people, as JSON with everything, as ShareGPT, which training can read; opened again.
import { LIMITS, PASSER_BY, SCENES, SYSTEM_PROMPT, scene, t } from "./data.js"
import { h } from "./dom.js"
import { say } from "./notice.js"
import { personaOf } from "./persona.js"
import { show } from "./state.js"
import { change, create, newReply, newTurn, shownReply, turnsOf } from "./store.js"

const MAX_FILE = 4_000_000 // characters
const answered = (talk) => talk.turns.filter((turn) => shownReply(turn)?.text)

export const FORMATS = {
  md: (talk) => [`# 甄嬛 · ${talk.scene}`, ...talk.turns.flatMap((turn) => [`**${talk.visitor}**：${turn.question}`, shownReply(turn)?.text && `**甄嬛**：${shownReply(turn).text}`])]
    .filter(Boolean).join("\n\n") + "\n",
  json: ({ scene, visitor, persona, title, turns }) => JSON.stringify({ scene, visitor, persona, title, turns }, null, 1) + "\n",
  sharegpt: (talk) => forTraining(talk, "conversations", ["from", "value"], { system: "system", user: "human", assistant: "gpt" }),
  messages: (talk) => forTraining(talk, "messages", ["role", "content"], { system: "system", user: "user", assistant: "assistant" }),
}
const SUFFIX = { md: "md", json: "json", sharegpt: "sharegpt.json", messages: "messages.json" }

// Other programs know neither her prompt nor our scenes: both stand in the messages, as the model gets them.
function forTraining(talk, list, [role, content], names) {
  const line = (who, text) => ({ [role]: names[who], [content]: text })
  const turns = answered(talk).flatMap((turn) => [line("user", cue(talk) + turn.question), line("assistant", shownReply(turn).text)])
  return JSON.stringify([{ scene: talk.scene, visitor: talk.visitor, [list]: [line("system", SYSTEM_PROMPT), ...turns] }], null, 1) + "\n"
}

// The scene and who speaks, as each question of the visitor's carries them (chat/persona.py, with_scene).
function cue({ scene: name, visitor, persona }) {
  const told = [persona?.name, persona?.line].map((text) => text?.trim()).filter(Boolean).join("，")
  const names = [name === SCENES[0].name ? "" : name, told || (visitor === PASSER_BY ? "" : visitor)].filter(Boolean)
  return names.length ? `（${names.join("·")}）` : ""
}

export function save(talk, format) {
  const link = h("a", { download: `甄嬛-${talk.scene}.${SUFFIX[format]}` })
  link.href = URL.createObjectURL(new Blob([FORMATS[format](talk)], { type: "text/plain;charset=utf-8" }))
  link.click()
  setTimeout(() => URL.revokeObjectURL(link.href), 1000)
}

export function open() {
  const picker = h("input", { type: "file", accept: ".json,.jsonl,application/json", id: "picker", hidden: true })
  document.body.append(picker)
  picker.addEventListener("cancel", () => picker.remove())
  picker.addEventListener("change", async () => {
    const text = await picker.files[0]?.text()
    picker.remove()
    if (text === undefined) return
    if (text.length > MAX_FILE) return say(t("too_long", MAX_FILE.toLocaleString()))
    const talk = read(text)
    talk ? show(await change(talk)) : say(t("unreadable"))
  })
  picker.click()
}

// A talk out of a file, or null. It may be forged: what is not of the page's own form is left out.
export function read(text) {
  try {
    const parsed = JSON.parse(text), data = Array.isArray(parsed) ? parsed[0] : parsed
    const name = data.scene ?? SCENES[0].name, visitor = data.visitor ?? PASSER_BY
    if (!scene(name)?.visitors.includes(visitor)) return null
    const speakers = { human: "user", gpt: "assistant" }
    const said = data.messages ?? data.conversations?.map(({ from, value }) => ({ role: speakers[from] ?? from, content: value }))
    const before = cue({ scene: name, visitor })
    const messages = said?.filter(({ role }) => role !== "system").map(({ role, content }) => ({ role, content: role === "user" && content.startsWith?.(before) ? content.slice(before.length) : content }))
    const turns = data.turns ? data.turns.map(readTurn) : turnsOf(messages)
    if (!turns.length) return null
    return create({ scene: name, visitor, persona: personaOf(data.persona), title: `${data.title ?? ""}`.slice(0, 60), turns: turns.slice(-LIMITS.turns) })
  } catch {
    return null
  }
}

function readTurn({ question, asked, replies, at }) {
  const words = (text) => { if (typeof text !== "string") throw new TypeError("text"); return text.slice(0, 2 * LIMITS.characters) }
  const time = (value) => (Number.isFinite(value) ? value : Date.now())
  const read = replies.map((reply) => newReply({ text: words(reply.text), time: time(reply.time), state: "done", pinned: reply.pinned ? time(reply.pinned) : undefined, facts: facts(reply.facts) }))
  return { ...newTurn(words(question)), asked: time(asked), replies: read, at: read[at] ? at : Math.max(0, read.length - 1) }
}

const KNOWN = ["adapter", "digest", "base", "seed", "tokens", "first_token", "speed", "finish_reason", "link"]
function facts(given) {
  if (!given || !["stop", "length", "time", "cancelled"].includes(given.finish_reason)) return undefined
  return Object.fromEntries(KNOWN.map((key) => [key, `${given[key] ?? ""}`.slice(0, 400)]))
}
