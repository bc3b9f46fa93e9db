"""Calls of the functions that pack batches; see ``public_calls``."""


def calls(rlk):
    """Returns the calls by their names; ``rlk``: the library, as ``public_calls`` sees it."""
    return {
        "pack": lambda d: rlk.pack(
            {"values": d["values"], "targets": d["targets"], "mask": d["mask"]},
            d["mask"],
            num_tokens=15,
            pad_to=4,
            fill={"targets": -100},
        ),
        "unpack": lambda d: rlk.unpack(
            {"values": d["values"].view(-1), "targets": d["targets"].view(-1)},
            d["cu"],
            length=7,
            padding="left",
            fill={"values": 0.5},
        ),
        "unpack of a mask": lambda d: rlk.unpack({"values": d["values"].view(-1)}, d["rows_of_five"], d["there"]),
        "shift_targets": lambda d: rlk.shift_targets(d["targets"], attention_mask=d["mask"], mask=d["mask"].flip(0)),
        "shift_targets of a packed batch": lambda d: rlk.shift_targets(d["targets"].view(-1), d["cu"]),
    }
