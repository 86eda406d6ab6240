// Shows what an element's data-tip says next to the pointer. Everything else on the page works without this.
(() => {
  const box = document.createElement("div");
  box.id = "tooltip";
  box.hidden = true;
  document.body.append(box);
  const show = (event) => {
    const target = event.target.closest("[data-tip]");
    box.hidden = !target;
    if (!target) return;
    box.textContent = target.dataset.tip;
    const left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8);
    const below = event.clientY + 18;
    const fits = below + box.offsetHeight < innerHeight - 8;
    box.style.left = `${Math.max(8, left)}px`;
    box.style.top = `${fits ? below : event.clientY - box.offsetHeight - 10}px`;
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("scroll", () => { box.hidden = true; }, { passive: true });
})();
