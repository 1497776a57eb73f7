// Scene and visitor: one control in the bar, and the sheet that it opens.
import { PASSER_BY, SCENES, lang, rank, scene, sceneName, t, visitorName } from "./data.js"
import { find, h } from "./dom.js"
import { givenPersona } from "./persona.js"
import { changeShown, shown, startNew } from "./state.js"

const sheet = find("#scenes"), visitors = sheet.querySelector("select")

const line = (each) => `${rank(each)} · ${each[lang === "zh" ? "greeting" : "greeting_english"].split(/[。；.;]/)[0]}${lang === "zh" ? "。" : "."}`

for (const each of SCENES) {
  const title = lang === "zh" ? each.name : `${each.english} · ${each.name}`
  sheet.querySelector(".list").append(h("label", { class: "scene", "data-scene": each.name },
    h("input", { type: "radio", name: "scene", value: each.name }),
    h("span", { class: "picture", "data-scene": each.name, "aria-hidden": "true" }), h("span", { class: "name" }, title), h("span", { class: "line" }, line(each))))
}

const chosen = () => sheet.querySelector("input[name=scene]:checked").value
function offer(who) {
  const names = scene(chosen()).visitors
  visitors.replaceChildren(...names.map((name) => h("option", { value: name }, visitorName(name))))
  visitors.value = names.includes(who) ? who : PASSER_BY
}

find("#place").addEventListener("click", () => {
  const { scene: name, visitor } = shown()
  sheet.querySelector(`input[value="${name}"]`).checked = true
  offer(visitor)
  sheet.showModal()
  sheet.querySelector("input:checked").focus()
})
sheet.querySelector(".list").addEventListener("change", () => offer(visitors.value))
sheet.querySelector("form").addEventListener("submit", () => {
  const next = { scene: chosen(), visitor: visitors.value, persona: givenPersona() }, now = shown()
  if (Object.keys(next).every((key) => JSON.stringify(next[key]) === JSON.stringify(now[key]))) return
  if (now.turns.length) startNew(next) // a talk keeps its scene and its visitor
  else changeShown((each) => Object.assign(each, next), { touch: false }).then(name)
})

function name() {
  const now = shown(), here = scene(now.scene)
  find("#rank").replaceChildren(lang === "zh" ? here.rank : here.rank_english, h("span", { class: "age" }, `${lang === "zh" ? "，" : ", "}${t("age", here.age)}`))
  find("#place .where").textContent = lang === "zh" ? here.name : here.english
  find("#place .who").textContent = now.persona?.name ?? (lang === "zh" ? now.visitor : visitorName(now.visitor).split(" · ")[0])
  find("#place .who").classList.toggle("nobody", now.visitor === PASSER_BY && !now.persona?.name)
  find("#place").setAttribute("aria-label", `${t("scenes")}：${sceneName(now.scene)}，${visitorName(now.visitor)}`)
  document.body.dataset.scene = now.scene
}
document.addEventListener("zhenhuan:shown", name)
