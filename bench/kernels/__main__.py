import sys

from bench.kernels.cli import main

sys.exit(main())
