"""The command `isthmus` with chunks of 4 images, so that two processes have something to share; run under torchrun."""

import sys

from isthmus.cli import main
from isthmus.evaluation import drawing, samples

if __name__ == "__main__":
    samples.CHUNK = drawing.CHUNK = 4
    raise SystemExit(main(sys.argv[1:]))
