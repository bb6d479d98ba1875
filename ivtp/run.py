"""`python -m ivtp.run experiment=ablation_groupsize`: see `ivtp.cli.run`."""

from ivtp.cli.run import main

if __name__ == "__main__":
    raise SystemExit(main())
