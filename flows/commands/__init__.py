"""The commands of the command line, one file each; every function returns the exit code."""
