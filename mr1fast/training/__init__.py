"""How is it trained? A run, a step, and the files they leave behind."""
