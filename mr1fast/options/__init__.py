"""What did the user ask for: the options, the command line and YAML files."""
