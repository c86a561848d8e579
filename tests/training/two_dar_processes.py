"""Started by test_dar_processes.py under torchrun: gloo processes that train D-AR, and share out a Llama."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

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
from isthmus.training.checkpoints import whole
from isthmus.training.config import OptimConfig, run_from_json
from isthmus.training.optim import ExponentialMovingAverage, adamw
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer

LAYOUT = TokenLayout(codebook_size=16, num_classes=3, num_tokens=6)
BATCH, RATE = 4, 0.25


def tiny_objective() -> NextTokenObjective:
    """The network that is shared out; the same in every process."""
    torch.manual_seed(0)
    llama = new_prior(LAYOUT, width=16, num_layers=2, num_heads=2, feed_forward_width=32)
    return NextTokenObjective(llama, LAYOUT, embedding_dropout=RATE)


def three_steps(
    network: NextTokenObjective, *, rank: int = 0, world_size: int = 1
) -> tuple[ExponentialMovingAverage, list[float]]:
    """Three clipped steps with every dropout on this process's share of fixed batches; EMA and gradient norms."""
    optimizer = adamw(network, OptimConfig(learning_rate=1e-3))
    ema, norms, dropout = ExponentialMovingAverage(network, 0.9), [], ResidualDropout(network.transformer, RATE)
    generator, share = torch.Generator().manual_seed(1), BATCH // world_size
    mine = slice(rank * share, (rank + 1) * share)
    with dropout.attached():
        for step in range(3):
            token_ids = torch.randint(16, (BATCH, 6), generator=generator)[mine]
            labels = torch.randint(4, (BATCH,), generator=generator)[mine]
            positions = torch.arange(step * BATCH, (step + 1) * BATCH)[mine]
            dropout.seeds = residual_seeds(positions, 2, seed=0)
            network(labels, token_ids, embedding_seeds(positions, seed=0)).total.backward()
            norms.append(whole(torch.nn.utils.clip_grad_norm_(network.parameters(), 0.05)).item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(network)
    return ema, norms


def share_out(folder: Path, rank: int, world_size: int) -> None:
    """Train sharded; the main process writes gradient norms and the whole averaged Llama."""
    network, mesh = tiny_objective(), init_device_mesh("cpu", (world_size,))
    for module in network.modules():
        if type(module).__name__ in NextTokenPriorTask.sharded:
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)
    ema, norms = three_steps(network, rank=rank, world_size=world_size)
    state: dict[str, Tensor] = averaged_llama(network, ema).state_dict()
    if rank == 0:
        save_file({name: value.contiguous() for name, value in state.items()}, folder / "sharded.safetensors")
        (folder / "norms.json").write_text(json.dumps(norms))


def main(folder: Path) -> None:
    """Everything that needs two processes, in one start of them."""
    plan = json.loads((folder / "plan.json").read_text())
    for values in plan["tokenizers"]:
        train_tokenizer(run_from_json(DiffusionTokenizerRun, values))
    for values in plan["priors"]:
        train_prior(run_from_json(NextTokenPriorRun, values))
    share_out(folder, torch.distributed.get_rank(), torch.distributed.get_world_size())
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
