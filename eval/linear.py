"""Linear probe of an encoder: python eval/linear.py RUN --data.path DIR (the same as dino-sparo linear)."""

import sys

from dino_sparo.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["linear", *sys.argv[1:]]))
