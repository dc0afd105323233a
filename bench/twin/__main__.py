import sys

from bench.twin.cli import main

if __name__ == "__main__":
    sys.exit(main())
