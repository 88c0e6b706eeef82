() => {
  // Ctrl+Enter (or Cmd+Enter) presses the visible tab's Generate, Escape its Stop.
  const press = (name) => {
    const button = [...document.querySelectorAll(`button.${name}`)].find((each) => each.offsetParent);
    button?.click();
    return button;
  };
  const listOpen = (target) => target.getAttribute?.('aria-expanded') === 'true';
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
      if (press('generate')) event.preventDefault();
    } else if (event.key === 'Escape' && !listOpen(event.target)) {
      if (document.querySelector('.status[data-state=busy]')?.offsetParent) press('stop');
    }
  });
}
