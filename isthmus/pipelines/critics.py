"""Whether a critic was trained for the model it is to judge."""

from isthmus.errors import UserError
from isthmus.models.fingerprint import pair_fingerprint
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import NextScaleTransformer
from isthmus.models.token_critic import TokenCritic


def check_critic(critic: TokenCritic, image_tokenizer: MultiScaleVQVAE, transformer: NextScaleTransformer) -> None:
    """Raise UserError unless the critic was trained on draws of this tokenizer and prior."""
    wanted, found = pair_fingerprint(image_tokenizer, transformer), critic.config["model_fingerprint"]
    if found != wanted:
        raise UserError(
            f"a critic judges the model it was trained for ({found[:12] or 'none'}), got another one ({wanted[:12]}). "
            "Train one for this model: isthmus train critic MODEL --data DATA --out FOLDER."
        )
