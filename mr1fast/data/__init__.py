"""What is a problem? Examples from the embedded tasks and from files."""
