"""What people read in tables and pictures in place of the keys of summaries."""

CAPTIONS = {
    "fine_tuned": "fine-tuned",
    "present": "classes present",
    "table": "truth table",
    "log2_size": "number of images (log2)",
    "label_noise": "random labels",
    "bits": "bits right",
    "whole": "whole sets right",
    "r2": "R²",
    "retrieved": "found among all",
    "components_16": "16 components",
    "components_32": "32 components",
    "class_mean": "mean of the class answered",
    "written_for_another": "written for another rule",
    "nearest_copied": "nearest trained rule, copied",
    "nearest_averaged": "nearest trained rules, averaged",
    "constant": "constant answer",
    "trained": "trained on the rule",
    "on_union": "on A and B",
    "on_union_minus_on_others": "on A and B minus on the others",
    "a": "A",
    "b": "B",
    "trained_on_union": "trained on the union",
    "union_on_a": "union, on A",
    "union_on_b": "union, on B",
    "union_without_a_on_a": "union - A, on A",
    "union_without_a_on_b": "union - A, on B",
    "a_and_b": "A and B",
    "inside": "inside the ranges",
    "narrow": "one narrow recipe",
    "ranks_learned": "ranks learned from",
    "ties": "merged by TIES",
    "dare": "thinned by DARE",
}


def caption(key: str) -> str:
    """Return what to show for a key; by default its words."""
    return CAPTIONS.get(key, key.replace("_", " "))
