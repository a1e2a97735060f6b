"""python -m kerasdefense.serving IMAGE...: ask a served model about image files."""

import sys

from kerasdefense.serving.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
