"""`isthmus study srdd`: what the Markov mask, guidance, scale schedules and loss weights do, at equal everything else.

Source of the claims: Kumar, Nair and Patel, "Scale-Wise VAR is Secretly Discrete Diffusion", and the sibling works that
spec/srdd.md names.
"""

from pathlib import Path

from isthmus.studies.options import chosen_tables, study_folder
from isthmus.studies.running import check_data, prepared_device, study_facts
from isthmus.studies.srdd_options import SRDD_BUDGETS, SrddSetting, SrddStudyOptions, srdd_setting
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
    name="srdd", title="Study: SRDD and VAR", tables=SRDD_TABLES, work=srdd_work, summary=summary
)


def run_srdd_study(options: SrddStudyOptions) -> Path:
    """Run the study that the options describe, from where it stopped; returns report.md.

    Raises:
        UserError: an option is not usable, or the folder holds something else.
    """
    tables = chosen_tables(options.tables, SRDD_BUDGETS[options.budget].tables, SRDD_STUDY.table_names)
    device = prepared_device(options)
    setting = srdd_setting(options, device.type)
    check_data(options)
    return SRDD_STUDY.run(
        setting, study_folder(options, SRDD_STUDY.name), tables=tables, facts=study_facts(options, device)
    )
