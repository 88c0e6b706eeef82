// Gradio has no Italian of its own and begins in English, though it could show our texts: its module of
// languages is told, before it draws anything. Of the languages that it has, it takes the browser's by itself.
if (navigator.language.toLowerCase().startsWith('it')) {
  const files = performance.getEntriesByType('resource').map((each) => each.name);
  const core = files.find((name) => /\/assets\/core-[^/]+\.js$/.test(name));
  if (core) import(core).then((gradio) => gradio.changeLocale('it'));
}
