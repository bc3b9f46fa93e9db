"""``python -m rlkernels``: the ``rlkernels`` command where its script is not on the path."""

import sys

from rlkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
