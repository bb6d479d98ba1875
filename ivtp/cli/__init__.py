"""Commands: arguments, exit status and errors."""
