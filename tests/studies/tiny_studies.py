"""Studies on tiny runs: 8 px, two classes, seconds."""

from pathlib import Path

from isthmus.studies.dar_options import DarSetting
from isthmus.studies.srdd_options import SrddSetting
from tests.training.tiny_dar_runs import diffusion_tokenizer_run, next_token_prior_run
from tests.training.tiny_runs import prior_run, tokenizer_run, write_images
from tests.training.tiny_teacher import distill_run


def tiny_data(folder: Path) -> str:
    """80 images of two classes, so that eight are held out."""
    return write_images(folder / "squares.npz", count=80)


def srdd_setting(data: str, **changes) -> SrddSetting:
    """One seed, eight samples, three guidances with the prior's own."""
    setting = {
        "tokenizer": tokenizer_run(data, Path("unset")),
        "prior": prior_run(data, Path("unset"), ""),
        "student": distill_run(data, Path("unset"), Path("unset"), scale_sizes=None),
        "critic_steps": 2,
        "seeds": (0,),
        "num": 8,
        "guidances": ("1", "2"),
        "rounds": 2,
        "batch_size": 8,
    }
    return SrddSetting(**(setting | changes))


def dar_setting(data: str, **changes) -> DarSetting:
    """One seed, eight samples, two solvers of two numbers of steps."""
    setting = {
        "tokenizer": diffusion_tokenizer_run(data, Path("unset")),
        "prior": next_token_prior_run(data, Path("unset"), ""),
        "seeds": (0,),
        "num": 8,
        "guidances": ("1", "linear:1.1:8"),
        "solvers": ("euler", "adams-bashforth"),
        "solver_steps": (2, 4),
        "batch_size": 8,
    }
    return DarSetting(**(setting | changes))
