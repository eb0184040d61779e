"""One torch thread, as in every process that does tensor arithmetic here."""

import torch

torch.set_num_threads(1)
