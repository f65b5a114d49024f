"""HG-DPO (arXiv:2405.20216v1): better human images from your own Stable Diffusion model, without human labels."""

__version__ = "0.1.0"
