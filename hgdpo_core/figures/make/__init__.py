"""How the weights of the figures setting are trained: `python -m hgdpo_core.figures`. No run needs this folder."""
