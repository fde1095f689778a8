"""What did the user say: the options, the command line and YAML files."""
