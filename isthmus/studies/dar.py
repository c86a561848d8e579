"""`isthmus study dar`: reconstruction, previews, solvers, guidance and token order of D-AR models.

Source of the claims: Gao and Shou, "D-AR: Diffusion via Autoregressive Models".
"""

from isthmus.studies.dar_options import DarSetting
from isthmus.studies.dar_tables import DAR_TABLES, seeds
from isthmus.studies.dar_work import dar_work
from isthmus.studies.study import Study


def summary(setting: DarSetting) -> list[str]:
    """First paragraphs of the report."""
    return [
        f"D-AR models on {setting.prior.data}: tokenizers {setting.tokenizer.preset or 'of their own'} "
        f"({setting.tokenizer.num_steps} steps) and priors {setting.prior.preset or 'of their own'} "
        f"({setting.prior.num_steps} steps), seeds {seeds(setting)}. A seed is a tokenizer with a prior of its own, so "
        "the spread over seeds is that of whole models.",
    ]


DAR_STUDY: Study[DarSetting] = Study(name="dar", title="Study: D-AR", tables=DAR_TABLES, work=dar_work, summary=summary)
