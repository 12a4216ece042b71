"""``python -m daco_rt.cli``."""

import sys

from daco_rt.cli import main

sys.exit(main())
