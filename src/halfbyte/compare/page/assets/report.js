// On paper nothing can be unfolded: the tables below the drawings are opened for printing and closed again.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = true;
    details.dataset.shut = "";
  }
});
addEventListener("afterprint", () => {
  for (const details of document.querySelectorAll("details[data-shut]")) {
    details.open = false;
    delete details.dataset.shut;
  }
});
