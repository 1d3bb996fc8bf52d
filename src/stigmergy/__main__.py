"""`python -m stigmergy` is `stigmergy`."""

from stigmergy.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
