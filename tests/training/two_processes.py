"""Started by test_processes.py under torchrun: gloo processes that train, agree to stop, and share out networks."""

import json
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from isthmus.dar.prior import TokenLayout, new_prior
from isthmus.dar.runs import DiffusionTokenizerRun, NextTokenPriorRun
from isthmus.dar.train_prior import (
    NextTokenObjective,
    NextTokenPriorTask,
    ResidualDropout,
    averaged_llama,
    embedding_seeds,
    residual_seeds,
)
from isthmus.errors import UserError
from isthmus.next_scale.runs import DistillRun, PriorRun, TokenizerRun
from isthmus.next_scale.train_prior import NextScalePriorTask, next_scale_loss, scale_weights
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.training.checkpoints import gathered, like, whole
from isthmus.training.config import OptimConfig, Run, run_from_json
from isthmus.training.optim import ExponentialMovingAverage, adamw
from isthmus.training.run import FiniteGuard, StopRequest
from isthmus.training.saved_networks import averaged_model
from tests.testers import TRAINED_ATOL
from tests.training.tiny_runs import train

SHARDED_BATCH = 4
MAX_GRAD_NORM = 0.05  # small enough to clip at every step


def tiny_prior(*, shared_adaln: bool) -> NextScaleTransformer:
    """The network that is shared out; the same in every process."""
    torch.manual_seed(0)
    return NextScaleTransformer(
        scale_sizes=(1, 2, 4), codebook_size=16, codebook_dim=4, width=16, num_layers=2, num_heads=2, num_classes=3,
        scale_attention="markov", shared_adaln=shared_adaln, init_gate=0.5,
    )  # fmt: skip


def three_steps(
    model: NextScaleTransformer, *, rank: int = 0, world_size: int = 1
) -> tuple[ExponentialMovingAverage, list[float], torch.optim.Optimizer]:
    """Three clipped steps on this process's share of three fixed batches; EMA, gradient norms, optimizer."""
    optimizer = adamw(model, OptimConfig(learning_rate=1e-3))
    ema, guard, norms = ExponentialMovingAverage(model, 0.9), FiniteGuard(torch.device("cpu")), []
    generator = torch.Generator().manual_seed(1)
    length, share = model.schedule.num_tokens, SHARDED_BATCH // world_size
    mine = slice(rank * share, (rank + 1) * share)
    for _ in range(3):
        token_ids = torch.randint(16, (SHARDED_BATCH, length), generator=generator)[mine]
        inputs = torch.randn(SHARDED_BATCH, length - 1, 4, generator=generator)[mine]
        labels = torch.randint(4, (SHARDED_BATCH,), generator=generator)[mine]
        weights = scale_weights("token-uniform", model.schedule.sizes)
        logits = model(labels, inputs).logits
        next_scale_loss(logits, token_ids, model.schedule, weights, scales=(0, 1, 2)).total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        guard.watch(norm, *ema.averages.values())
        norms.append(whole(norm).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model)
    guard.check(PriorRun(), 3)
    return ema, norms, optimizer


def share_out(folder: Path, rank: int, world_size: int, *, shared_adaln: bool) -> None:
    """Train sharded; the main process writes the whole averages and what a reloaded EMA holds."""
    model, mesh = tiny_prior(shared_adaln=shared_adaln), init_device_mesh("cpu", (world_size,))
    for module in model.modules():
        if type(module).__name__ in NextScalePriorTask.sharded:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ema, norms, _ = three_steps(model, rank=rank, world_size=world_size)
    assert all(isinstance(average, DTensor) for average in ema.averages.values())
    path = folder / "ema.safetensors"
    saved = gathered(ema.state_dict())
    if rank == 0:
        folder.mkdir()
        save_file(saved, path)
        (folder / "norms.json").write_text(json.dumps(norms))
    torch.distributed.barrier()

    loaded = ExponentialMovingAverage(model, 0.9)
    loaded.load_state_dict({name: like(loaded.averages.get(name), value) for name, value in load_file(path).items()})
    reloaded, averaged = gathered(loaded.state_dict()), averaged_model(model, ema)
    if rank == 0:
        save_file(reloaded, folder / "reloaded.safetensors")
        averaged.save_pretrained(folder / "averaged")


