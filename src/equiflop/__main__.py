"""``python -m equiflop``: the same as the command ``equiflop``."""

from equiflop_command import main

if __name__ == "__main__":
    main()
