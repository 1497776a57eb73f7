// Which talk is in view. A new one is not stored before something was said in it; until then it is remembered alone.
import { scene } from "./data.js"
import { change, create, opened, recall, remember, talk, talks } from "./store.js"

let current = create()

export const shown = () => talk(current.id) ?? current
export const stored = (each = shown()) => Boolean(talk(each.id))

// A new talk that is left with a draft in it is kept, unless everything is being deleted.
export function show(next, { leave = true } = {}) {
  if (leave && next.id !== current.id && !stored() && !current.turns.length && current.draft) change(current)
  current = next
  remember("last", stored(next) ? next.id : null)
  remember("new", stored(next) ? null : next)
  document.dispatchEvent(new CustomEvent("zhenhuan:shown", { detail: { talk: shown() } }))
}

// A new talk in the scene and with the settings of the one in view, or others.
export function startNew(fields = {}, options) {
  const { scene, visitor, persona, settings } = shown()
  show(create({ scene, visitor, persona, settings, ...fields }), options)
}

// Change the talk in view, stored or not. Words of his draft do not make a talk newer.
export async function changeShown(edit, options) {
  if (stored()) return change(current.id, edit, options)
  edit(current)
  remember("new", current)
  document.dispatchEvent(new CustomEvent("zhenhuan:changed", { detail: { id: current.id } }))
  return current
}

// A new talk with the turns up to this one, beside the old one, which stays as it is.
export function branch(from, upTo) {
  const turns = structuredClone(from.turns.slice(0, upTo))
  const { scene, visitor, persona, settings, title } = from
  return create({ scene, visitor, persona, settings, title, turns, branch: true })
}

// Where the visitor was: the talk he left, or what he had chosen for a new one.
export async function arrive() {
  await opened
  const last = talk(recall("last")), left = recall("new")
  if (last && !last.deleted) return show(last)
  if (left?.turns?.length === 0 && scene(left.scene)?.visitors.includes(left.visitor)) return show(create(left))
  show(talks()[0] ?? create())
}
