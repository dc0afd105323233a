import sys

from bench.twin.cuda.cli import main

sys.exit(main())
