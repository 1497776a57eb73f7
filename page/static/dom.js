// Elements made by name. Text goes in as text: no markup of hers or a visitor's is ever parsed.
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value)
    else element.setAttribute(name, value === true ? "" : value)
  }
  element.append(...children.filter((child) => child !== undefined && child !== null && child !== false))
  return element
}

export const find = (selector) => document.querySelector(selector)

// One set of signs: strokes of 1.5 in a square of 24, in the text's colour.
const SIGNS = {
  talks: '<path d="M4 5h13v10H9l-4 4v-4H4zM20 8v12"/>',
  menu: '<path d="M5 7h14M5 12h14M5 17h14"/>',
  more: '<path d="M6 12h.01M12 12h.01M18 12h.01" stroke-width="2.6"/>',
  earlier: '<path d="m14 6-6 6 6 6"/>',
  later: '<path d="m10 6 6 6-6 6"/>',
  again: '<path d="M19 12a7 7 0 1 1-2-5l2 2M19 4v5h-5"/>',
  edit: '<path d="m5 19 1-4L16 5l3 3L9 18zM14 7l3 3"/>',
  go_on: '<path d="M5 12h13M13 7l5 5-5 5"/>',
  copy: '<path d="M9 9h10v10H9zM15 9V5H5v10h4"/>',
  pin: '<path d="m12 4 2.4 5 5.6.7-4.1 3.8 1.1 5.5-5-2.8L7 19l1.1-5.5L4 9.700l5.600-.7z"/>',
  suggest: '<path d="M7 20c0-7 4-13 12-16-1 8-5 12-10 12M7 20l3-6"/>',
}
export function sign(name, markup = SIGNS[name]) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg")
  svg.setAttribute("viewBox", "0 0 24 24")
  svg.setAttribute("aria-hidden", "true")
  svg.classList.add("sign")
  svg.innerHTML = markup
  return svg
}

// A list that opens below a button and closes when it is left: by Tab, by Escape, by a tap elsewhere.
export function dropdown(button, entries) {
  find(".dropdown")?.remove()
  const list = h("div", { class: "dropdown", role: "menu" })
  const close = (focus) => {
    list.remove()
    button.setAttribute("aria-expanded", "false")
    document.removeEventListener("pointerdown", outside, true)
    if (focus) button.focus()
  }
  const outside = (event) => { if (!list.contains(event.target)) close() }
  for (const { label, run, key } of entries)
    list.append(h("button", { role: "menuitem", "data-action": key, onclick: () => { close(true); run() } }, label))
  list.addEventListener("keydown", (event) => {
    const buttons = [...list.children], step = { ArrowDown: 1, ArrowUp: -1 }[event.key]
    if (event.key === "Escape") { event.stopPropagation(); close(true) }
    if (!step) return
    event.preventDefault()
    buttons.at((buttons.indexOf(document.activeElement) + step) % buttons.length).focus()
  })
  list.addEventListener("focusout", (event) => { if (event.relatedTarget && !list.contains(event.relatedTarget)) close() })
  button.setAttribute("aria-expanded", "true")
  button.after(list)
  document.addEventListener("pointerdown", outside, true)
  list.firstChild.focus()
  list.scrollIntoView({ block: "nearest" })
}
