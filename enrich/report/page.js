// Adds a button to each command that copies it. Without a script, the command can be selected.
for (const command of document.querySelectorAll(".command code")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", () => {
    getSelection().selectAllChildren(command);
    // Unlike navigator.clipboard, this works on pages that are opened as a file or without TLS.
    button.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl+C";
  });
  command.closest(".command").append(button);
}
