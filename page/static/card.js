// A picture of an exchange, to save or share: scene, portrait, words, seal, and a QR code of the link.
import { addAction } from "./actions.js"
import { lang, rank, scene, sceneName, t } from "./data.js"
import { find, h } from "./dom.js"
import { moodOf, picture } from "./moods.js"

const WIDTH = 1080, TOP = 560, EDGE = 84, LINE = 72, LONGEST = 640 // px, and characters of her words
const MAX_LINK = 500 // characters; a longer one makes a code that cameras cannot read
const NOT_FIRST = "，。！？；：、）」』”’…—·,.!?;:)" // a line does not begin with these

// The lines that words take in a width, one character after the other; Latin words stay whole.
export function linesOf(text, width, measure) {
  const lines = []
  for (const paragraph of text.split("\n")) {
    let line = ""
    for (const part of paragraph.match(/[\w'’-]+|./gsu) ?? []) {
      if (line && measure(line + part) > width && !NOT_FIRST.includes(part)) { lines.push(line.trimEnd()); line = "" }
      line += part
    }
    lines.push(line)
  }
  return lines
}

// An SVG as an image; its size is written into it, without which Firefox draws none.
function imageOf(markup, width, height) {
  const image = new Image(), url = URL.createObjectURL(new Blob([markup.replace("<svg ", `<svg width="${width}" height="${height}" `)], { type: "image/svg+xml" }))
  image.src = url
  return image.decode().then(() => image).finally(() => URL.revokeObjectURL(url))
}

function portrait(mood) {
  const whole = find("#face svg"), copy = whole.cloneNode(true)
  const hidden = [...whole.querySelectorAll(".jewels, .wing, .bun")].map((each) => getComputedStyle(each).display === "none")
  copy.querySelectorAll(".jewels, .wing, .bun").forEach((each, at) => { if (hidden[at]) each.remove() })
  copy.querySelectorAll(`[data-m]:not([data-m=${mood}]), .disc`).forEach((each) => each.remove())
  const robe = getComputedStyle(document.body).getPropertyValue("--robe") || "#8c1c2b"
  return new XMLSerializer().serializeToString(copy).replace(/var\(--robe[^)]*\)/, robe)
}

// The link that asks the same, without what the visitor told of himself; the page's own address where it is too long.
function linkOf(turn, reply) {
  const page = location.href.split(/[?#]/)[0], query = new URLSearchParams(reply.facts?.link ?? "")
  query.delete("name")
  query.delete("line")
  const link = `${page}?${query}&q=${encodeURIComponent(turn.question)}`
  return reply.facts && link.length <= MAX_LINK ? link : page
}

async function codeOf(link) {
  try {
    const answer = await fetch("page-qr", { method: "POST", body: link })
    return answer.ok ? await imageOf(await answer.text(), 220, 220) : null
  } catch {
    return null // offline: a card without a code
  }
}

export async function draw(talk, turn, reply) {
  const here = scene(talk.scene), family = getComputedStyle(document.body).fontFamily
  const [back, her, code] = await Promise.all([
    fetch(picture(talk.scene)).then((answer) => answer.text()).then((markup) => imageOf(markup, WIDTH, WIDTH * 0.75)),
    imageOf(portrait(moodOf(reply.text)), 480, 540), codeOf(linkOf(turn, reply)),
  ])
  const canvas = h("canvas", { width: WIDTH }), brush = canvas.getContext("2d")
  const font = (size, weight = "") => { brush.font = `${weight} ${size}px ${family}` }
  const measured = (size, text) => { font(size); return linesOf(text, WIDTH - 2 * EDGE, (line) => brush.measureText(line).width) }
  const asked = measured(36, turn.question.slice(0, 160)), cut = reply.text.length > LONGEST
  const said = measured(44, reply.text.slice(0, LONGEST) + (cut ? "……" : ""))
  canvas.height = TOP + 70 + asked.length * 56 + 40 + said.length * LINE + 60 + 260
  const paint = (colour, ...box) => { brush.fillStyle = colour; brush.fillRect(...box) }
  paint("#fbf6ec", 0, 0, WIDTH, canvas.height)
  brush.save()
  brush.beginPath()
  brush.rect(0, 0, WIDTH, TOP)
  brush.clip()
  brush.drawImage(back, 0, TOP - WIDTH * 0.75)
  brush.drawImage(her, WIDTH - 560, TOP - 534)
  brush.restore()
  paint("#d9a441", 0, TOP, WIDTH, 6)
  let y = TOP + 70
  const write = (lines, size, colour, step) => { font(size); brush.fillStyle = colour; for (const line of lines) { brush.fillText(line, EDGE, y + size); y += step } }
  write(asked, 36, "#7a5718", 56)
  y += 30
  write(said, 44, "#2b1d14", LINE)
  y = canvas.height - 260
  paint("#d9c8a6", EDGE, y - 30, WIDTH - 2 * EDGE, 2)
  if (code) brush.drawImage(code, WIDTH - EDGE - 220, y, 220, 220)
  brush.fillStyle = "#b3202f"
  brush.beginPath()
  brush.roundRect(EDGE, y + 10, 92, 168, 10)
  brush.fill()
  font(64, "600")
  brush.fillStyle = "#fff8ea"
  ;[...t("seal")].forEach((letter, at) => brush.fillText(letter, EDGE + 14, y + 82 + at * 76))
  const left = EDGE + 120, room = WIDTH - left - EDGE - (code ? 250 : 0)
  const note = (size, colour, down, text) => { font(size); brush.fillStyle = colour; brush.fillText(text, left, y + down, room) }
  note(40, "#8c1c2b", 62, sceneName(talk.scene))
  note(30, "#7a5718", 110, rank(here))
  note(26, "#7a5718", 164, t("made"))
  return new Promise((done) => canvas.toBlob(done, "image/png"))
}

async function offer(talk, turn, reply) {
  const blob = await draw(talk, turn, reply), url = URL.createObjectURL(blob), name = `甄嬛-${talk.scene}.png`
  const file = new File([blob], name, { type: "image/png" }), close = () => dialog.close()
  const dialog = h("dialog", { id: "card", "aria-label": t("card"), lang },
    h("img", { src: url, alt: `${turn.question}\n${reply.text}` }),
    h("div", { class: "tools" }, h("a", { class: "primary", href: url, download: name }, t("card_save")),
      navigator.canShare?.({ files: [file] }) && h("button", { class: "primary", onclick: () => navigator.share({ files: [file] }).catch(() => {}) }, t("card_share")),
      h("button", { onclick: close }, t("close"))))
  dialog.addEventListener("click", (event) => { if (event.target === dialog) close() })
  dialog.addEventListener("close", () => { dialog.remove(); URL.revokeObjectURL(url) })
  document.body.append(dialog)
  dialog.showModal()
}

addAction({ key: "card", label: "card", of: "hers", where: "more", shown: (_, __, reply) => reply.text && reply.state !== "growing", run: offer })
