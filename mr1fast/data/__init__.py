"""What is a problem: examples from the embedded tasks and from files."""
