import sys

from bench.tune.cli import main

sys.exit(main())
