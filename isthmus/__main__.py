"""``python -m isthmus`` is the command ``isthmus``, for launchers such as torchrun."""

from isthmus.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
