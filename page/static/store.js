// The visitor's talks. IndexedDB is their home; `change` is the one way to write, and it tells the page's other tabs.
// A change is made to what is stored at that moment, in one transaction: two tabs cannot overwrite each other.
import { PASSER_BY, SCENES, t } from "./data.js"
import { say } from "./notice.js"

const kept = new Map() // id → talk, as it is stored
const channel = new BroadcastChannel("zhenhuan")
let database = null // or none, where the browser refuses: the talks last until the page is closed

const newId = () => [...crypto.getRandomValues(new Uint8Array(9))].map((n) => n.toString(36)).join("")
// This tab, also after a reload of it.
export const TAB = quietly(() => (sessionStorage.zhenhuan_tab ??= newId())) ?? newId()

function quietly(act) {
  try { return act() } catch { return null }
}

// Small things of the visitor's, by name.
export const recall = (key) => quietly(() => JSON.parse(localStorage.getItem(`zhenhuan-${key}`)))
export const remember = (key, value) => quietly(() => localStorage.setItem(`zhenhuan-${key}`, JSON.stringify(value)))

const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result)
    request.onerror = () => reject(request.error)
  })
const complete = (transaction) =>
  new Promise((resolve, reject) => {
    transaction.oncomplete = resolve
    transaction.onabort = transaction.onerror = () => reject(transaction.error)
  })

export const opened = (async () => {
  try {
    const request = indexedDB.open("zhenhuan", 1)
    request.onupgradeneeded = () => request.result.createObjectStore("talks", { keyPath: "id" })
    database = await settled(request)
    for (const talk of await settled(database.transaction("talks").objectStore("talks").getAll())) kept.set(talk.id, talk)
  } catch {
    database = null
    say(t("not_kept"))
  }
  await adoptOldTalks()
})()

export const talk = (id) => kept.get(id)
export const talks = ({ deleted = false } = {}) =>
  [...kept.values()].filter((each) => Boolean(each.deleted) === deleted && (each.turns.length || each.draft)).sort((one, other) => other.updated - one.updated)

export function create(fields = {}) {
  const now = Date.now()
  const blank = { scene: SCENES[0].name, visitor: PASSER_BY, settings: null, title: "", draft: "", turns: [] }
  return { ...blank, ...fields, id: newId(), created: now, updated: now }
}

// Let `edit` change the stored talk, or a new one given whole. Returns it as it then is, or undefined where it is gone.
export async function change(idOrTalk, edit = () => {}, { touch = true } = {}) {
  const id = idOrTalk.id ?? idOrTalk
  let found
  const apply = (stored) => {
    found = stored ?? (idOrTalk.id ? structuredClone(idOrTalk) : undefined)
    if (!found) return
    edit(found)
    if (touch) found.updated = Date.now()
  }
  if (database) {
    try {
      const transaction = database.transaction("talks", "readwrite"), store = transaction.objectStore("talks")
      const done = complete(transaction)
      apply(await settled(store.get(id)))
      if (found) store.put(found)
      await done
    } catch {
      database = null // storage is full or was taken away: what is in memory goes on
      say(t("not_kept"))
    }
  }
  if (!database) apply(structuredClone(kept.get(id)))
  if (found) kept.set(id, found)
  else kept.delete(id)
  announce(id)
  return found
}

// Take talks away for good. Returns a function that puts them back.
export async function erase(ids) {
  const gone = ids.map(talk)
  for (const id of ids) kept.delete(id)
  if (database) {
    const transaction = database.transaction("talks", "readwrite")
    for (const id of ids) transaction.objectStore("talks").delete(id)
    await complete(transaction)
  }
  ids.forEach(announce)
  return () => Promise.all(gone.map((each) => change(each, undefined, { touch: false })))
}

function announce(id) {
  channel.postMessage(id)
  document.dispatchEvent(new CustomEvent("zhenhuan:changed", { detail: { id } }))
}

channel.onmessage = async ({ data: id }) => {
  const found = database && (await settled(database.transaction("talks").objectStore("talks").get(id)))
  if (found) kept.set(id, found)
  else if (database) kept.delete(id)
  document.dispatchEvent(new CustomEvent("zhenhuan:changed", { detail: { id } }))
}

// Talks as Gradio's Chatbot has them, which an earlier build kept in localStorage, one for each scene.
async function adoptOldTalks() {
  const old = quietly(() => Object.keys(localStorage).filter((key) => key.startsWith("zhenhuan/"))) ?? []
  for (const key of old) {
    const { scene, visitor, messages } = quietly(() => JSON.parse(localStorage.getItem(key))) ?? {}
    const turns = turnsOf(messages)
    if (turns.length) {
      const { id } = await change(create({ scene, visitor, turns }))
      if (scene === localStorage.getItem("zhenhuan")) remember("last", id)
    }
    localStorage.removeItem(key)
  }
  if (old.length) localStorage.removeItem("zhenhuan")
}

const plain = (content) =>
  (Array.isArray(content) ? content : [content]).map((part) => part?.text ?? part).filter((part) => typeof part === "string").join("")

// Messages with roles as turns: a question and her reply. Her greeting and notes with a title are left out.
export function turnsOf(messages) {
  const turns = []
  for (const { role, content, metadata } of Array.isArray(messages) ? messages : []) {
    const [text, hint = ""] = plain(content).split("\n\n〔"), last = turns.at(-1)
    if (role === "user") turns.push(newTurn(text))
    else if (last && !metadata?.title && text) last.replies.push(newReply({ text, hint: hint.replace(/〕$/, ""), state: "done" }))
  }
  return turns.map((turn) => ({ ...turn, at: Math.max(0, turn.replies.length - 1) }))
}

export const newTurn = (question) => ({ id: newId(), question, asked: Date.now(), replies: [], at: 0 })
export const newReply = (fields = {}) => ({ id: newId(), text: "", hint: "", time: Date.now(), beat: Date.now(), state: "growing", tab: TAB, ...fields })
export const shownReply = (turn) => turn.replies[turn.at]
export const titleOf = (talk) => talk.title || talk.turns[0]?.question || talk.draft || t("new_talk")
