"""Train a critic for a next-scale model (`isthmus train critic`): minutes on the tokens of the model's own data."""

import json
import logging
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from isthmus.data.batches import CachedTokens, EvaluationImages, training_batches
from isthmus.data.opening import open_source
from isthmus.data.source import ImageSource, WantedColumns
from isthmus.data.token_cache import ImageTokenizer, TokenCache
from isthmus.errors import UserError
from isthmus.files import alone_in, contents
from isthmus.functional.draws import weight_seed
from isthmus.functional.ranking import area_under_roc
from isthmus.models.fingerprint import pair_fingerprint
from isthmus.models.token_critic import TokenCritic
from isthmus.pictures import spread
from isthmus.pipelines.hub import model_folder
from isthmus.pipelines.labels import names_in_order
from isthmus.pipelines.loading import load_pipeline
from isthmus.pipelines.next_scale import NextScalePipeline
from isthmus.schedulers.scale_refinement import ScaleRefinementScheduler
from isthmus.training.critic_config import CriticRun
from isthmus.training.critic_examples import critic_examples
from isthmus.training.recorded_settings import explaining_places, recorded_settings
from isthmus.training.run import write_atomically
from isthmus.training.schedule_encoder import encoder_for

logger = logging.getLogger("isthmus")

REPORT = "critic.json"
# added to the run's seed: held-out images are numbered from 0 as training positions are, and get redraws of their own
_HELD_OUT_SEED = 1
_TOKENS = "tokens"


@alone_in("run.out")
def train_critic(run: CriticRun) -> Path:
    """Train, measure, and write the model with its critic; returns the folder.

    The saved model refines its draws with the critic (`ScaleRefinementScheduler(mode="critic")`). `critic.json` holds
    the area under the ROC curve on held-out images beside that of the model's probability alone.

    Raises:
        UserError: the model is no next-scale model of several scales, the data are not its own or unknown, or the
            folder holds something else; nothing is written then.
    """
    check_folder(run.out)
    pipeline = load_pipeline(run.model, device=run.device)
    if not isinstance(pipeline, NextScalePipeline):
        raise UserError(f"a critic judges next-scale models, got {run.model}, which is a {type(pipeline).__name__}.")
    tokenizer, transformer, schedule = pipeline.image_tokenizer, pipeline.transformer, pipeline.schedule
    if schedule.num_scales < 2:
        raise UserError(
            f"a critic judges tokens that have coarser scales before them, got a model of one scale, {schedule.sizes}. "
            "There is nothing to refine in its draws."
        )
    run = with_images(run)
    assert run.data is not None, "named above"
    with explaining_places(model_folder(run.model) / "run.json", {"data": run.data}):
        train, held_out = (
            open_source(
                run.data,
                image_size=pipeline.image_size,
                split=split,
                classes=run.classes,
                columns=WantedColumns(run.image_column, run.label_column),
            )
            for split in ("train", "val")
        )
    check_classes(pipeline, train)
    run.out.mkdir(parents=True, exist_ok=True)
    cache = TokenCache.build(
        run.out / _TOKENS,
        cast(ImageTokenizer, encoder_for(tokenizer, schedule)),
        train,
        num_views=run.num_views,
        image_size=pipeline.image_size,
        seed=run.seed,
        device=pipeline.device,
    )
    critic = _new_critic(pipeline, run)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=run.learning_rate, weight_decay=0.01)
    batches = training_batches(
        CachedTokens(cache, seed=run.seed, balanced=train.balanced), batch_size=run.batch_size, num_workers=0
    )
    for step in tqdm(range(run.num_steps), desc="critic", unit="step", disable=None):
        batch = next(batches)
        token_ids = list(batch["token_ids"].to(pipeline.device).split(list(schedule.lengths), dim=1))
        labels = _labels(pipeline, batch["class_label"])
        positions = batch["position"].tolist()
        examples = critic_examples(
            tokenizer, transformer, token_ids, labels, positions, seed=run.seed, schedule=schedule
        )
        losses = []
        for one in examples:
            found = critic(one.codes, one.features, one.measures, schedule.sizes[one.scale]).plausibility
            losses.append(F.binary_cross_entropy_with_logits(found, one.true.float()))
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * rate_at(step, run.num_steps)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        optimizer.step()

    report = measured(pipeline, critic.eval(), held_out, seed=run.seed, max_images=run.max_held_out)
    logger.info(
        "area under the ROC curve on %d held-out images: critic %.3f, probability alone %.3f",
        report["num_images"], report["critic"]["all"], report["probability"]["all"],
    )  # fmt: skip
    pipeline.critic, pipeline.scheduler = critic, ScaleRefinementScheduler(mode="critic")
    # the model last: where it is, the folder is complete
    write_atomically(run.out / REPORT, json.dumps(report, indent=1) + "\n")
    pipeline.save_pretrained(run.out)
    return run.out


