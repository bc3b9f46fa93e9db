"""Results and gradients of every public call as text with every digit, to compare those of two processes.

``python written_results.py`` prints ``{name of the call: text}`` as JSON.
"""

import json

import torch
from public_calls import CALLS, call, data


def written(results):
    """One line per tensor: its dtype, shape and values."""
    return "\n".join(f"{x.dtype} {list(x.shape)} {x.detach().double().tolist()}" for x in results)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: written(call(name, data())) for name in CALLS}))
