"""Where the joints of a person are, for each pose.

Lengths are pixels of the 256 px drawing canvas at scale 1; x grows to the right, y grows downwards, and the
origin is the point between the hips. Angles are degrees from straight down, positive away from the body's
middle, so one table serves both sides of the body.
"""

import math
from dataclasses import dataclass

import numpy as np

Point = tuple[float, float]
Limb = tuple[Point, Point, Point]
"""Root, middle and end."""


@dataclass(frozen=True)
class Build:
    """Body proportions of one kind of person, in pixels of the 256 px canvas."""

    thigh: float
    shin: float
    torso: float
    shoulder: float  # half the shoulder width
    hip: float  # half the hip width
    upper_arm: float
    forearm: float
    head: float  # radius
    arm_width: float
    leg_width: float


# Heads are large and limbs thick because 4 canvas pixels are one image pixel, and the VAE sees the image 8
# pixels at a time: a limb under 4 image pixels wide does not survive it.
BUILDS = {
    "man": Build(44, 44, 62, 33, 21, 38, 36, 33, 22, 27),
    "woman": Build(44, 44, 56, 25, 22, 35, 34, 33, 19, 25),
    "boy": Build(33, 32, 46, 24, 17, 31, 30, 32, 19, 23),
    "girl": Build(33, 32, 44, 21, 18, 30, 29, 31, 18, 22),
}


@dataclass(frozen=True)
class Pose:
    """Angles (upper, lower) of the four limbs, and where the body is. Left is the viewer's left."""

    left_arm: tuple[float, float]
    right_arm: tuple[float, float]
    left_leg: tuple[float, float]
    right_leg: tuple[float, float]
    lift: float = 0.0  # fraction of a leg's length between the lowest foot and the ground
    tilt: float = 0.0


POSES = {
    "standing": Pose((14, 8), (14, 8), (4, 3), (4, 3)),
    "waving": Pose((16, 10), (112, 172), (4, 3), (4, 3)),
    "cheering": Pose((150, 168), (150, 168), (12, 8), (12, 8)),
    "arms out": Pose((90, 92), (90, 92), (8, 5), (8, 5)),
    "posing": Pose((58, -48), (58, -48), (10, 6), (10, 6)),
    "walking": Pose((48, 20), (34, 78), (34, 12), (30, 52), tilt=3),
    "sitting": Pose((36, -6), (36, -6), (46, 3), (46, 3)),
    "jumping": Pose((118, 132), (118, 132), (56, -30), (56, -30), lift=0.38),
}


@dataclass(frozen=True)
class Skeleton:
    """Joints in canvas pixels; `left` and `right` as the viewer sees them."""

    limbs: dict[str, Limb]
    shoulders: tuple[Point, Point]
    hips: tuple[Point, Point]
    neck: Point
    head: Point
    ground: float  # y of the floor under the figure
    reach: float  # the largest distance of a joint from the middle, sideways


def bone(root: Point, angle: float, length: float, side: int) -> Point:
    """The other end of a bone that leaves `root` at `angle` degrees from straight down, outwards on `side` (-1, 1)."""
    radians = math.radians(angle)
    return root[0] + side * length * math.sin(radians), root[1] + length * math.cos(radians)


def bend(root: Point, angles: tuple[float, float], lengths: tuple[float, float], side: int) -> Limb:
    """A limb of two bones."""
    middle = bone(root, angles[0], lengths[0], side)
    return root, middle, bone(middle, angles[1], lengths[1], side)


def build_skeleton(person: str, pose: str, rng: np.random.Generator, build: Build | None = None) -> Skeleton:
    """The joints of a person in a pose, with a few degrees of jitter; the origin lies between the hips.

    `build`: other proportions than the person's in BUILDS.
    """
    build, plan = build or BUILDS[person], POSES[pose]

    def jitter(angles: tuple[float, float]) -> tuple[float, float]:
        return angles[0] + float(rng.normal(0, 3)), angles[1] + float(rng.normal(0, 4))

    lean = math.radians(plan.tilt + float(rng.normal(0, 1.2)))
    neck = (build.torso * math.sin(lean), -build.torso * math.cos(lean))
    shoulders = ((neck[0] - build.shoulder, neck[1] + 9), (neck[0] + build.shoulder, neck[1] + 9))
    hips = ((-build.hip + build.leg_width * 0.42, 0.0), (build.hip - build.leg_width * 0.42, 0.0))
    arm, leg = (build.upper_arm, build.forearm), (build.thigh, build.shin)
    if pose == "sitting":  # thighs point at the viewer
        leg = (build.thigh * 0.6, build.shin)
    limbs = {
        "left_arm": bend(shoulders[0], jitter(plan.left_arm), arm, -1),
        "right_arm": bend(shoulders[1], jitter(plan.right_arm), arm, 1),
        "left_leg": bend(hips[0], jitter(plan.left_leg), leg, -1),
        "right_leg": bend(hips[1], jitter(plan.right_leg), leg, 1),
    }
    lowest = max(limbs["left_leg"][2][1], limbs["right_leg"][2][1])
    ground = lowest + 9 + plan.lift * (build.thigh + build.shin)
    head = (neck[0] + float(rng.normal(0, 1.5)), neck[1] - build.head * 0.86)
    reach = max(abs(x) for joints in limbs.values() for x, _ in joints)
    return Skeleton(limbs, shoulders, hips, neck, head, ground, reach)
