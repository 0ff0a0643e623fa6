"""``python -m pyroebm`` is the command ``pyroebm``."""

from pyroebm.cli import main

if __name__ == "__main__":
    main()
