"""The Ray job entry point of training: ``python -m jobs.train --config FILE [--set key=value ...]``.

Arguments, output and exit codes are those of ``raysp train``; `raysp submit` runs this module on the cluster.
"""

from __future__ import annotations

import sys

from raysp.cli import main

if __name__ == "__main__":
    sys.argv = [sys.argv[0], "train", *sys.argv[1:]]
    main()
