import sys

from benchmarks.static_kernels.run import main

sys.exit(main())
