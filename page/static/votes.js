// Side by side: where the question is asked, and the tally of the visitor's votes, which his browser keeps.
import { t } from "./data.js"
import { port } from "./gradio.js"
import { shown } from "./state.js"
import { recall, remember } from "./store.js"

port.place = () => [shown().scene, shown().visitor]

port.count = (verdict, outcome) => {
  if (!outcome) return [verdict]
  const tally = { adapter: 0, base: 0, even: 0, ...recall("tally") }
  tally[outcome] += 1
  remember("tally", tally)
  return [`${verdict}  \n${t("tally", tally.adapter, tally.base, tally.even)}`]
}
