"""What `isthmus sample` does until the first scale is drawn, with the time after each part.

Called by next_scale.py in a fresh process with a model folder and the time at which the process was started. Prints
wall and CPU seconds since then after: the command's own imports, torch, the pipeline, the loaded folder, one scale.
"""

import sys
import time


def main(folder: str, started: float) -> None:
    marks = []

    def mark() -> None:
        marks.extend((time.time() - started, time.process_time()))

    import isthmus.cli  # noqa: F401

    mark()
    import torch  # noqa: F401

    mark()
    from isthmus.pipelines.loading import load_pipeline

    mark()
    pipeline = load_pipeline(folder)
    mark()
    next(pipeline.stream(0, seed=0, guidance_scale=2.0, output_type="latent"))
    mark()
    print(*marks)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
