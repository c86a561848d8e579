"""The command `isthmus`: picks the subcommand, and turns what goes wrong into one line and an exit code.

Nothing heavy is imported before a subcommand has read its options (imports inside functions), so that `--help` answers
at once.
"""

import errno
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import isthmus
from isthmus.errors import UserError, nearest
from isthmus.registry import imported

logger = logging.getLogger("isthmus")

# what is typed -> (module with `run(arguments)`, one line)
COMMANDS = {
    "demo": ("isthmus.cli.study:run_demo_command", "the whole story on built-in images: train, sample, report"),
    "train tokenizer": ("isthmus.cli.train:run_tokenizer", "train the image tokenizer, or fine-tune one"),
    "train prior": ("isthmus.cli.train:run_prior", "train a VAR, SRDD or D-AR prior, or fine-tune a model"),
    "distill": ("isthmus.cli.train:run_distill", "train a student on fewer scales, or under another mask"),
    "sample": ("isthmus.cli.sample:run", "draw images from a model"),
    "evaluate": ("isthmus.cli.evaluate:run", "score a model's samples, or anyone's images"),
    "compare": ("isthmus.cli.evaluate:run_compare", "one table of evaluations that were measured in the same way"),
    "edit inpaint": ("isthmus.cli.sample:run_inpaint", "make what lies under a mask anew"),
    "edit outpaint": ("isthmus.cli.sample:run_outpaint", "make what lies beyond the edges of an image"),
    "edit class": ("isthmus.cli.sample:run_class", "make what lies under a mask anew, as another class"),
    "edit super-resolve": ("isthmus.cli.sample:run_super_resolve", "a small image at the model's size"),
    "edit variations": ("isthmus.cli.sample:run_variations", "images that share the coarse scales with one"),
    "study srdd": ("isthmus.cli.study:run_srdd", "experiments on VAR and SRDD: the papers' claims beside measurements"),
    "study dar": ("isthmus.cli.study:run_dar", "experiments on D-AR: the paper's claims beside measurements"),
    "study text": ("isthmus.cli.study:run_text", "experiments on words: what priors draw of their captions"),
    "convert var": ("isthmus.cli.convert:run_var", "published VAR weights to a pipeline folder"),
    "convert switti": ("isthmus.cli.convert:run_switti", "published Switti weights and text encoders to a folder"),
    "convert dar": ("isthmus.cli.convert:run_dar", "published D-AR weights to a pipeline folder"),
    "export llama": ("isthmus.cli.convert:run_llama", "the prior of a D-AR model for transformers, vLLM or SGLang"),
    "info": ("isthmus.cli.info:run", "what a model is; `info data`: licences; `info presets`: named runs"),
}

# commands of earlier versions -> what took their place
_REMOVED = {
    "train critic": "it told drawn tokens from true ones no better than a coin. Draw the tokens again that the model "
    "finds least likely: isthmus sample MODEL --refine masked.",
}

_VERBOSITY = {"-v": logging.DEBUG, "--verbose": logging.DEBUG, "-q": logging.WARNING, "--quiet": logging.WARNING}
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name); the exit code is returned.

    0: done. 2: the caller's to mend; one line on stderr says what. 130: interrupted.
    """
    # read when torch is imported: threads that wait for each other sleep, where spinning on cores that others use makes
    # a step six times as long
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if argv is None else argv)
    level = next((_VERBOSITY[word] for word in arguments if word in _VERBOSITY), logging.INFO)
    arguments = [word for word in arguments if word not in _VERBOSITY]
    # a console program without a console, or one whose streams were closed (`2>&-`)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    # names may hold any letter, and a console or a file may not take it
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with _messages(level):
        try:
            return _dispatch(arguments)
        except SystemExit as stop:  # --help of a subcommand
            return int(stop.code or 0)
        except KeyboardInterrupt:
            print("isthmus: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # whoever read our output has read enough (`isthmus ... | head`); Python would complain once more at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            line = _one_line(error)
            if line is None:
                raise
            logger.debug("where it happened:", exc_info=True)
            print(f"isthmus: error: {line}", file=sys.stderr)
            return 2


def _dispatch(arguments: list[str]) -> int:
    group, kind, *_ = [*arguments, "", ""]
    if group in ("", "-h", "--help", "help"):
        print(_help())
        return 0
    if group == "--version":
        print(f"isthmus {isthmus.__version__}")
        return 0
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            imported(COMMANDS[name][0])(arguments[words:])
            return 0
        if name in _REMOVED:
            raise UserError(f"there is no isthmus {name} any more: {_REMOVED[name]}")
    kinds = [name.split()[1] for name in COMMANDS if name.startswith(f"{group} ")]
    if kinds and kind in ("-h", "--help"):
        print(_help(group))
        return 0
    if kinds:
        got = f"got {kind!r}.{nearest(kind, kinds)}" if kind else "got nothing."
        raise UserError(f"isthmus {group} needs one of {', '.join(kinds)}, {got}")
    what = "option" if group.startswith("-") else "command"
    names = sorted({name.split()[0] for name in COMMANDS})
    raise UserError(f"there is no {what} {group!r}.{nearest(group, names)} Commands: {', '.join(names)}.")


def _help(group: str = "") -> str:
    shown = {name: about for name, (_, about) in COMMANDS.items() if name.startswith(group)}
    width = max(map(len, shown)) + 3
    listing = "\n".join(f"  {name:<{width}}{about}" for name, about in shown.items())
    return (
        f"usage: isthmus [-v | -q] {group + ' ...' if group else 'COMMAND ...'}\n\n"
        "Autoregressive transformers that are diffusion models, on your own images.\n\n"
        f"commands:\n{listing}\n\n"
        "options:\n"
        "  -h, --help       this text; `isthmus COMMAND --help` for the options of a command\n"
        "  -v, --verbose    say more, with tracebacks\n"
        "  -q, --quiet      warnings and errors only\n"
        "  --version        version of Isthmus\n\n"
        "Start with `isthmus demo`."
    )


def _one_line(error: Exception) -> str | None:
    """What to tell the caller about an error that is theirs to mend; None for a fault of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if getattr(error, "errno", None) in _FULL_DISK or "No space left on device" in text:
        return f"the disk is full: {text}. Free some space and run this again."
    if isinstance(error, OSError):
        return f"{text}. Check the path and its permissions."
    if isinstance(error, (MemoryError, RuntimeError)):
        # imported here: whatever takes much memory has it loaded
        from isthmus.pipelines.memory import is_out_of_memory

        if is_out_of_memory(error):
            return f"memory ran out ({text[:160]}). Try half the --batch-size."
    return None


@contextmanager
def _messages(level: int) -> Iterator[None]:
    """The logger `isthmus` on stderr at this level, for the time of one command."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
