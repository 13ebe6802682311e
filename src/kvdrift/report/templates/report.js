"use strict";
// What a mark says when it is pointed at, or reached with the arrow keys. The page is complete without this.
(() => {
  const tip = document.getElementById("tip");
  let shown = null;
  const hide = () => { tip.hidden = true; shown?.classList.remove("on"); shown = null; };
  const show = (mark) => {
    if (shown !== mark) { hide(); shown = mark; mark.classList.add("on"); }
    tip.textContent = mark.dataset.t;
    tip.hidden = false;
    const box = mark.getBoundingClientRect(), size = tip.getBoundingClientRect();
    const x = Math.min(Math.max(8, box.left + box.width / 2 - size.width / 2), innerWidth - size.width - 8);
    const below = box.bottom + 8 + size.height < innerHeight;
    tip.style.left = `${x + scrollX}px`;
    tip.style.top = `${(below ? box.bottom + 8 : box.top - size.height - 8) + scrollY}px`;
  };
  for (const svg of document.querySelectorAll("svg")) {
    const marks = [...svg.querySelectorAll("[data-t]")];
    if (!marks.length) continue;
    svg.addEventListener("pointermove", (event) => {
      const mark = event.target.closest("[data-t]");
      if (mark) show(mark); else hide();
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return hide();
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      if (!shown || !svg.contains(shown)) return show(marks[0]);
      // The nearest mark in that direction, by where marks are drawn.
      const from = shown.getBoundingClientRect();
      let best = null, least = Infinity;
      for (const mark of marks) {
        const box = mark.getBoundingClientRect();
        const dx = box.left + box.width / 2 - from.left - from.width / 2;
        const dy = box.top + box.height / 2 - from.top - from.height / 2;
        const along = dx * step[0] + dy * step[1], across = Math.abs(dx * step[1]) + Math.abs(dy * step[0]);
        const cost = along + 3 * across;
        if (along > 0.5 && cost < least) { least = cost; best = mark; }
      }
      if (best) show(best);
    });
  }
  const copy = document.getElementById("copy");
  if (copy && navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.getElementById("command").textContent);
      copy.textContent = "Copied";
    });
  }
  // A link into a table that is folded away opens it.
  const unfold = () => {
    const row = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const fold = row && row.closest("details");
    if (fold && !fold.open) { fold.open = true; row.scrollIntoView({ block: "center" }); }
  };
  addEventListener("hashchange", unfold);
  unfold();
})();
