"""How the experiments of the study of SRDD are done."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.data.batches import EvaluationImages
from isthmus.data.opening import open_source
from isthmus.data.source import WantedColumns
from isthmus.generation.next_scale_likelihood import signal_to_noise
from isthmus.models.component_files import read_config
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.pipelines.loading import choose_device
from isthmus.studies.evaluations import EvaluationSetting, evaluation_values, mean_and_interval
from isthmus.studies.experiments import Experiment, Values, Work
from isthmus.studies.held_out import HeldOut
from isthmus.studies.srdd_cost import cost_values
from isthmus.studies.srdd_editing import editing_values
from isthmus.studies.srdd_experiments import MARKOV, TOKENIZER, VARIANTS, every_second, model_folder, prior_run
from isthmus.studies.srdd_options import SrddSetting
from isthmus.studies.srdd_refinement import refined_values
from isthmus.studies.srdd_students import drawing_values, load_next_scale
from isthmus.studies.srdd_words import TAUGHT
from isthmus.training.config import PriorRun
from isthmus.training.distill_config import DistillRun
from isthmus.training.export import load_tokenizer
from isthmus.training.logs import column, last, read_log
from isthmus.training.saved_networks import TOKENIZER_FOLDER
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer


def srdd_work(setting: SrddSetting, folder: Path) -> Mapping[str, Work]:
    """The function behind every kind of experiment."""
    evaluations = EvaluationSetting.of(
        setting.prior, num=setting.num, batch_size=setting.batch_size, device=setting.device
    )

    def tokenizer(experiment: Experiment) -> Values:
        run = replace(setting.tokenizer, out=model_folder(folder, experiment.name))
        train_tokenizer(run)
        log = read_log(run.out / "log.jsonl")
        sizes = load_tokenizer(str(run.out)).schedule.sizes
        return {"psnr": last(log, "val/psnr"), "usage": last(log, "val/usage"), "scale_sizes": list(sizes)}

    def shortened(experiment: Experiment) -> Values:
        return {"scale_sizes": shorten(model_folder(folder, TOKENIZER), model_folder(folder, experiment.name))}

    def prior(experiment: Experiment) -> Values:
        run = placed_run(setting, folder, experiment.settings["variant"], experiment.settings["seed"])
        train_prior(run)
        return training_values(run)

    def evaluation(experiment: Experiment) -> Values:
        facts = experiment.settings
        model = model_folder(folder, f"prior-{facts['variant']}-seed{facts['seed']}")
        place = folder / experiment.name / "evaluation"
        return evaluation_values(model, place, evaluations, seed=facts["seed"], guidances=facts["guidances"])

    def cost(experiment: Experiment) -> Values:
        facts = experiment.settings
        runs = {name: placed_run(setting, folder, name, facts["seed"]) for name in facts["variants"]}
        return cost_values(runs, choose_device(setting.device), rounds=facts["rounds"])

    def snr(experiment: Experiment) -> Values:
        tokenizer = load_tokenizer(str(model_folder(folder, TOKENIZER)))
        tokenizer.to(choose_device(setting.device))
        held_out = open_source(
            setting.prior.data,
            image_size=tokenizer.image_size,
            split="val",
            classes=setting.prior.classes,
            columns=WantedColumns(setting.prior.image_column, setting.prior.label_column),
        )
        ratios = snr_by_scale(tokenizer, EvaluationImages(held_out, tokenizer.image_size))
        return {
            "images": len(ratios),
            "scale_sizes": list(tokenizer.schedule.sizes),
            "decibels": [mean_and_interval(of_scale) for of_scale in ratios.T],
        }

    def refined(experiment: Experiment) -> Values:
        facts = experiment.settings
        model = model_folder(folder, f"prior-{facts['variant']}-seed{facts['seed']}")
        pipeline = load_next_scale(model, setting.device)
        return refined_values(pipeline, evaluations, seed=facts["seed"], modes=facts["modes"])

    def student(experiment: Experiment) -> Values:
        facts = experiment.settings
        run = student_run(setting, folder, experiment.name, facts["seed"], facts["weight"])
        train_prior(run)
        return training_values(run)

    def student_samples(experiment: Experiment) -> Values:
        facts = experiment.settings
        model, place = model_folder(folder, facts["student"]), folder / experiment.name / "evaluation"
        return evaluation_values(model, place, evaluations, seed=facts["seed"], guidances=facts["guidances"])

    def drawing(experiment: Experiment) -> Values:
        seed = experiment.settings["seed"]
        names = {"teacher": f"prior-{MARKOV.name}-seed{seed}", "student": f"student-{TAUGHT}-seed{seed}"}
        models = {who: load_next_scale(model_folder(folder, name), setting.device) for who, name in names.items()}
        return drawing_values(models, seed=seed)

    def edits(experiment: Experiment) -> Values:
        facts = experiment.settings
        model = model_folder(folder, f"prior-{facts['variant']}-seed{facts['seed']}")
        pipeline = load_next_scale(model, setting.device)
        held_out = HeldOut.of(pipeline, evaluations)
        return editing_values(pipeline, held_out, jumps=facts["jumps"], seed=facts["seed"])

    return {
        "refined": refined,
        "student": student,
        "student-samples": student_samples,
        "drawing": drawing,
        "edits": edits,
        "tokenizer": tokenizer,
        "shortened": shortened,
        "prior": prior,
        "evaluation": evaluation,
        "cost": cost,
        "snr": snr,
    }


def placed_run(setting: SrddSetting, folder: Path, variant_name: str, seed: int) -> PriorRun:
    """A variant's run with its folders: the token cache is shared by all that read the same tokens."""
    variant = VARIANTS[variant_name]
    return replace(
        prior_run(setting, variant, seed),
        out=model_folder(folder, f"prior-{variant.name}-seed{seed}"),
        tokenizer=str(model_folder(folder, variant.tokenizer)),
        token_cache=folder / "token-caches" / f"{variant.tokenizer}-seed{seed}",
    )


