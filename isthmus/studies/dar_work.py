"""How the experiments of the study of D-AR are done."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from isthmus.pictures import to_uint8
from isthmus.pipelines.dar import DARPipeline
from isthmus.pipelines.labels import Label
from isthmus.pipelines.loading import choose_device, load_pipeline
from isthmus.pipelines.memory import batch_size_that_fits
from isthmus.studies.dar_experiments import model_folder, prior_run, tokenizer_run
from isthmus.studies.dar_options import DarSetting
from isthmus.studies.dar_reconstruction import order_values, reconstruction_values, solver_values
from isthmus.studies.evaluations import EvaluationSetting, evaluation_values
from isthmus.studies.experiments import Experiment, Values, Work
from isthmus.studies.held_out import HeldOut
from isthmus.studies.real_images import DrawnSamples, RealImages
from isthmus.training.logs import column, last, read_log
from isthmus.training.train_diffusion_tokenizer import train_diffusion_tokenizer
from isthmus.training.train_prior import train_prior


def dar_work(setting: DarSetting, folder: Path) -> Mapping[str, Work]:
    """The function behind every kind of experiment."""
    evaluations = EvaluationSetting.of(
        setting.prior, num=setting.num, batch_size=setting.batch_size, device=setting.device
    )

    def tokenizer(experiment: Experiment) -> Values:
        run = replace(tokenizer_run(setting, experiment.settings["seed"]), out=model_folder(folder, experiment.name))
        train_diffusion_tokenizer(run)
        log = read_log(run.out / "log.jsonl")
        names = ("val/psnr", "val/psnr_shuffled", "val/usage")
        return {name.removeprefix("val/"): last(log, name) for name in names}

    def prior(experiment: Experiment) -> Values:
        seed = experiment.settings["seed"]
        run = replace(
            prior_run(setting, seed),
            tokenizer=str(model_folder(folder, f"tokenizer-seed{seed}")),
            out=model_folder(folder, experiment.name),
        )
        train_prior(run)
        steps, bits = column(read_log(run.out / "log.jsonl"), "val/bits_per_token")
        return {"steps": steps, "bits_per_token": bits}

    def model(experiment: Experiment) -> DARPipeline:
        place = model_folder(folder, f"prior-seed{experiment.settings['seed']}")
        pipeline = load_pipeline(str(place), device=choose_device(setting.device))
        assert isinstance(pipeline, DARPipeline), "the prior's run writes one"
        return pipeline

    def held_out(pipeline: DARPipeline) -> HeldOut:
        return HeldOut.of(pipeline, evaluations)

    def reconstruction(experiment: Experiment) -> Values:
        pipeline = model(experiment)
        return reconstruction_values(pipeline, held_out(pipeline))

    def solvers(experiment: Experiment) -> Values:
        pipeline, facts = model(experiment), experiment.settings
        return solver_values(pipeline, held_out(pipeline), solvers=facts["solvers"], steps=facts["steps"])

    def order(experiment: Experiment) -> Values:
        pipeline = model(experiment)
        return order_values(pipeline, held_out(pipeline))

    def evaluation(experiment: Experiment) -> Values:
        facts = experiment.settings
        place = model_folder(folder, f"prior-seed{facts['seed']}")
        target = folder / experiment.name / "evaluation"
        return evaluation_values(place, target, evaluations, seed=facts["seed"], guidances=facts["guidances"])

    def previews(experiment: Experiment) -> Values:
        return preview_values(model(experiment), evaluations, seed=experiment.settings["seed"])

    return {
        "tokenizer": tokenizer,
        "prior": prior,
        "reconstruction": reconstruction,
        "solvers": solvers,
        "order": order,
        "evaluation": evaluation,
        "previews": previews,
    }


def preview_values(pipeline: DARPipeline, setting: EvaluationSetting, *, seed: int) -> Values:
    """Scores of the previews after every solver step, of the same samples throughout; only features are kept.

    A preview is the jump from the state to the image (`pipeline.stream`), in 8-bit values; the last is the image.
    """
    real = RealImages.of(pipeline, setting)
    labels = real.classes.model_ids
    size = setting.batch_size or batch_size_that_fits(pipeline, guided=pipeline.defaults.guidance_scale != 1)
    names = pipeline.step_names(pipeline.scheduler.config["num_inference_steps"])
    samples = [DrawnSamples(real.network) for _ in names]
    with tqdm(total=len(labels), desc="previews", unit="image", disable=None) as bar:
        for start in range(0, len(labels), size):
            chosen = labels[start : start + size]
            ids: list[Label] = [None if label == pipeline.num_classes else int(label) for label in chosen]
            for step in pipeline.stream(ids, seed=seed, image_index=start, output_type="latent"):
                samples[step.index].add(to_uint8(torch.as_tensor(step.preview)))
            bar.update(len(chosen))
    # where two steps wait for the same tokens, the later one stands for them
    by_step = {name: real.scored(found) for name, found in zip(names, samples, strict=True)}
    return real.values("by_step", by_step, pipeline.image_size)
