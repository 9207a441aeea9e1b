import sys

from bench.gpu.lease.main import main

sys.exit(main())
