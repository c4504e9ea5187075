"""`python -m unitok` and `deepspeed --module unitok`: the command line."""

import sys

from unitok.cli import main

if __name__ == "__main__":
    sys.exit(main())
