"""k-NN accuracy of a trained encoder: python eval/knn.py RUN --data.path DIR (the same as dino-sparo knn)."""

import sys

from dino_sparo.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["knn", *sys.argv[1:]]))
