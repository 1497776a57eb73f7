// The page's texts, in the visitor's language, and the scenes: page/i18n.py writes them.
import data from "./texts.js"

export const lang = navigator.language.startsWith("zh") ? "zh" : "en"
export const { scenes: SCENES, visitors: VISITORS, system: SYSTEM_PROMPT, limits: LIMITS } = data
export const PASSER_BY = SCENES[0].visitors[0]

// The text of a key; each {} in it takes the next value.
export function t(key, ...values) {
  return data.texts[key][lang === "zh" ? 0 : 1].replace(/\{\}/g, () => values.shift())
}

export const scene = (name) => SCENES.find((each) => each.name === name)
export const sceneName = (name) => (lang === "zh" ? name : `${scene(name).english} · ${name}`)
export const visitorName = (name) => (lang === "zh" ? name : `${VISITORS[name]} · ${name}`)
export const rank = ({ rank, rank_english, age }) =>
  lang === "zh" ? `${rank}，${t("age", age)}` : `${rank_english}, ${t("age", age)}`
export const greeting = (name) => scene(name)[lang === "zh" ? "greeting" : "greeting_english"]
export const openers = (name) => scene(name)[lang === "zh" ? "openers" : "openers_english"]
