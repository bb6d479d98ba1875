"""`python -m ivtp.bench suite=cpu`: see `ivtp.cli.bench`."""

from ivtp.cli.bench import main

if __name__ == "__main__":
    raise SystemExit(main())
