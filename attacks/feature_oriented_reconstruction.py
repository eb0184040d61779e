"""FORA: reconstruction by a server that owns unlabelled images and reads nothing but smashed data.

It trains a substitute of the node's bottom on its own images until a critic and a kernel distance
cannot tell its output from what nodes send, and a decoder that inverts the substitute. It reads no
label and no weight, changes no message, and works on a recorded round as well as beside a training.

Source: Xu, Yang, Yi, Li, Wang, Hu, Zhuang, Liu, *A Stealthy Wrongdoer: Feature-Oriented
Reconstruction Attack against Split Learning*, CVPR 2024, https://arxiv.org/abs/2405.04115, and its
code, https://github.com/X1aoyangXu/FORA. (An earlier version named other authors after the first
two; corrected 2026-11-29.)

Departures:
- Published rates are 1e-4 (critic 3e-4) over 40,000 iterations; these are for minutes on a CPU.
- The published substitute has other layers than the node's: ``simulator = "pilot"``. The default
  knows the node's.
- Those of its parts stand in :mod:`attacks.building_blocks.simulated_bottom`.
"""

from dataclasses import dataclass
from typing import ClassVar

from attacks.building_blocks.simulated_bottom import SimulatedBottom


@dataclass(frozen=True, kw_only=True)
class FeatureOrientedReconstruction(SimulatedBottom):
    """Reconstruction from smashed data and unlabelled images; loss weights as published.

    Attributes:
        critic: Weight of the critic's term.
        mmd: Weight of the kernel distance at the cut.
    """

    critic: float = 0.2
    mmd: float = 0.8

    name: ClassVar[str] = "fora"
    source: ClassVar[str] = "Xu et al., CVPR 2024, https://arxiv.org/abs/2405.04115"
