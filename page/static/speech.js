// Her replies read aloud by the browser's own speech. Without a Chinese voice on this machine nothing is offered; a
// voice from elsewhere would send her words to its maker.
import { addAction } from "./actions.js"
import { t } from "./data.js"
import { addMenuItem } from "./menu.js"
import { shown } from "./state.js"
import { recall, remember } from "./store.js"

const speech = window.speechSynthesis
let voice = null, pressed = null // the button of the reply that is read

function stop() {
  speech.cancel()
  pressed?.setAttribute("aria-pressed", "false")
  pressed = null
}

// One sentence after the other: Chromium ends a long utterance after a quarter of a minute.
function speak(text, button) {
  stop()
  pressed = button
  button?.setAttribute("aria-pressed", "true")
  const sentences = text.match(/[^。！？；…\n]+[。！？；…\n”』」]*/g) ?? []
  sentences.forEach((sentence, at) => {
    const said = new SpeechSynthesisUtterance(sentence)
    Object.assign(said, { voice, lang: voice.lang, rate: 0.92 })
    if (at === sentences.length - 1) said.onend = () => { if (pressed === button) stop() }
    speech.speak(said)
  })
}

function choose() {
  if (voice) return
  voice = speech.getVoices().find(({ lang, localService }) => localService && /^(zh|cmn)(?![-_]?(HK|TW|Hant|yue))/i.test(lang)) ?? null
  if (!voice) return
  addAction({
    key: "speak", label: "speak", of: "hers", where: "row", icon: '<path d="M5 10v4h3l4 4V6l-4 4zM15.5 9.5a4 4 0 0 1 0 5M18 7a8 8 0 0 1 0 10"/>',
    shown: (_, __, reply) => reply.text, pressed: () => false,
    run: (_, __, reply, button) => (pressed === button ? stop() : speak(reply.text, button)),
  })
  addMenuItem({ key: "aloud", label: "aloud", checked: () => Boolean(recall("aloud")), run: () => { remember("aloud", !recall("aloud")); stop() } })
  document.dispatchEvent(new CustomEvent("zhenhuan:shown", { detail: { talk: shown() } }))
}

if (speech) {
  choose()
  speech.addEventListener("voiceschanged", choose)
  document.addEventListener("zhenhuan:reply", ({ detail: { talk, reply, ended } }) => {
    if (ended && voice && recall("aloud") && reply.facts && talk.id === shown().id) speak(reply.text)
  })
  document.addEventListener("zhenhuan:shown", () => { if (voice) stop() })
  addEventListener("pagehide", stop)
}
