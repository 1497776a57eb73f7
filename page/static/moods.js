// Her portrait: its mood follows what she says, by a rule; robe and picture follow the scene (portrait.css).
import { SCENES } from "./data.js"
import { find } from "./dom.js"
import { shown } from "./state.js"
import { shownReply } from "./store.js"

// Words that tell a mood, the strongest mood first: of two that are told equally often it is shown.
const TOLD = {
  cold: "放肆|大胆|住口|闭嘴|退下|滚出|贱人|恨|仇|毒妇|休想|掌嘴|杖责|冷笑|狠毒|妄想|不知廉耻|好大的|岂容|饶不了",
  sad: "泪|哭|伤心|难过|心痛|心疼|痛|凄|可怜|孤单|孤零|寂寞|离别|死了|没了|去了|苦楚|苦命|辜负|心碎|心寒",
  smile: "笑|欢喜|喜欢|高兴|开心|恭喜|贺喜|有趣|多谢|谢过|欣慰|万福|甜|快活|吉祥|真好|极好|热闹",
  thoughtful: "思量|想来|或许|也许|兴许|罢了|只怕|记得|从前|当年|往事|若是|倘若|不知|何尝|梦|回想|琢磨",
}
const RULES = Object.entries(TOLD).map(([mood, words]) => [mood, new RegExp(`(?<![不别莫勿没])(?:${words})`, "g")])

// The mood of her words: the one that they tell most often, or calm. 不哭 and 莫恨 tell none.
export function moodOf(text) {
  const told = RULES.map(([mood, rule]) => [mood, (text.match(rule) ?? []).length])
  const [mood, times] = told.reduce((most, next) => (next[1] > most[1] ? next : most))
  return times ? mood : "calm"
}

function feel(reply) {
  document.body.dataset.mood = !reply ? "calm" : !reply.text && reply.state === "growing" ? "thoughtful" : moodOf(reply.text)
}
const last = () => { const turn = shown().turns.at(-1); feel(turn && shownReply(turn)) }

document.addEventListener("zhenhuan:shown", last)
document.addEventListener("zhenhuan:changed", ({ detail }) => { if (detail.id === shown().id) last() })
document.addEventListener("zhenhuan:reply", ({ detail: { talk, reply } }) => { if (talk.id === shown().id) feel(reply) })

const large = find("#portrait svg").cloneNode(true)
large.setAttribute("viewBox", "0 20 240 270")
find("#face").append(large)

// A scene's picture is fetched when it is first seen.
export const picture = (scene) => new URL(`./scene-${1 + SCENES.findIndex(({ name }) => name === scene)}.svg`, import.meta.url).href
const pictures = new CSSStyleSheet()
pictures.replaceSync(SCENES.map(({ name }) => `[data-scene="${name}"] { --scene: url("${picture(name)}"); }`).join("\n"))
document.adoptedStyleSheets.push(pictures)
