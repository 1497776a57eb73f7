// What only the browser can do: keep conversations, hand over files, read files. Nothing here talks to anybody.
const zhenhuan = {
  place: (scene) => `zhenhuan/${scene}`,

  // Private windows may refuse storage; the page then works without it.
  quietly(act) {
    try { return act() } catch { return null }
  },

  keep(messages, scene, visitor) {
    if (!messages.some((message) => message.role === "user")) return // a greeting is not worth keeping
    zhenhuan.quietly(() => {
      localStorage.setItem(zhenhuan.place(scene), JSON.stringify({ scene, visitor, messages }))
      localStorage.setItem("zhenhuan", scene)
    })
  },

  drop(scene) {
    zhenhuan.quietly(() => localStorage.removeItem(zhenhuan.place(scene)))
  },

  recall(scene) {
    return zhenhuan.quietly(() => localStorage.getItem(zhenhuan.place(scene))) ?? ""
  },

  last() {
    const scene = zhenhuan.quietly(() => localStorage.getItem("zhenhuan"))
    return scene ? zhenhuan.recall(scene) : ""
  },

  forget() {
    zhenhuan.quietly(() =>
      Object.keys(localStorage).filter((key) => key.startsWith("zhenhuan")).forEach((key) => localStorage.removeItem(key)))
  },

  save(text, name) {
    if (!text) return
    const link = document.createElement("a")
    link.href = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }))
    link.download = name
    link.click()
    setTimeout(() => URL.revokeObjectURL(link.href), 1000)
  },

  open() {
    return new Promise((resolve) => {
      const picker = document.createElement("input")
      picker.type = "file"
      picker.accept = ".json,.jsonl,application/json"
      picker.id = "zhenhuan-picker"
      picker.hidden = true
      document.body.append(picker)
      const done = (text) => { picker.remove(); resolve(text) }
      picker.addEventListener("change", async () => done(picker.files[0] ? await picker.files[0].text() : ""))
      picker.addEventListener("cancel", () => done(""))
      picker.click()
    })
  },
}
window.zhenhuan = zhenhuan

// What Gradio tells screen readers in English whatever the language.
const SPOKEN = [
  [/^bot's message: /, "甄嬛说："], [/^user's message: /, "你说："], [/^chatbot conversation$/, "谈话"],
  [/^bot avatar$/, "甄嬛"], [/^More tabs$/, "更多"], [/^number input for /, "数值："], [/^range slider for /, "滑杆："],
  [/^Reset to default value$/, "还原"],
]
function relabel() {
  for (const name of ["aria-label", "alt", "title"]) {
    for (const element of document.querySelectorAll(`[${name}]`)) {
      for (const [english, chinese] of SPOKEN) {
        const label = element.getAttribute(name)
        if (english.test(label)) element.setAttribute(name, label.replace(english, chinese))
      }
    }
  }
}
if (navigator.language.startsWith("zh")) {
  new MutationObserver(relabel).observe(document, { subtree: true, childList: true, attributeFilter: ["aria-label", "alt", "title"] })
}
