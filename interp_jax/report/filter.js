// Hides the latents that do not hold every word typed. The page is whole without it, and the box is hidden until it runs.
(() => {
  const box = document.getElementById("filter");
  const count = document.getElementById("filter-count");
  const latents = [...document.querySelectorAll(".latent")].map((element) => [element, element.textContent.toLowerCase()]);
  const apply = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [element, text] of latents) {
      element.hidden = !words.every((word) => text.includes(word));
      shown += !element.hidden;
    }
    count.textContent = words.length ? `${shown} of ${latents.length}` : "";
  };
  box.addEventListener("input", apply);
  box.closest("p").hidden = false;
  apply();
})();