LAYOUT = TokenLayout(codebook_size=16, num_classes=3, num_tokens=6)
RATE = 0.25


def tiny_objective() -> NextTokenObjective:
    """The network that is shared out; the same in every process."""
    torch.manual_seed(0)
    llama = new_prior(LAYOUT, width=16, num_layers=2, num_heads=2, feed_forward_width=32)
    return NextTokenObjective(llama, LAYOUT, embedding_dropout=RATE)


def three_llama_steps(
    network: NextTokenObjective, *, rank: int = 0, world_size: int = 1
) -> tuple[ExponentialMovingAverage, list[float]]:
    """Three clipped steps with every dropout on this process's share of fixed batches; EMA and gradient norms."""
    optimizer = adamw(network, OptimConfig(learning_rate=1e-3))
    ema, norms, dropout = ExponentialMovingAverage(network, 0.9), [], ResidualDropout(network.transformer, RATE)
    generator, share = torch.Generator().manual_seed(1), SHARDED_BATCH // world_size
    mine = slice(rank * share, (rank + 1) * share)
    with dropout.attached():
        for step in range(3):
            token_ids = torch.randint(16, (SHARDED_BATCH, 6), generator=generator)[mine]
            labels = torch.randint(4, (SHARDED_BATCH,), generator=generator)[mine]
            positions = torch.arange(step * SHARDED_BATCH, (step + 1) * SHARDED_BATCH)[mine]
            dropout.seeds = residual_seeds(positions, 2, seed=0)
            network(labels, token_ids, embedding_seeds(positions, seed=0)).total.backward()
            norms.append(whole(torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_GRAD_NORM)).item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(network)
    return ema, norms


def share_out_llama(folder: Path, rank: int, world_size: int) -> None:
    """Train sharded; the main process writes gradient norms and the whole averaged Llama."""
    network, mesh = tiny_objective(), init_device_mesh("cpu", (world_size,))
    for module in network.modules():
        if type(module).__name__ in NextTokenPriorTask.sharded:
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)
    ema, norms = three_llama_steps(network, rank=rank, world_size=world_size)
    state: dict[str, Tensor] = averaged_llama(network, ema).state_dict()
    if rank == 0:
        save_file({name: value.contiguous() for name, value in state.items()}, folder / "llama.safetensors")
        (folder / "llama-norms.json").write_text(json.dumps(norms))


def stop_together() -> list[bool]:
    """The second process alone is asked to stop: both must hear of it at the same step."""
    accelerator = Accelerator()
    with StopRequest() as stop:
        answers = [stop.agreed(accelerator)]
        if accelerator.process_index == 1:
            signal.raise_signal(signal.SIGINT)
        return answers + [stop.agreed(accelerator) for _ in range(2)]


def refused(run: Run) -> str:
    """What the error says."""
    try:
        train(run)
    except UserError as error:
        return str(error)
    return "it was not refused"


def made_again(kind: str, values: dict[str, object]) -> Run:
    """The run of a plan."""
    kinds = (TokenizerRun, DiffusionTokenizerRun, PriorRun, DistillRun, NextTokenPriorRun)
    return run_from_json({each.__name__: each for each in kinds}[kind], values)


def main(folder: Path) -> None:
    """Everything that needs two processes, in one start of them."""
    plan = json.loads((folder / "plan.json").read_text())
    for run in plan["trained"]:
        train(made_again(*run))
    said: dict[str, object] = {"stop": stop_together()}
    said["refused"] = [refused(made_again(*run)) for run in plan["refused"]]
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for shared_adaln in (False, True):
        share_out(folder / f"sharded-{shared_adaln}", rank, world_size, shared_adaln=shared_adaln)
    share_out_llama(folder, rank, world_size)
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Equal names, values as of one training."""
    assert set(first) == set(second)
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, rtol=0, atol=TRAINED_ATOL, msg=lambda text, name=name: f"{name}: {text}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
