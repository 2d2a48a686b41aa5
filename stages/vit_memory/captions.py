"""What people read in tables and pictures in place of the names of methods."""

CAPTIONS = {
    "memory_head": "memory head",
    "memory_block": "memory in a block",
    "whitened_linear_probe": "linear probe, whitened",
    "linear_probe": "linear probe",
    "plain_linear_probe": "linear probe, plain features",
    "vpt_shallow": "VPT-shallow",
    "vpt_deep": "VPT-deep",
    "ranpac": "RanPAC",
    "nearest_mean": "nearest mean",
    "pixels": "linear probe of pixels",
    "random_vit": "linear probe of random weights",
    "memory": "memory",
    "slda": "SLDA: memory with a metric",
    "joint": "joint: all data so far",
    "replay": "replay",
    "icarl": "iCaRL",
    "ewc": "EWC",
    "lwf": "LwF",
    "finetune": "fine-tuning",
}


def caption(name: str) -> str:
    """Return what to show for a method; by default its words."""
    return CAPTIONS.get(name, name.replace("_", " "))
