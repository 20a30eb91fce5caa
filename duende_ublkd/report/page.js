"use strict";
(() => {
  const EVERY = 5000; // ms between two questions to the daemon
  const PAGE_EVERY = 60000; // ms after which the page itself is asked for, whatever the tag says
  const PATIENCE = 10000; // ms for one answer
  const $ = (id) => document.getElementById(id);
  let tag = $("live").dataset.tag;
  let ahead = Number($("live").dataset.now) * 1000 - Date.now(); // the host's clock against this one
  let pageAt = Date.now();
  let isLost = false;

  // Ages go on between two answers, and stop while there is none.

  const span = (seconds) => {
    const most = Math.max(Math.round(seconds), 1);
    for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "m"]]) {
      if (most >= 2 * size) return Math.round(most / size) + unit;
    }
    return most + "s";
  };
  const set = (element, text) => {
    const node = element.firstChild;
    if (node && node.data !== text) node.data = text;
  };
  const tick = () => {
    if (isLost) return;
    const now = (Date.now() + ahead) / 1000;
    for (const each of document.querySelectorAll("time[data-at]")) set(each, span(now - each.dataset.at));
    for (const each of document.querySelectorAll("time[data-until]")) set(each, span(each.dataset.until - now));
  };

  // The filter.

  const filter = () => {
    const text = $("filter-text");
    const words = text ? text.value.toLowerCase().split(/\s+/).filter(Boolean) : [];
    const verdict = text ? $("filter-verdict").value : "";
    let shown = 0;
    const rows = document.querySelectorAll("#devices tbody tr");
    for (const row of rows) {
      const content = row.textContent.toLowerCase();
      const fits = (!verdict || row.dataset.verdict === verdict) && words.every((word) => content.includes(word));
      if (row.hidden === fits) row.hidden = !fits;
      shown += fits;
    }
    for (const tile of document.querySelectorAll("#counts a")) {
      if (text && verdict === tile.dataset.verdict) tile.setAttribute("aria-current", "true");
      else tile.removeAttribute("aria-current");
    }
    if (!text) return;
    $("filter").hidden = false;
    const isOn = words.length > 0 || verdict !== "";
    const told = isOn ? `${shown} of ${rows.length} devices` : "";
    if ($("filter-count").value !== told) $("filter-count").value = told;
    const calm = $("calm");
    if (calm && isOn) calm.open = true;
  };
  const remember = () => {
    const wanted = new URLSearchParams();
    if ($("filter-text").value) wanted.set("q", $("filter-text").value);
    if ($("filter-verdict").value) wanted.set("verdict", $("filter-verdict").value);
    history.replaceState(null, "", wanted.size ? `?${wanted}` : location.pathname);
  };
  const recall = () => {
    const wanted = new URLSearchParams(location.search);
    if (!$("filter-text")) return;
    $("filter-text").value = wanted.get("q") ?? "";
    $("filter-verdict").value = wanted.get("verdict") ?? "";
  };
  document.addEventListener("input", (event) => {
    if (!event.target.closest("#filter")) return;
    filter();
    remember();
  });
  document.addEventListener("click", (event) => {
    const tile = event.target.closest("#counts a");
    if (!tile || !$("filter-text")) return;
    const select = $("filter-verdict");
    select.value = select.value === tile.dataset.verdict ? "" : tile.dataset.verdict;
    filter();
    remember();
  });

  // Take over what is different, and leave alone what is not: a node that stays keeps focus, selection and place.

  const fits = (old, wanted) =>
    old.nodeType === wanted.nodeType && old.nodeName === wanted.nodeName && (old.id ?? "") === (wanted.id ?? "");
  const takeAttributes = (old, wanted) => {
    const own = old.nodeName === "DETAILS" ? ["open"] : ["hidden", "aria-current"];
    for (const { name } of [...old.attributes]) {
      if (!wanted.hasAttribute(name) && !own.includes(name)) old.removeAttribute(name);
    }
    for (const { name, value } of wanted.attributes) {
      if (old.getAttribute(name) !== value && !own.includes(name)) old.setAttribute(name, value);
    }
  };
  const takeChildren = (old, wanted) => {
    const named = new Map([...wanted.children].filter((each) => each.id).map((each) => [each.id, each]));
    for (const each of [...old.children]) if (each.id && !named.has(each.id)) each.remove();
    const known = new Map([...old.children].filter((each) => each.id).map((each) => [each.id, each]));
    let place = old.firstChild;
    for (const next of [...wanted.childNodes]) {
      let match = next.id ? known.get(next.id) : place;
      if (!next.id) while (match && match.id) match = match.nextSibling;
      if (!match || !fits(match, next)) {
        const replaced = next.id ? match : null;
        if (replaced && replaced === place) place = place.nextSibling;
        if (replaced) replaced.remove();
        old.insertBefore(document.importNode(next, true), place);
        continue;
      }
      if (match === place) place = place.nextSibling;
      else if (place && place.nextSibling === match) {
        old.append(place); // one that goes further down is moved itself, instead of all that come before it
        place = match.nextSibling;
      } else old.insertBefore(match, place);
      take(match, next);
    }
    while (place) {
      const rest = place;
      place = place.nextSibling;
      rest.remove();
    }
  };
  const take = (old, wanted) => {
    if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.data !== wanted.data) old.data = wanted.data;
    } else if (!old.hasAttribute("data-keep") && !old.isEqualNode(wanted)) {
      takeAttributes(old, wanted);
      takeChildren(old, wanted);
    }
  };
  const firstInSight = () => {
    if (scrollY === 0) return null;
    const far = innerHeight;
    for (const each of document.querySelectorAll("main tr[id], main li[id], main section[id]")) {
      const box = each.getBoundingClientRect();
      if (box.height && box.top >= 0 && box.top < far) return { each, top: box.top };
    }
    return null;
  };
  const takePage = (text) => {
    const wanted = new DOMParser().parseFromString(text, "text/html");
    const live = wanted.getElementById("live");
    if (!live || live.dataset.version !== $("live").dataset.version) return location.reload();
    const sight = firstInSight();
    const focused = document.activeElement;
    take($("live"), live);
    document.title = wanted.title;
    document.querySelector("link[rel=icon]").href = wanted.querySelector("link[rel=icon]").getAttribute("href");
    ahead = Number(live.dataset.now) * 1000 - Date.now();
    tag = live.dataset.tag;
    pageAt = Date.now();
    filter();
    if (focused && focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
    if (sight && sight.each.isConnected) scrollBy(0, sight.each.getBoundingClientRect().top - sight.top);
  };

  // Ask.

  const ask = async (path) => {
    // Of a page that was opened with a name and a password in its address, fetch takes no path.
    const address = new URL(path, location.origin + location.pathname);
    const answer = await fetch(address, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
    return answer;
  };
  const lose = (error) => {
    isLost = true;
    document.body.classList.add("lost");
    const told = `No answer since ${$("clock").textContent}. What is below was so then, and may be otherwise now.`;
    const why = /^\d/.test(error.message) ? ` (${error.message})` : "";
    if ($("silence").textContent !== told + why) $("silence").textContent = told + why;
  };
  const find = () => {
    isLost = false;
    document.body.classList.remove("lost");
    if ($("silence").textContent) $("silence").textContent = "";
  };
  const showClock = (status) => {
    const at = status.now;
    const clock = $("clock").querySelector("time");
    clock.dateTime = clock.title = at;
    set(clock, status.clock);
    const looked = $("looked");
    if (looked && status.last_look_at) looked.dataset.at = Date.parse(status.last_look_at) / 1000;
    ahead = Date.parse(at) - Date.now();
  };
  const update = async () => {
    try {
      const status = await (await ask("api/v1/status")).json();
      if (status.tag !== tag || Date.now() - pageAt > PAGE_EVERY) takePage(await (await ask("./")).text());
      showClock(status);
      find();
      tick();
    } catch (error) {
      lose(error);
    }
  };
  let isAsking = false;
  const go = async () => {
    if (isAsking || document.hidden) return;
    isAsking = true;
    await update();
    isAsking = false;
  };
  document.addEventListener("visibilitychange", go);
  recall();
  filter();
  setInterval(tick, 1000);
  setInterval(go, EVERY);
})();
