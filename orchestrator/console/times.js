(() => {
  const units = [[120, 1, 's'], [600, 60, 'm', 1, 's'], [10800, 60, 'm'], [28800, 3600, 'h', 60, 'm'],
    [172800, 3600, 'h'], [691200, 86400, 'd', 3600, 'h'], [Infinity, 86400, 'd']];
  const age = (ms) => {
    const s = Math.max(0, Math.floor(ms / 1000)), [, unit, mark, less, lessMark] = units.find(([top]) => s < top);
    const rest = less ? Math.floor(s % unit / less) : 0;
    return Math.floor(s / unit) + mark + (rest ? rest + lessMark : '');
  };
  const paint = () => {
    for (const one of document.querySelectorAll('time[datetime]')) {
      const at = new Date(one.getAttribute('datetime'));
      if (isNaN(at)) { if (one.textContent !== '-') one.textContent = '-'; continue; }
      const local = at.toLocaleString(), text = one.dataset.as === 'age' ? age(Date.now() - at) : local;
      if (one.textContent !== text) one.textContent = text;
      if (one.title !== local) one.title = local;
    }
  };
  let waits = false;
  const soon = () => { if (!waits) { waits = true; requestAnimationFrame(() => { waits = false; paint(); }); } };
  new MutationObserver(soon).observe(document, {subtree: true, childList: true, attributeFilter: ['datetime']});
  setInterval(paint, 1000);
})();
