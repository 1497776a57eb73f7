// The one module that touches Gradio's parts: hidden ports to press and read, the text box, the sampling controls.
import { lang } from "./data.js"
import { find } from "./dom.js"

export const box = () => find("#composer textarea")

// Resolves when Gradio's parts are on the page.
export const mounted = new Promise((resolve) => {
  const look = () => {
    if (!box() || !find("#port-ask")) return
    watch.disconnect()
    box().parentElement.append(find("#suggest"))
    find("#suggest").hidden = false
    resolve()
  }
  const watch = new MutationObserver(look)
  watch.observe(document.body, { childList: true, subtree: true })
  look()
})

export const press = (port) => mounted.then(() => find(`#port-${port}`).click())

// Put words into the text box as if they had been typed, so that Gradio knows of them.
export function write(text) {
  const field = box()
  if (!field || field.value === text) return
  Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, "value").set.call(field, text)
  field.dispatchEvent(new Event("input", { bubbles: true }))
}

export const adapters = () => [...document.querySelectorAll("#voice input[type=radio]")].map((radio) => radio.value)

// Gradio calls these by the names that page/chat_tab.py writes.
export const port = (window.zhenhuan = {})

// What Gradio tells screen readers in English whatever the language.
const SPOKEN = [[/^number input for /, "数值："], [/^range slider for /, "滑杆："], [/^Reset to default value$/, "还原"]]
if (lang === "zh") mounted.then(() => {
  for (const element of document.querySelectorAll("#voice [aria-label], #voice [title]"))
    for (const name of ["aria-label", "title"])
      for (const [english, chinese] of SPOKEN) {
        const label = element.getAttribute(name)
        if (label) element.setAttribute(name, label.replace(english, chinese))
      }
})
