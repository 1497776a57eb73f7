// Adapter and sampling parameters: each talk has its own, and a new one begins with those of the talk before it.
import { LIMITS, t } from "./data.js"
import { adapters, mounted, port, press } from "./gradio.js"
import { say } from "./notice.js"
import { changeShown, shown } from "./state.js"

const NAMES = ["adapter", ...Object.keys(LIMITS.numbers)]
let defaults = null

const fits = (name, value) =>
  name === "adapter" ? adapters().includes(value) : Number.isFinite(value) && value >= LIMITS.numbers[name][0] && value <= LIMITS.numbers[name][1]

// What the controls show for the talk in view: its own values as far as this server has them.
port.chosen = (values) => {
  defaults ??= values
  const own = shown().settings ?? {}
  if (own.adapter && !fits("adapter", own.adapter)) say(t("no_adapter", own.adapter))
  return NAMES.map((name, at) => (fits(name, own[name]) ? own[name] : defaults[at]))
}

// A control was moved.
port.choose = (values) => {
  if (!defaults) return []
  const chosen = Object.fromEntries(NAMES.map((name, at) => [name, values[at]])), own = shown().settings
  const same = NAMES.every((name, at) => chosen[name] === (own?.[name] ?? defaults[at]))
  if (!same) changeShown((each) => { each.settings = chosen }, { touch: false })
  return []
}

// The values of a link, or null where it names something that the page does not have.
export function settingsOf(query) {
  const found = {}
  for (const name of NAMES) {
    if (!query.has(name)) continue
    found[name] = name === "adapter" ? query.get(name) : Number(query.get(name))
    if (name !== "adapter" && !fits(name, found[name])) return null
  }
  return found
}

document.addEventListener("zhenhuan:shown", () => press("controls"))
mounted.then(() => press("controls"))
