"""The quantiser alone, in every published configuration: sharing of phi, no phi, other ratios, cosine search."""

import torch

from isthmus.next_scale.pyramid import default_phi_indices
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.nn.quantization import nearest_code
from tests.testers import assert_parity

SCALES = (1, 2, 3, 5, 6)


def build(state: dict[str, torch.Tensor], settings: dict) -> MultiScaleVQVAE:
    """A tokenizer around the stored quantiser; encoder and decoder are not used."""
    sharing = settings["share_quant_resi"]
    num_phi = sharing or len(SCALES)  # published: 0 = one per scale
    tokenizer = MultiScaleVQVAE(
        codebook_size=64,
        codebook_dim=8,
        scale_sizes=SCALES,
        phi_indices=None if sharing else tuple(range(len(SCALES))),
        num_phi=num_phi,
        phi_ratio=abs(settings["quant_resi"]),
        base_channels=32,
        channel_multipliers=(1,),
        num_res_blocks=1,
        normalize_codes=settings["using_znorm"],
    )
    ours = {"codebook.weight": state["embedding.weight"]}
    for key, tensor in state.items():
        if key.startswith("quant_resi."):
            *path, leaf = key.split(".")
            ours[f"phi.{path[-1] if path[-1].isdigit() else 0}.conv.{leaf}"] = tensor
    assert {key for key in tokenizer.state_dict() if key.startswith(("phi", "codebook"))} == set(ours)
    tokenizer.load_state_dict(tokenizer.state_dict() | ours)
    return tokenizer.eval()


@torch.no_grad()
def test_every_variant(golden):
    io = golden.tensors("var/quantizer_variants.safetensors")
    variants = golden.json("var/config.json")["files"]["quantizer_variants.safetensors"]["variants"]
    for variant in ("znorm_qsr4", "plain_qsr1", "plain_qsr0", "plain_qsr3", "plain_noresi", "plain_negresi"):
        prefix = f"{variant}.state."
        state = {key.removeprefix(prefix): value for key, value in io.items() if key.startswith(prefix)}
        tokenizer = build(state, variants[variant])
        token_ids = tokenizer.requantize(io["in.f"])
        for scale, ids in enumerate(token_ids):
            assert_parity(ids, io[f"{variant}.out.idx.{scale}"])
            assert_parity(tokenizer.features_up_to(token_ids, scale), io[f"{variant}.out.f_hat.{scale}"])
        assert_parity(tokenizer.scale_inputs(token_ids), io[f"{variant}.out.var_wo_first_l"])


def test_cosine_search_looks_up_the_raw_row(golden):
    io = golden.tensors("var/quantizer_variants.safetensors")
    codebook = io["znorm_qsr4.state.embedding.weight"]
    rows = io["in.f"].flatten(2).transpose(1, 2).flatten(0, 1)
    found = nearest_code(rows, codebook, normalize=True)
    cosine = torch.cosine_similarity(rows[:, None], codebook[None], dim=-1)
    assert torch.equal(found, cosine.argmax(dim=1))
    # lengths differ between rows, so a normalised lookup would give other features than test_every_variant accepts
    assert codebook.norm(dim=1).std() > 0.01


def test_phi_tables_of_the_variants():
    assert default_phi_indices(5, 1) == (0, 0, 0, 0, 0)
    assert default_phi_indices(5, 4) == (0, 1, 2, 2, 3)
