import sys

from benchmarks.attention.run import main

sys.exit(main())