def student_run(setting: SrddSetting, folder: Path, name: str, seed: int, weight: float) -> DistillRun:
    """A student's run with its teacher, scales and folder; its token cache is its own.

    That of a taught student also holds the tokens of the teacher's schedule.
    """
    teacher = model_folder(folder, f"prior-{MARKOV.name}-seed{seed}")
    sizes = read_config(teacher / "transformer")["scale_sizes"]
    return replace(
        setting.student,
        seed=seed,
        from_model=str(teacher),
        scale_sizes=every_second(sizes),
        distillation_weight=weight,
        out=model_folder(folder, name),
    )


def training_values(run: PriorRun | DistillRun) -> Values:
    """Held-out bits per token of a finished training, by step and at the end by scale."""
    log = read_log(run.out / "log.jsonl")
    steps, bits = column(log, "val/bits_per_token")
    by_scale: dict[str, Any] = {}
    while np.isfinite(value := last(log, f"val/bits_scale{len(by_scale)}")):
        by_scale[str(len(by_scale))] = value
    return {"steps": steps, "bits_per_token": bits, "bits_by_scale": list(by_scale.values())}


def shorten(source: Path, target: Path) -> list[int]:
    """Write the tokenizer of `source` with every second scale; returns the sides that are left.

    The weights are the same, and every side keeps its phi (`ScaleSchedule.derive`): the tokens of an image are those
    that the residual search finds on the shorter schedule.
    """
    parent = load_tokenizer(str(source))
    schedule = parent.schedule.derive(every_second(parent.schedule.sizes))
    arguments = {name: value for name, value in parent.config.items() if not name.startswith("_")}
    arguments |= {"scale_sizes": schedule.sizes, "phi_indices": schedule.phi_indices}
    tokenizer = MultiScaleVQVAE(**arguments)
    tokenizer.load_state_dict(parent.state_dict())
    tokenizer.save_pretrained(target / TOKENIZER_FOLDER)  # pyright: ignore[reportCallIssue]
    return list(schedule.sizes)


def snr_by_scale(tokenizer: MultiScaleVQVAE, images: EvaluationImages, *, batch_size: int = 32) -> np.ndarray:
    """Signal-to-noise ratios, dB, of every image (rows) after every scale (columns)."""
    rows = []
    for start in range(0, len(images), batch_size):
        chosen = range(start, min(start + batch_size, len(images)))
        pixels = torch.stack([torch.as_tensor(images[i]["image"]) for i in chosen]).to(tokenizer.device)
        with torch.no_grad():
            latents = tokenizer.latents(pixels)
        rows.append(signal_to_noise(tokenizer, latents).cpu().double())
    return torch.cat(rows).numpy()
