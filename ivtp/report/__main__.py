"""`python -m ivtp.report outputs/table1`: see `ivtp.cli.report`."""

from ivtp.cli.report import main

if __name__ == "__main__":
    raise SystemExit(main())
