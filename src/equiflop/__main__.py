"""``python -m equiflop``: the same as the command ``equiflop``."""

from equiflop.cli.main import main

if __name__ == "__main__":
    main(prog_name="equiflop")
