() => {
  // The direction of the language that Gradio shows, and the language for what the server writes.
  const speak = () => {
    const root = document.documentElement, language = (root.lang || navigator.language).slice(0, 2).toLowerCase();
    root.dir = language === 'ar' ? 'rtl' : 'ltr';
    document.cookie = `triptych-language=${language}; path=/; max-age=31536000; SameSite=Lax`;
    nameTabs(window.gradio_config?.i18n_translations?.[language] ?? {});
  };
  // Gradio writes the names of its tabs once, perhaps before language.js has told it of Italian.
  const nameTabs = (words) => {
    for (const tab of document.querySelectorAll('[role=tab]')) {
      const text = [...tab.childNodes].find((each) => words[each.nodeValue?.trim()]);
      if (text) text.nodeValue = words[text.nodeValue.trim()];
    }
  };
  speak();
  new MutationObserver(speak).observe(document.documentElement, {attributes: true, attributeFilter: ['lang']});

  const shown = (name) => [...document.querySelectorAll(name)].find((each) => each.offsetParent);
  const tilesOf = (tile) => [...tile.closest('.canvas').querySelectorAll('.tile')];

  // A picture alone on its canvas; null shows all of them again.
  const enlarge = (canvas, tile) => {
    canvas.classList.toggle('one', tile !== null);
    for (const each of canvas.querySelectorAll('.tile')) each.classList.toggle('alone', each === tile);
    tile?.focus();
  };

  const onTile = (tile, event) => {
    const canvas = tile.closest('.canvas'), tiles = tilesOf(tile), alone = tile.classList.contains('alone');
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (step) {
      const next = tiles[(tiles.indexOf(tile) + step + tiles.length) % tiles.length];
      alone ? enlarge(canvas, next) : next.focus();
    } else if (event.key === 'Escape' && alone) {
      enlarge(canvas, null);
      tile.focus();
    } else {
      return false;
    }
    event.preventDefault();
    return true;
  };

  document.addEventListener('click', (event) => {
    const tile = event.target.closest('.canvas[data-state=done] .tile');
    if (tile && tilesOf(tile).length > 1) {
      enlarge(tile.closest('.canvas'), tile.classList.contains('alone') ? null : tile);
    }
    const example = event.target.closest('.examples button');
    if (example) {
      const prompt = shown('.ask textarea');
      prompt.value = example.textContent;
      prompt.dispatchEvent(new Event('input', {bubbles: true}));
      prompt.focus();
    }
  });

  // Pictures dropped beside those that are there join them; Gradio takes them on its small button alone. A PNG
  // dropped anywhere else has its settings restored, which the History tab does.
  const fileInput = (place) => place?.querySelector('input[type=file]');
  const restoring = async () => { // it is not there before its tab was seen
    const found = () => fileInput(document.getElementById('restore-png'));
    if (!found()) document.querySelector('[role=tab][data-tab-id=history]')?.click();
    for (let tries = 0; tries < 100 && !found(); tries++) await new Promise((done) => setTimeout(done, 50));
    return found();
  };
  for (const kind of ['dragover', 'drop']) {
    document.addEventListener(kind, async (event) => {
      const files = [...(event.dataTransfer?.types ?? [])].includes('Files');
      if (!files || event.defaultPrevented) return;
      event.preventDefault(); // the browser would leave the page for the picture
      if (kind === 'dragover') return;
      const place = event.target.closest?.('.image-prompts'), dropped = event.dataTransfer.files;
      const input = place ? fileInput(place) : await restoring();
      if (!input || !dropped.length) return;
      input.files = dropped;
      input.dispatchEvent(new Event('change', {bubbles: true}));
    });
  }

  // The tab that was open is open again.
  const tabs = () => [...document.querySelectorAll('.families > .tab-wrapper [role=tab]')];
  addEventListener('pagehide', () => {
    localStorage.setItem('triptych-tab', tabs().findIndex((tab) => tab.getAttribute('aria-selected') === 'true'));
  });
  const reopen = (tries) => {
    const tab = tabs()[Number(localStorage.getItem('triptych-tab') ?? 0)];
    if (!tab && tries) return setTimeout(reopen, 50, tries - 1);
    if (tab?.getAttribute('aria-selected') === 'false') tab.click();
  };
  reopen(100);

  // Ctrl+Enter (or Cmd+Enter) presses the open tab's Generate, Escape its Stop while it works.
  document.addEventListener('keydown', (event) => {
    const tile = event.target.closest?.('.canvas .tile');
    const inList = event.target.getAttribute?.('aria-expanded') === 'true';
    if (tile && onTile(tile, event) || document.querySelector('dialog[open]')) return;
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      shown('button.generate')?.click();
    } else if (event.key === 'Escape' && !inList && shown('.status[data-state=busy]')) {
      shown('button.stop')?.click();
    }
  });
}
