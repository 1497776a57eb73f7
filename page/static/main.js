// The page in the browser: what is in view, and the modules that draw it.
import "./bubbles.js"
import "./scenes.js"
import { PASSER_BY, SCENES, LIMITS, scene, t } from "./data.js"
import { find, sign } from "./dom.js"
import { mounted } from "./gradio.js"
import { say } from "./notice.js"
import { personaOf } from "./persona.js"
import { recover, suggest } from "./replies.js"
import { settingsOf } from "./settings.js"
import { arrive, show } from "./state.js"
import { create } from "./store.js"
import "./list.js"
import "./menu.js"
import "./card.js"
import "./moods.js"
import "./speech.js"
import "./votes.js"

for (const element of document.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t)
for (const element of document.querySelectorAll("[data-label]"))
  for (const name of element.matches("input") ? ["aria-label", "placeholder"] : ["aria-label"]) element.setAttribute(name, t(element.dataset.label))
for (const element of document.querySelectorAll("[data-sign]")) element.prepend(sign(element.dataset.sign))
for (const dialog of document.querySelectorAll("dialog"))
  dialog.addEventListener("click", (event) => { if (event.target === dialog || event.target.closest("[data-close]")) dialog.close() })

// A link fills in the page and leaves the address, so that a reload does not ask the same again.
function linked() {
  const query = new URLSearchParams(location.search)
  if (!query.has("q")) return null
  const where = { scene: query.get("scene") ?? SCENES[0].name, visitor: query.get("visitor") ?? PASSER_BY }, settings = settingsOf(query)
  const draft = query.get("q").slice(0, LIMITS.characters)
  for (const name of [...query.keys()]) if (!name.startsWith("__")) query.delete(name)
  history.replaceState(null, "", location.pathname + (query.size ? `?${query}` : ""))
  if (!settings || !scene(where.scene)?.visitors.includes(where.visitor)) return say(t("bad_link")), null
  return create({ ...where, persona: personaOf({ name: query.get("name"), line: query.get("line") }), settings, draft })
}

const brought = linked()
await arrive()
if (brought) show(brought)
await recover()
find("#suggest").addEventListener("click", suggest)
await mounted
document.body.dataset.ready = ""
