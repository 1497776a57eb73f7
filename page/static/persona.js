// A persona of the visitor's own: a name and a line about himself, told to her where a passer-by has no name.
import { LIMITS, PASSER_BY, t } from "./data.js"
import { find, h } from "./dom.js"
import { shown } from "./state.js"
import { recall, remember } from "./store.js"

const fields = find("#persona"), visitors = find("#scenes select")

// What a link, a file or the visitor gives, cut to what the server takes; undefined where nothing is left.
export function personaOf(given) {
  const kept = {}
  for (const [name, limit] of Object.entries(LIMITS.persona)) {
    const text = typeof given?.[name] === "string" ? [...given[name].replace(/\s+/g, " ").replace(/[（）()\p{C}]/gu, "").trim()].slice(0, limit).join("") : ""
    if (text) kept[name] = text
  }
  return Object.keys(kept).length ? kept : undefined
}

const input = (name) => fields.querySelector(`[name=${name}]`)
fields.append(h("legend", {}, t("persona")), ...Object.entries(LIMITS.persona).map(([name, limit]) =>
  h("input", { name, maxlength: limit, placeholder: t(`persona_${name}`), "aria-label": t(`persona_${name}`), autocomplete: "off", dir: "auto" })))

// What the sheet holds when it is closed: only a passer-by is someone of the visitor's own.
export function givenPersona() {
  if (visitors.value !== PASSER_BY) return undefined
  const given = personaOf({ name: input("name").value, line: input("line").value })
  remember("persona", given ?? null)
  return given
}

function offer() { fields.hidden = visitors.value !== PASSER_BY }
find("#scenes").addEventListener("change", offer)
find("#place").addEventListener("click", () => {
  const own = shown().persona ?? (shown().turns.length ? {} : recall("persona") ?? {})
  for (const name of Object.keys(LIMITS.persona)) input(name).value = own[name] ?? ""
  queueMicrotask(offer)
})
