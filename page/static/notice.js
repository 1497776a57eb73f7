// The one line in which the page says what happened, with at most one thing to do about it.
import { find, h } from "./dom.js"

const SECONDS = 12
let leaving

export function say(text, { label, run } = {}, seconds = SECONDS) {
  const line = find("#notice")
  clearTimeout(leaving)
  const act = () => { line.replaceChildren(); run() }
  line.replaceChildren(h("span", {}, text), label ? h("button", { onclick: act }, label) : "")
  leaving = setTimeout(() => line.replaceChildren(), seconds * 1000)
}
