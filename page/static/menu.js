// The page's menu: its other parts, files, printing, and deleting everything.
import { t } from "./data.js"
import { find, h } from "./dom.js"
import { FORMATS, open, save } from "./files.js"
import { openList } from "./list.js"
import { say } from "./notice.js"
import { shown, startNew } from "./state.js"
import { erase, talks } from "./store.js"

const dialog = find("#menu"), list = dialog.querySelector("ul")

// Another module adds an entry; one with `checked` is a switch.
export function addMenuItem({ key, label = key, run, checked }) {
  const button = h("button", { "data-action": key, role: checked ? "switch" : undefined, onclick: () => { if (!checked) dialog.close(); run(); mark() } }, t(label))
  const mark = () => { if (checked) button.setAttribute("aria-checked", `${checked()}`) }
  mark()
  list.append(h("li", {}, button))
}

// One part of the page is in view: the talk, side by side, or the settings.
export function view(part) {
  document.body.dataset.view = part
  find("#part").hidden = part === "talk"
  find("#back span").textContent = part === "talk" ? "" : t(part)
}
find("#back").addEventListener("click", () => view("talk"))

async function forget() {
  const back = await erase([...talks(), ...talks({ deleted: true })].map(({ id }) => id))
  startNew({}, { leave: false })
  say(t("forgotten"), { label: t("undo"), run: back }, 20)
}

addMenuItem({ key: "compare", run: () => view("compare") })
addMenuItem({ key: "voice", run: () => view("voice") })
addMenuItem({ key: "moments", run: () => openList("moments") })
for (const format of Object.keys(FORMATS)) addMenuItem({ key: `export_${format}`, run: () => save(shown(), format) })
addMenuItem({ key: "import", run: open })
addMenuItem({ key: "print", run: () => print() })
addMenuItem({ key: "forget", run: forget })
find("#open-menu").addEventListener("click", () => dialog.showModal())
view("talk")
