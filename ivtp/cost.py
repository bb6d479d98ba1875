"""`python -m ivtp.cost model=llava_1_5_7b pruner=ivtp text=512`: see `ivtp.cli.cost`."""

from ivtp.cli.cost import main

if __name__ == "__main__":
    raise SystemExit(main())
