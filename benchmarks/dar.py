"""Speed and memory of D-AR, one part after the other: the prior's decode loop, then the pixel decoder.

    python benchmarks/dar.py [--quick] [--threads N]

`dar_prior.py` and `dar_pixels.py` measure one part each, with more options.
"""

import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    for part in ("dar_prior.py", "dar_pixels.py"):
        subprocess.run([sys.executable, str(Path(__file__).with_name(part)), *sys.argv[1:]], check=True)
