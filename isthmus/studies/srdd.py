"""`isthmus study srdd`: what mask, guidance, schedule, weights, refinement and distillation do, all else being equal.

Source of the claims: Kumar, Nair and Patel, "Scale-Wise VAR is Secretly Discrete Diffusion", and the sibling works
HMAR, MVAR and Markov-VAR.
"""

from isthmus.studies.srdd_diffusion_tables import DIFFUSION_TABLES
from isthmus.studies.srdd_options import SrddSetting
from isthmus.studies.srdd_tables import SRDD_TABLES
from isthmus.studies.srdd_work import srdd_work
from isthmus.studies.study import Study


def summary(setting: SrddSetting) -> list[str]:
    """First paragraphs of the report."""
    one_tokenizer = f"tokenizer {setting.tokenizer.preset or 'of its own'} ({setting.tokenizer.num_steps} steps)"
    return [
        f"Next-scale models on {setting.prior.data}: one {one_tokenizer}, priors "
        f"{setting.prior.preset or 'of their own'} ({setting.prior.num_steps} steps each), seeds "
        f"{', '.join(map(str, setting.seeds))}. All priors share the tokenizer, so the spread over seeds is that of "
        "priors and samples.",
    ]


SRDD_STUDY: Study[SrddSetting] = Study(
    name="srdd", title="Study: SRDD and VAR", tables=(*SRDD_TABLES, *DIFFUSION_TABLES), work=srdd_work, summary=summary
)
