// The Models tab. `element` holds one of its parts, written by ui/models.py and ui/checkpoints.py; `trigger`
// tells the server of a click, and asks for how far a download is.
let pressed = null; // the key of the button whose answer is awaited

element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-do]');
  if (!button) return;
  pressed = button.dataset.key;
  trigger('click', {do: button.dataset.do, key: button.dataset.key});
});

// A button that was pressed may be gone, or be another's now: then the keyboard goes on at the line that says
// what came of it.
watch('value', () => {
  const told = element.querySelector('.told');
  if (pressed === null || told?.dataset.about !== pressed || !told.textContent) return;
  if (document.activeElement?.dataset?.key !== pressed) told.focus();
  pressed = null;
});

// Only while something is downloaded, and only where somebody sees it.
const asking = setInterval(() => {
  if (!element.isConnected) clearInterval(asking);
  else if (element.offsetParent && !document.hidden && element.querySelector('[data-busy]')) trigger('tick');
}, 1000);