def with_images(run: CriticRun) -> CriticRun:
    """The run with the images and classes that its model was trained on, where it names no images.

    Raises:
        UserError: it names none, and the model's run.json does not tell them or tells a stream.
    """
    if run.data is not None:
        return run
    record = recorded_settings(model_folder(run.model)) or {}
    if "data" not in record:
        raise UserError(
            f"a critic learns on the images of its model, and {run.model} does not say which (no run.json that "
            "names them). Pass --data, and --classes for some."
        )
    if record.get("stream"):
        raise UserError(
            f"a critic reads images by index, and {run.model} was trained on a stream, {record['data']}. Pass --data "
            "with images of that kind."
        )
    classes = record.get("classes") if run.classes is None else run.classes
    logger.info("images of the model: %s, classes: %s", record["data"], ", ".join(classes or ()) or "all it has")
    return replace(
        run,
        data=record["data"],
        classes=None if classes is None else tuple(classes),
        image_column=run.image_column or record.get("image_column"),
        label_column=run.label_column or record.get("label_column"),
    )


def check_folder(out: Path) -> None:
    """Refuse a folder that holds more than an unfinished training of a critic leaves behind.

    Raises:
        UserError: it is a file, or holds something else, such as a model.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out must be a folder, got the file {out}. Choose another name.")
    own = (_TOKENS, REPORT, f"{REPORT}.partial")
    found = [path.name for path in contents(out)]
    others = [name for name in found if name not in own and not name.startswith(".partial-")]
    if others:
        raise UserError(
            f"--out must be a new or empty folder, or that of an unfinished critic, got {out}, which holds "
            f"{others[0]}. Choose another; nothing is overwritten."
        )


@torch.no_grad()
def measured(
    pipeline: NextScalePipeline, critic: TokenCritic, held_out: ImageSource, *, seed: int, max_images: int
) -> dict:
    """Areas under the ROC curve of telling true from redrawn tokens of held-out images, per scale and over all.

    The images are spread evenly over the set, which may be sorted by class.
    """
    views, schedule = EvaluationImages(held_out, pipeline.image_size), pipeline.schedule
    chosen = spread(len(views), max_images)
    scores: dict[str, dict[int, list[Tensor]]] = {name: defaultdict(list) for name in ("critic", "probability")}
    truth: dict[int, list[Tensor]] = defaultdict(list)
    for start in range(0, len(chosen), 32):
        rows = [views[i] for i in chosen[start : start + 32]]
        token_ids = pipeline.encode(torch.stack([torch.as_tensor(row["image"]) for row in rows]))
        labels = _labels(pipeline, torch.tensor([int(row["class_label"]) for row in rows]))
        examples = critic_examples(
            pipeline.image_tokenizer, pipeline.transformer, [ids.to(pipeline.device) for ids in token_ids], labels,
            chosen[start : start + 32], seed=seed + _HELD_OUT_SEED, schedule=schedule,
        )  # fmt: skip
        for one in examples:
            found = critic(one.codes, one.features, one.measures, schedule.sizes[one.scale]).plausibility
            scores["critic"][one.scale].append(found.flatten().cpu())
            scores["probability"][one.scale].append(one.measures[..., 0].flatten().cpu())
            truth[one.scale].append(one.true.flatten().cpu())
    report: dict = {"num_images": len(chosen), "scale_sizes": list(schedule.sizes)}
    for name, by_scale in scores.items():
        areas = {str(k): area_under_roc(torch.cat(by_scale[k]), torch.cat(truth[k])) for k in sorted(by_scale)}
        every = [torch.cat([torch.cat(part[k]) for k in sorted(part)]) for part in (by_scale, truth)]
        report[name] = {"all": area_under_roc(every[0], every[1]), "by_scale": areas}
    return report


def rate_at(step: int, num_steps: int) -> float:
    """Share of the peak learning rate: up over a tenth of the steps, then down to 0 on a cosine.

    >>> [round(rate_at(step, 20), 2) for step in (0, 1, 2, 11, 20)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = max(num_steps // 10, 1)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup or 1))) / 2


def _new_critic(pipeline: NextScalePipeline, run: CriticRun) -> TokenCritic:
    with torch.random.fork_rng():
        torch.manual_seed(weight_seed(run.seed))
        critic = TokenCritic(
            scale_sizes=pipeline.schedule.sizes,
            codebook_size=pipeline.codebook_size,
            codebook_dim=pipeline.image_tokenizer.config["codebook_dim"],
            width=run.width,
            num_blocks=run.num_blocks,
            model_fingerprint=pair_fingerprint(pipeline.image_tokenizer, pipeline.transformer),
        )
    critic.to(pipeline.device)
    return critic.train()


def check_classes(pipeline: NextScalePipeline, source: ImageSource) -> None:
    """Raise UserError unless the images have the model's classes, in its order."""
    names = names_in_order(pipeline.class_names)
    fits = source.class_names == names if names else len(source.class_names) == pipeline.num_classes
    if pipeline.num_classes and not fits:
        raise UserError(
            f"the data must have the classes of the model ({', '.join(names) or pipeline.num_classes}), got "
            f"{', '.join(source.class_names) or 'none'}. Choose them with --classes, in this order."
        )


def _labels(pipeline: NextScalePipeline, labels: Tensor) -> Tensor:
    """Labels on the model's device; the null label of a model without classes."""
    return (labels if pipeline.num_classes else torch.zeros_like(labels)).to(pipeline.device)
