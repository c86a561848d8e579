"""The D-AR family: a Llama whose next tokens drive the steps of a pixel diffusion."""
