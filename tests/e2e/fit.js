// What does not fit its window: sideways scrolling, texts cut, controls lower than `least` px, off the side, overlapping.
(least) => {
  const wide = document.documentElement.clientWidth, faults = [], seen = []
  if (document.documentElement.scrollWidth > wide) faults.push(`sideways ${document.documentElement.scrollWidth}`)
  const textOf = (e) => { const range = document.createRange(); range.selectNodeContents(e.querySelector('span') ?? e); return range.getBoundingClientRect() }
  for (const e of (document.querySelector('dialog[open]') ?? document).querySelectorAll('button, textarea, input:not([type=range])')) {
    const box = e.getBoundingClientRect(), name = `${e.innerText || e.getAttribute('aria-label') || e.value || e.placeholder || e.id}`.slice(0, 20)
    if (!e.checkVisibility({ visibilityProperty: true }) || e.closest('[aria-hidden=true], .hide')) continue
    // The list behind a dropdown's field has the padding; a bubble's own fold is as high as its line.
    const target = (e.closest('.wrap-inner, label') ?? e).getBoundingClientRect()
    if (target.height < least) faults.push(`low ${name} ${target.height}`)
    if (box.left < 0 || box.right > wide) faults.push(`aside ${name}`)
    const text = textOf(e)
    if (e.innerText?.trim() && (text.left < box.left || text.right > box.right || text.bottom > box.bottom + 1)) faults.push(`cut ${name}`)
    if (e.matches('[role=combobox]') && e.scrollWidth > e.clientWidth) faults.push(`cut ${name} ${e.value}`)
    if (e.closest('#talk, .list')) continue // scrolled out of sight, it may lie behind others
    for (const [other, there] of seen)
      if (!(box.right <= there.left + 1 || there.right <= box.left + 1 || box.bottom <= there.top + 1 || there.bottom <= box.top + 1)) faults.push(`over ${name} ${other}`)
    seen.push([name, box])
  }
  for (const e of document.querySelectorAll('h1, p, span'))
    if (e.checkVisibility({ visibilityProperty: true }) && textOf(e).right > wide) faults.push(`cut ${e.innerText.slice(0, 20)}`)
  return faults }
