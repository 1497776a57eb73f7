// Texts whose contrast with what lies under them is below 4.5, the AA of WCAG 2: their start, ratio and class.
() => {
  const parse = (c) => { const m = c.match(/[\d.]+/g).map(Number); return c.startsWith('color(srgb') ? [m[0]*255, m[1]*255, m[2]*255, m[3] ?? 1] : [m[0], m[1], m[2], m[3] ?? 1] }
  const light = (c) => c.slice(0, 3).map((v) => v / 255).map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0)
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1)
  const ground = (e) => { const stack = []; for (; e; e = e.parentElement) stack.push(parse(getComputedStyle(e).backgroundColor))
    return stack.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]) }
  const poor = []
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim(), box = e.getBoundingClientRect()
    if (!text || !box.width || e.closest('script, style, [aria-hidden=true], .sr-only') || getComputedStyle(e).visibility == 'hidden') continue
    let opacity = 1; for (let up = e; up; up = up.parentElement) opacity *= Number(getComputedStyle(up).opacity)
    if (opacity == 0) continue
    const under = ground(e), ink = parse(getComputedStyle(e).color); ink[3] *= opacity
    const [a, b] = [light(over(ink, under)), light(under)].sort((x, y) => y - x)
    if ((a + .05) / (b + .05) < 4.5) poor.push(`${text.slice(0, 20)} ${((a + .05) / (b + .05)).toFixed(2)} ${e.className}`)
  }
  return poor }
