"""The foreign half of the figures setting: stand-ins for the images and prompts of a public preference data set.

Pairs of Pick-a-Pic or HPD come from other generators, show another style, and are often of no person at all. Here
another renderer (flat, thick-edged) draws the same captions of people, and still lives that hold none; another small
generator is trained on them (`weights/foreign`), and a network of its own labels its pairs (`weights/labeller`).
"""

from .prompts import Scene, StillLife, foreign_prompts, parse_scene, sample_scenes, scene_caption
from .renderer import defects_of, render_foreign

__all__ = ["Scene", "StillLife", "defects_of", "foreign_prompts", "parse_scene", "render_foreign", "sample_scenes",
           "scene_caption"]
