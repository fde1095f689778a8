"""How is it trained: a run, a step, and what they leave behind."""
