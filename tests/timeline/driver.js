// Stands in for a hand: moves over all rows, zooms, pins, and picks every choice there is.
(async () => {
  const $ = (id) => document.getElementById(id), chart = $("chart"), rows = $("rows"), root = document.documentElement;
  const pause = () => new Promise((go) => setTimeout(go, 150)), said = []; // virtual time: costs nothing
  const at = (kind, type, x, y, more) => {
    const box = rows.getBoundingClientRect();
    const init = { bubbles: true, cancelable: true, clientX: box.left + x, clientY: box.top + y, ...more };
    chart.dispatchEvent(new kind(type, init));
  };
  try {
    for (let y = 0; y < rows.clientHeight; y += 9) {
      for (let x = 0; x < rows.clientWidth; x += 53) at(PointerEvent, "pointermove", x, y);
    }
    let x = 100, y = 0; // the first slice that it meets
    do at(PointerEvent, "pointermove", (x += 5), (y = x % 60));
    while (x < rows.clientWidth && ($("tip").hidden || !$("tip").textContent.includes("MetaOp")));
    said.push($("tip").textContent);
    at(WheelEvent, "wheel", x, y, { deltaY: -600 });
    await pause();
    said.push($("range").textContent);
    at(PointerEvent, "pointerdown", x, y, { buttons: 1 });
    at(PointerEvent, "pointerup", x, y);
    said.push($("tip").classList.contains("pinned"));
    at(KeyboardEvent, "keydown", 0, 0, { key: "Escape" });
    at(KeyboardEvent, "keydown", 0, 0, { key: "0" });
    at(MouseEvent, "dblclick", x, y);
    const selects = () => document.querySelectorAll("select"); // made anew by each choice
    for (let i = 0; i < selects().length; i++) {
      for (let j = 0; selects()[i] && j < selects()[i].options.length; j++) {
        const select = selects()[i];
        select.selectedIndex = j;
        select.dispatchEvent(new Event("change"));
        await pause();
      }
    }
    for (const button of document.querySelectorAll("#controls button, button.link")) button.click();
    document.querySelector("[data-field]").dispatchEvent(new PointerEvent("pointerenter"));
    await pause();
    const pixels = rows.getContext("2d").getImageData(0, 0, rows.width, rows.height).data;
    root.dataset.painted = pixels.some((value) => value > 0);
  } catch (error) {
    root.dataset.failed = String(error.stack);
  }
  root.dataset.said = said.join("|");
})();
