"""Run pip up to three times: registries drop a connection now and then.

usage: pip_retry.py ARGS…   (the arguments of pip)
"""

from __future__ import annotations

import subprocess
import sys
import time

TRIES = 3

for attempt in range(1, TRIES + 1):
    status = subprocess.call([sys.executable, "-m", "pip", *sys.argv[1:]])
    if status == 0 or attempt == TRIES:
        sys.exit(status)
    print(f"pip failed (try {attempt} of {TRIES}); trying again", file=sys.stderr)
    time.sleep(5 * attempt)
